//! The jobledger server: a durable, ordered job ledger over gRPC.
//!
//! [`Server::open`] takes a listener and a [`Config`], and [`Server::run`] serves until its shutdown future completes. One
//! process can run any number of servers, as the tests do. [`InProcess`] is a server for the tests of programs that use
//! jobledger.
//!
//! Dependencies point one way: the program and `server` → `legacy` → `api`; `api`, `maintenance` → `ledger` → `store` →
//! `domain`; `api` → `net` → `access` → `store`; `verify` → `store`. ARCHITECTURE.md has the map.

pub mod access;
pub mod config;
pub mod domain;
pub mod files;
#[doc(hidden)]
pub mod fuzzing;
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
mod scheduler;
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
