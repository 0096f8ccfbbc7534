//! Workers, as servers hear of them.

use std::sync::Arc;

use super::clock::Time;

/// What a worker says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkerAbout {
    /// The types that its last claim asked for, sorted; none: all types. `None` if it only sends heartbeats.
    pub types: Option<Arc<[Arc<str>]>>,
    /// Its version.
    pub version: Arc<str>,
    /// The machine that it runs on.
    pub host: Arc<str>,
}

impl WorkerAbout {
    /// Bytes of its texts.
    pub fn bytes(&self) -> usize {
        let types: usize = self.types.iter().flat_map(|types| types.iter()).map(|name| name.len()).sum();
        types + self.version.len() + self.host.len()
    }

    /// True if its last claim asked for jobs of this type.
    pub fn asks_for(&self, job_type: &Arc<str>) -> bool {
        let Some(types) = &self.types else { return false };
        types.is_empty() || types.binary_search(job_type).is_ok()
    }
}

/// A worker that some server has heard of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    /// Its id.
    pub id: Arc<str>,
    /// What it says of itself.
    pub about: Arc<WorkerAbout>,
    /// True if a claim of it waits, or waited when this was written, some seconds ago at most.
    pub is_waiting: bool,
    /// When a server last heard of it.
    pub heard_at: Time,
}
