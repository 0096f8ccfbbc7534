//! Faults around jobledger: of its network, its database, its machine, and kills. Whatever was acknowledged holds.
//!
//! Each test prints its seed. JOBLEDGER_TEST_SEED repeats a run with its seed. `make test` runs the short forms, `make
//! test-faults` the long ones.

mod clock;
mod failover;
mod history;
pub(crate) mod link;
mod machine;
mod mixed;
mod orgs;
mod power;
mod standby;
mod volume;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// The file name of a library that [`preloaded`] builds.
const PRELOADED: &str = "preloaded.so";

/// Builds a library from C source. It replaces some system calls in a program that runs with it as LD_PRELOAD.
fn preloaded(folder: &Path, source: &str) -> PathBuf {
    let (path, library) = (folder.join("preloaded.c"), folder.join(PRELOADED));
    std::fs::write(&path, source).expect("the folder is there");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&path).status();
    assert!(built.expect("a C compiler").success());
    library
}
