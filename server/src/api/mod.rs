//! The gRPC side: validates and converts requests, asks the [ledger](crate::ledger), converts answers. Knows no store.

mod call;
mod convert;
mod http;
mod json;
mod legacy;
mod listing;
mod request;
mod service;
mod statistics;
mod status;
mod stream;
mod wire;

pub(crate) use self::{
    call::CallLayer,
    http::probes,
    legacy::{legacy, no_legacy},
    service::Service,
    wire::{WireLayer, WireService},
};
