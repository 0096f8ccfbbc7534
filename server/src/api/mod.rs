//! The gRPC side: validates and converts requests, submits commands to the [ledger](crate::ledger), and converts its
//! replies. It does not know the store.

mod access;
mod buffered_response;
mod bulk;
mod caller;
mod convert;
mod deadline;
mod explain;
pub(crate) mod fuzzing;
mod http;
mod job_types;
mod json;
mod limits;
mod listing;
mod processor_shares;
mod reject;
mod request;
mod request_body;
mod rpc;
mod server_info;
mod service;
mod statistics;
mod status;
mod stream;
mod tokens;
mod weight;
mod wire;
mod workers;

pub use self::limits::CallLimits;
// What the old REST calls share with the others.
pub(crate) use self::{
    access::AccessLayer,
    bulk::BulkOperations,
    deadline::CallLayer,
    http::probes,
    job_types::JobTypes,
    limits::LimitsLayer,
    request_body::ABOUT_NO_ORG,
    server_info::{ServerFacts, ServerInfo},
    service::Service,
    wire::{WireLayer, WireService},
    workers::Workers,
};
pub(crate) use self::{
    caller::{Caller, View},
    convert::status as status_word,
    json::from_json as json_value,
    request::{create as create_command, ending_digest},
    status::{ApiError, http_code},
    weight::{MOST_VALUES, may_be_parsed},
};
