//! Bounds the memory of what waiting claims and event streams name (types, labels, workers), on the server and for each org.

use std::sync::Arc;

use super::{LedgerError, SubscribeRequest, command::Claim};
use crate::{
    domain::{id::OrgId, worker::WorkerAbout},
    shares::{Full, Most, Part, Shares},
};

/// Bytes that a text takes besides its own.
const OF_EACH: usize = 96;

#[derive(Clone)]
pub(super) struct NameBudget(Arc<Shares<OrgId>>);

/// The memory of one claim or stream, until it is dropped.
pub(super) type NameShare = Part<OrgId>;

impl NameBudget {
    pub(super) fn new(bytes: usize, bytes_per_org: usize) -> Self {
        Self(Shares::new(Most { in_all: bytes, each: bytes_per_org }))
    }

    pub(super) fn of_claim(&self, org: OrgId, claim: &Claim) -> Result<NameShare, LedgerError> {
        let names = claim.request.iter().chain([&claim.worker]).chain(claim.types.iter());
        self.keep(org, names.map(|name| &**name))
    }

    pub(super) fn of_worker(&self, org: OrgId, id: &str, about: &WorkerAbout) -> Option<NameShare> {
        let names = about.types.iter().flat_map(|types| types.iter()).chain([&about.version, &about.host]);
        self.keep(org, names.map(|name| &**name).chain([id])).ok()
    }

    pub(super) fn of_stream(&self, org: OrgId, request: &SubscribeRequest) -> Result<NameShare, LedgerError> {
        let labels = request.filter.labels.iter().flat_map(|(key, value)| [key, value]);
        self.keep(org, request.filter.types.iter().chain(labels).map(String::as_str))
    }

    fn keep<'a>(&self, org: OrgId, texts: impl Iterator<Item = &'a str>) -> Result<NameShare, LedgerError> {
        let Most { in_all, each } = self.0.most();
        self.0.take(org, texts.map(|text| text.len() + OF_EACH).sum()).map_err(|full| match full {
            Full::InAll => LedgerError::TooManyNames { scope: "server", limit: in_all },
            Full::Each => LedgerError::TooManyNames { scope: "org", limit: each },
        })
    }
}
