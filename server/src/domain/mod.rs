//! The rules of the ledger: pure, without IO, proto, SQL or a time of its own.
//!
//! [`Job::create`](job::Job::create) and [`Job::apply`](job::Job::apply) are the only places where a job changes; see
//! [`transition`].

pub mod access;
pub mod clock;
pub mod event;
pub mod flow;
pub mod id;
pub mod job;
pub mod json;
pub mod lease;
pub mod name;
pub mod replay;
pub mod retry;
pub mod status;
pub mod transition;

#[cfg(test)]
pub(crate) mod tests;
