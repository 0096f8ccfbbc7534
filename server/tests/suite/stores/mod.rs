//! The store's contract, and the ledger over a real database.

pub(crate) mod commits;
pub(crate) mod contract;
pub(crate) mod contract_log;
pub(crate) mod contract_records;
pub(crate) mod contract_series;
pub(crate) mod contract_shared;
pub(crate) mod contract_work;
pub(crate) mod folding;
pub(crate) mod lanes;
pub(crate) mod ledger;
pub(crate) mod plans;
pub(crate) mod plans_of_statistics;
pub(crate) mod pooler;
pub(crate) mod records;
pub(crate) mod replicas;
pub(crate) mod retention;
pub(crate) mod rls;
pub(crate) mod shared;
pub(crate) mod slices;
pub(crate) mod wal;
