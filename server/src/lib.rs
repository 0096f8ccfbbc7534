//! The jobledger server: a durable, ordered job ledger over gRPC.
//!
//! [`Server::open`] takes a listener and a [`Config`], [`Server::run`] serves until it is told to stop. Both can be done
//! any number of times in one process, which is how the tests do it. [`InProcess`] is a server for the tests of those who use
//! jobledger.
//!
//! Dependencies point one way: `main` → `api`, `maintenance` → `ledger` → `store` → `domain`; `api` → `net` → `access` → `store`; `verify` → `store`, `import` → `ledger`. ARCHITECTURE.md has the map.

pub mod access;
pub mod config;
pub mod domain;
pub mod export;
pub mod files;
#[doc(hidden)]
pub mod fuzzing;
pub mod import;
pub mod ledger;
pub mod legacy;
pub mod store;
pub mod telemetry;
pub mod verify;

mod api;
mod generations;
mod in_process;
mod maintenance;
mod net;
mod readiness;
mod server;
mod shares;
mod turns;

pub use self::{
    api::CallLimits,
    config::Config,
    in_process::InProcess,
    net::{ConnectionLimits, Tls, TlsConfig, TlsError},
    server::{ServeError, Server},
};
