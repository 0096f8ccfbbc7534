//! Events as subscribers see them, and statistics.

pub(crate) mod snapshot_pages;
pub(crate) mod snapshots;
pub(crate) mod statistics;
pub(crate) mod subscriptions;
pub(crate) mod views;
