//! Work: claims, leases, reports, workers, and what becomes of jobs when any of them dies.

pub(crate) mod claims;
pub(crate) mod crash;
pub(crate) mod deploys;
pub(crate) mod fencing;
pub(crate) mod known_workers;
pub(crate) mod leases;
pub(crate) mod overload;
pub(crate) mod pauses;
pub(crate) mod workers;
