//! The program and its commands, what the documents show, and the rules of the code base.

pub(crate) mod arguments;
pub(crate) mod backup;
pub(crate) mod demo;
pub(crate) mod everyday;
pub(crate) mod example;
pub(crate) mod grpcurl;
pub(crate) mod house;
pub(crate) mod migrate;
pub(crate) mod output;
pub(crate) mod private_files;
pub(crate) mod python;
pub(crate) mod restore;
pub(crate) mod shutdown;
pub(crate) mod start;
pub(crate) mod verify;
