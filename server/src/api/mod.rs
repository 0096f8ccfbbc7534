//! The gRPC side: validates and converts requests, submits commands to the [ledger](crate::ledger), and converts its
//! replies. It does not know the store.

mod access;
mod answers;
mod call;
mod caller;
mod convert;
pub(crate) mod fuzzing;
mod http;
mod json;
mod legacy;
mod limits;
mod listing;
mod receiving;
mod refusal;
mod request;
mod rpc;
mod service;
mod statistics;
mod status;
mod stream;
mod weight;
mod wire;

pub use self::limits::CallLimits;
pub(crate) use self::{
    access::AccessLayer,
    call::CallLayer,
    http::probes,
    legacy::{legacy, no_legacy},
    limits::LimitsLayer,
    receiving::ABOUT_NO_ORG,
    service::Service,
    wire::{WireLayer, WireService},
};
