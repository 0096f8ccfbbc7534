//! The service that jobledger replaces: its REST calls, and the import and export of its jobs.

pub(crate) mod database;
pub(crate) mod export;
pub(crate) mod import;
pub(crate) mod import_again;
pub(crate) mod rest;
pub(crate) mod rows;
pub(crate) mod tables;
