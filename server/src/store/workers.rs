//! `worker`: rows of workers, the same for both databases.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    StoreError,
    rows::{Columns, damaged, json_text},
};
use crate::domain::{
    clock::Time,
    id::OrgId,
    worker::{Worker, WorkerAbout},
};

/// A worker that this server heard of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeardWorker {
    /// The org of its jobs.
    pub org: OrgId,
    /// Its id.
    pub id: Arc<str>,
    /// What its last claim said; `None` if that is not known here: then what is stored stays.
    pub about: Option<Arc<WorkerAbout>>,
    /// True if a claim of it waits.
    pub is_waiting: bool,
    /// How long ago it was heard of.
    pub silent_for: Duration,
}

/// Workers of one org.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerPage {
    /// The workers, in the order of their ids.
    pub workers: Vec<Worker>,
    /// The database's clock.
    pub as_of: Time,
}

/// The column `about`.
#[derive(Serialize, Deserialize)]
struct AboutText<T> {
    types: Option<Vec<T>>,
    version: T,
    host: T,
    waits: bool,
}

/// Empty if nothing is known.
pub(super) fn about_text(heard: &HeardWorker) -> String {
    let Some(about) = &heard.about else { return String::new() };
    let WorkerAbout { types, version, host } = &**about;
    let types = types.as_ref().map(|types| types.iter().map(|name| &**name).collect());
    json_text(&AboutText { types, version: &**version, host: &**host, waits: heard.is_waiting })
}

/// Reads `id`, `about` and `heard_at`.
pub(super) fn read<'r>(columns: &mut impl Columns<'r>) -> Result<Worker, StoreError> {
    let (id, text) = (columns.text()?.into(), columns.text()?);
    let nothing = AboutText { types: None, version: String::new(), host: String::new(), waits: false };
    let about: AboutText<String> =
        if text.is_empty() { nothing } else { serde_json::from_str(text).map_err(|_| damaged("about"))? };
    let types = about.types.map(|types| types.into_iter().map(Into::into).collect());
    Ok(Worker {
        id,
        about: Arc::new(WorkerAbout { types, version: about.version.into(), host: about.host.into() }),
        is_waiting: about.waits,
        heard_at: columns.time()?,
    })
}
