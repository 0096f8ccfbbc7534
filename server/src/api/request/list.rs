//! Requests of ListJobs, and their page tokens.

use jobledger_proto::v1 as pb;

use super::{
    super::status::ApiError,
    check::{Check, digest},
};
use crate::{
    domain::job::MAX_ERROR_CODE_CHARS,
    ledger::{JobFilter, ListOrder, ListQuery},
};

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

    let statuses = check.statuses(&request.statuses);
    let types = check.types(request.types);
    check.labels(&request.labels);
    check.name("requested_by", &request.requested_by);
    check.name("idempotency_key", &request.idempotency_key);
    check.text("error_code", &request.error_code, MAX_ERROR_CODE_CHARS);
    check.name("worker_id", &request.worker_id);
    let mut time = |field, time: Option<_>| time.and_then(|time| check.time(field, time));
    let created_after = time("created_after", request.created_after);
    let created_before = time("created_before", request.created_before);
    let finished_after = time("finished_after", request.finished_after);
    let finished_before = time("finished_before", request.finished_before);
    let order = match pb::JobOrder::try_from(request.order) {
        Ok(pb::JobOrder::Unspecified | pb::JobOrder::NewestFirst) => ListOrder::NewestFirst,
        Ok(pb::JobOrder::OldestFirst) => ListOrder::OldestFirst,
        Err(_) => {
            check.refuse("order", format!("{} is not an order", request.order));
            ListOrder::default()
        }
    };
    let place = token.as_deref().map(|token| parse(token, &fingerprint));
    check.that("page_token", place != Some(None), || {
        "is not the next_page_token of an answer to a request with the same filters".to_owned()
    });
    check.finish()?;
    let (after, as_of_seq) = place.flatten().unzip();
    let given = |text: String| (!text.is_empty()).then_some(text);
    let filter = JobFilter {
        statuses,
        types,
        labels: request.labels,
        requested_by: given(request.requested_by),
        created_after,
        created_before,
        idempotency_key: given(request.idempotency_key),
        error_code: given(request.error_code),
        worker: given(request.worker_id),
        finished_after,
        finished_before,
    };
    let query = ListQuery { filter, order, after: after.unwrap_or(order.start()), limit };
    Ok(Listing { query, is_full: view == Ok(pb::JobView::Full), as_of_seq, fingerprint })
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
