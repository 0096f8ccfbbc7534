//! Runs the fuzz target that the variable JOBLEDGER_FUZZ names.

#![no_main]

use std::sync::LazyLock;

use jobledger_server::fuzzing::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("JOBLEDGER_FUZZ").unwrap_or_default();
    let found = TARGETS.into_iter().find(|(target, _)| *target == name);
    found.unwrap_or_else(|| panic!("JOBLEDGER_FUZZ={name}: expected one of {:?}", TARGETS.map(|(name, _)| name))).1
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| TARGET(bytes));
