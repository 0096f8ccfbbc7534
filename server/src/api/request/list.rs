//! Requests of ListJobs, and their page tokens.

use jobledger_proto::v1 as pb;

use super::{
    super::status::ApiError,
    check::{Check, digest},
};
use crate::ledger::{ListOrder, ListQuery};

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
    let limit = check.page_size(request.page_size, DEFAULT_PAGE, MAX_PAGE);
    let token = check.token("page_token", std::mem::take(&mut request.page_token));
    let view = pb::JobView::try_from(request.view);
    check.that("view", view.is_ok(), || format!("{} is not a view", request.view));
    (request.page_size, request.view) = (0, 0);
    let fingerprint = hex::encode(&digest(&request).0[..8]);

    let order = request.order;
    let filter = check.job_filter("", filter_of(request));
    let order = match pb::JobOrder::try_from(order) {
        Ok(pb::JobOrder::Unspecified | pb::JobOrder::NewestFirst) => ListOrder::NewestFirst,
        Ok(pb::JobOrder::OldestFirst) => ListOrder::OldestFirst,
        Err(_) => {
            check.refuse("order", format!("{order} is not an order"));
            ListOrder::default()
        }
    };
    let place = token.as_deref().map(|token| parse(token, &fingerprint));
    check.that("page_token", place != Some(None), || {
        "is not the next_page_token of an answer to a request with the same filters".to_owned()
    });
    check.finish()?;
    let (after, as_of_seq) = place.flatten().unzip();
    let query = ListQuery { after: after.unwrap_or(order.start()), ..ListQuery::first(filter, order, limit) };
    Ok(Listing { query, is_full: view == Ok(pb::JobView::Full), as_of_seq, fingerprint })
}

/// The filters of a list.
fn filter_of(request: pb::ListJobsRequest) -> pb::JobFilter {
    pb::JobFilter {
        statuses: request.statuses,
        types: request.types,
        labels: request.labels,
        requested_by: request.requested_by,
        created_after: request.created_after,
        created_before: request.created_before,
        idempotency_key: request.idempotency_key,
        error_code: request.error_code,
        worker_id: request.worker_id,
        finished_after: request.finished_after,
        finished_before: request.finished_before,
    }
}

impl Listing {
    /// The token of the page that begins after the job with this `created_seq`.
    pub(in super::super) fn token(&self, after: i64, as_of_seq: i64) -> String {
        token((after, as_of_seq), &self.fingerprint)
    }
}

fn token((after, as_of_seq): (i64, i64), fingerprint: &str) -> String {
    format!("{after}.{as_of_seq}.{fingerprint}")
}

/// Parses a page token; `None` unless it is exactly as [`token`] writes it.
fn parse(text: &str, fingerprint: &str) -> Option<(i64, i64)> {
    let mut parts = text.split('.');
    let mut seq = || parts.next()?.parse().ok().filter(|seq| *seq >= 0);
    let place = (seq()?, seq()?);
    (token(place, fingerprint) == text).then_some(place)
}
