//! The gRPC side: validates and converts requests, submits commands to the [ledger](crate::ledger), and converts its
//! replies. It does not know the store.

mod access;
mod buffered_response;
mod caller;
mod convert;
mod deadline;
pub(crate) mod fuzzing;
mod http;
mod json;
mod legacy;
mod limits;
mod listing;
mod reject;
mod request;
mod request_body;
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
    deadline::CallLayer,
    http::probes,
    legacy::{legacy, no_legacy},
    limits::LimitsLayer,
    request_body::ABOUT_NO_ORG,
    service::Service,
    wire::{WireLayer, WireService},
};
