//! The rules of the ledger. This code is pure: it does no IO, knows neither proto nor SQL, and reads no clock.
//!
//! [`Job::create`](job::Job::create) and [`Job::apply`](job::Job::apply) decide every change of a job; see
//! [`transition`]. Imports go through [`Job::import`](job::Job::import).

pub mod access;
pub mod bulk;
pub mod clock;
pub mod edit;
pub mod event;
pub mod flow;
pub mod id;
pub mod job;
pub mod job_filter;
pub mod job_type;
pub mod json;
pub mod lease;
pub mod name;
pub mod org_event;
pub mod replay;
pub mod retry;
pub mod status;
pub mod transition;
pub mod worker;

#[cfg(test)]
pub(crate) mod tests;
