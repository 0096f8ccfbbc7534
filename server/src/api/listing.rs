//! Pages of jobs on the wire: cut by bytes as well as by number.

use std::collections::HashMap;

use jobledger_proto::v1 as pb;
use prost::Message as _;

use super::{convert, request::Listing, status::ApiError};
use crate::{
    domain::{id::OrgId, job::Job},
    ledger::{JobPage, ReadTurn},
};

/// What the jobs of one answer may take, so that it stays below 4 MiB; a single one may take more.
const ANSWER_BYTES: usize = 3_584 << 10;
/// Jobs whose payloads and results are read at once.
const CONTENTS_AT_ONCE: usize = 64;

/// A page, in one turn: of those that are being put together there are no more than turns.
pub(super) async fn answer(turn: &ReadTurn, org: OrgId, listing: Listing) -> Result<pb::ListJobsResponse, ApiError> {
    let JobPage { jobs, mut next, as_of_seq } = turn.list(org, &listing.query).await?;
    let as_of_seq = listing.as_of_seq.unwrap_or(as_of_seq);
    let mut answer = pb::ListJobsResponse { jobs: Vec::with_capacity(jobs.len()), as_of_seq, ..Default::default() };
    let (mut bytes, mut last) = (0, None);
    'page: for chunk in chunks(&jobs, listing.is_full) {
        let mut contents = HashMap::new();
        if listing.is_full {
            let ids = chunk.iter().map(|job| job.id).collect();
            contents.extend(turn.contents(org, ids).await?);
        }
        for job in chunk {
            let message = convert::full_job(job, &contents.remove(&job.id).unwrap_or_default());
            bytes += message.encoded_len() + 8;
            if bytes > ANSWER_BYTES && last.is_some() {
                next = last;
                break 'page;
            }
            last = Some(job.created_seq);
            answer.jobs.push(message);
        }
    }
    answer.next_page_token = next.map(|before| listing.token(before, as_of_seq)).unwrap_or_default();
    Ok(answer)
}

/// Parts of a page, each read at once: as many jobs as fit by what their payloads take, their results taken for as large.
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

/// What a result is taken for before it is read: with a chunk's number of them at their limit it is bounded all the same.
const RESULT_BYTES: usize = 64 << 10;
