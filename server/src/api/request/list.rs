//! Requests of ListJobs, and their page tokens.

use jobledger_proto::v1 as pb;

use super::{
    super::status::ApiError,
    check::{Check, digest},
};
use crate::ledger::{JobFilter, ListQuery};

const DEFAULT_PAGE: usize = 50;
const MAX_PAGE: usize = 1_000;

pub(in super::super) struct Listing {
    pub(in super::super) query: ListQuery,
    pub(in super::super) is_full: bool,
    /// The `as_of_seq` of the first page; `None` where this is the first page.
    pub(in super::super) as_of_seq: Option<i64>,
    /// Digest of the filters: a page token is valid only for the filters that it was made for.
    fingerprint: String,
}

pub(in super::super) fn list(mut request: pb::ListJobsRequest) -> Result<Listing, ApiError> {
    let mut check = Check::default();
    let page_size = request.page_size;
    check.that("page_size", page_size >= 0, || "must not be negative".to_owned());
    let limit = match usize::try_from(page_size).unwrap_or_default() {
        0 => DEFAULT_PAGE,
        n => n.min(MAX_PAGE),
    };
    let token = check.token("page_token", std::mem::take(&mut request.page_token));
    let view = pb::JobView::try_from(request.view);
    check.that("view", view.is_ok(), || format!("{} is not a view", request.view));
    (request.page_size, request.view) = (0, 0);
    let fingerprint = hex::encode(&digest(&request).0[..8]);

    let statuses = check.statuses(&request.statuses);
    let types = check.types(request.types);
    check.labels(&request.labels);
    check.name("requested_by", &request.requested_by);
    let created_after = request.created_after.and_then(|time| check.time("created_after", time));
    let created_before = request.created_before.and_then(|time| check.time("created_before", time));
    let place = token.as_deref().map(|token| parse(token, &fingerprint));
    check.that("page_token", place != Some(None), || {
        "is not the next_page_token of an answer to a request with the same filters".to_owned()
    });
    check.finish()?;
    let (before, as_of_seq) = place.flatten().unzip();
    let requested_by = (!request.requested_by.is_empty()).then_some(request.requested_by);
    let filter = JobFilter { statuses, types, labels: request.labels, requested_by, created_after, created_before };
    let query = ListQuery { filter, before: before.unwrap_or(i64::MAX), limit };
    Ok(Listing { query, is_full: view == Ok(pb::JobView::Full), as_of_seq, fingerprint })
}

impl Listing {
    /// The token of the page that begins with the newest job created before this `seq`.
    pub(in super::super) fn token(&self, before: i64, as_of_seq: i64) -> String {
        token((before, as_of_seq), &self.fingerprint)
    }
}

fn token((before, as_of_seq): (i64, i64), fingerprint: &str) -> String {
    format!("{before}.{as_of_seq}.{fingerprint}")
}

/// Parses a page token; `None` unless it is exactly as [`token`] writes it.
fn parse(text: &str, fingerprint: &str) -> Option<(i64, i64)> {
    let mut parts = text.split('.');
    let mut seq = || parts.next()?.parse().ok().filter(|seq| *seq >= 0);
    let place = (seq()?, seq()?);
    (token(place, fingerprint) == text).then_some(place)
}
