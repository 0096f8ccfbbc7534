//! What goes wrong around jobledger: its network, its database, its machine, and whoever kills it. Whatever was acknowledged holds.
//!
//! Each test prints its seed, and does the same again with it in JOBLEDGER_TEST_SEED. `make test` runs the short forms,
//! `make test-faults` the long ones.

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

/// The name of a library that [`preloaded`] makes.
const PRELOADED: &str = "preloaded.so";

/// A library that takes the place of some of the system's calls in a program that is run with it as LD_PRELOAD, from its source in C.
fn preloaded(folder: &Path, source: &str) -> PathBuf {
    let (path, library) = (folder.join("preloaded.c"), folder.join(PRELOADED));
    std::fs::write(&path, source).expect("the folder is there");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&path).status();
    assert!(built.expect("a C compiler").success());
    library
}
