//! Answers of ListJobs: pages that are cut by bytes as well as by number.

use std::collections::HashMap;

use jobledger_proto::v1 as pb;
use prost::Message as _;

use super::{caller::View, convert, request::Listing, status::ApiError};
use crate::{
    domain::{id::OrgId, job::Job},
    ledger::{JobPage, ReadTurn},
};

/// Bytes of the jobs of one answer, so that it stays below 4 MiB. A single job may take more.
const ANSWER_BYTES: usize = 3_584 << 10;
/// Jobs whose payloads and results are read in one query, at most.
const CONTENTS_AT_ONCE: usize = 64;

/// Lists a page within one read turn: no more pages are in the making than there are turns.
pub(super) async fn answer(
    turn: &ReadTurn,
    org: OrgId,
    listing: Listing,
    view: View,
) -> Result<pb::ListJobsResponse, ApiError> {
    let JobPage { jobs, mut next, as_of_seq } = turn.list(org, &listing.query).await?;
    let as_of_seq = listing.as_of_seq.unwrap_or(as_of_seq);
    let mut answer = pb::ListJobsResponse { jobs: Vec::with_capacity(jobs.len()), as_of_seq, ..Default::default() };
    let (mut bytes, mut last) = (0, None);
    let is_full = listing.is_full && view == View::Whole;
    'page: for chunk in chunks(&jobs, is_full) {
        let mut contents = HashMap::new();
        if is_full {
            let ids = chunk.iter().map(|job| job.id).collect();
            contents.extend(turn.contents(org, ids).await?);
        }
        for job in chunk {
            let message = convert::full_job(job, &contents.remove(&job.id).unwrap_or_default());
            let message = convert::seen_job(message, view);
            bytes += message.encoded_len() + 8;
            if bytes > ANSWER_BYTES && last.is_some() {
                next = last;
                break 'page;
            }
            last = Some(job.created_seq);
            answer.jobs.push(message);
        }
    }
    answer.next_page_token = next.map(|after| listing.token(after, as_of_seq)).unwrap_or_default();
    Ok(answer)
}

/// Splits a page into chunks whose payloads and results are read in one query each. A chunk is filled by the known
/// sizes of the payloads, and [`RESULT_BYTES`] for each result.
fn chunks(jobs: &[Job], is_full: bool) -> Vec<&[Job]> {
    if !is_full {
        return vec![jobs];
    }
    let mut chunks = Vec::new();
    let mut rest = jobs;
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |job: &&Job| {
            bytes += job.spec.payload_bytes as usize + if job.result_at.is_some() { RESULT_BYTES } else { 0 };
            bytes <= ANSWER_BYTES
        };
        let n = rest.iter().take(CONTENTS_AT_ONCE).take_while(fits).count().max(1);
        let (chunk, others) = rest.split_at(n);
        chunks.push(chunk);
        rest = others;
    }
    chunks
}

/// Assumed size of a result that is not read yet. A chunk has at most [`CONTENTS_AT_ONCE`] results, so it stays bounded
/// where they are larger.
const RESULT_BYTES: usize = 64 << 10;
