//! Converts what keeps a job from running into the answer of ExplainJob.

use jobledger_proto::v1::{self as pb, wait_reason as because, wait_reason::Reason};

use super::{
    caller::View,
    convert::{self, timestamp},
};
use crate::{
    domain::status::JobStatus,
    ledger::{Explain, Explained, Explanation},
};

pub(super) fn answer(explained: &Explained, view: View) -> pb::ExplainJobResponse {
    let Explained { decided, asking, waiting, lacks_some, .. } = explained;
    let Explanation { job, is_scheduled, pauses, ahead, is_unsure, quota, as_of_seq, as_of } = decided;
    let is_queued = job.status == JobStatus::Queued;
    let mut reasons = Vec::new();
    if *is_scheduled {
        reasons.push(Reason::NotBefore(because::NotBefore { time: Some(timestamp(job.ready_at)) }));
    }
    for (pause, all_types) in pauses.iter().zip([true, false]) {
        if let Some(pause) = pause.as_ref().filter(|_| is_queued) {
            let pause = Some(convert::pause(pause));
            reasons.push(Reason::Paused(because::TypePaused { pause, all_types }));
        }
    }
    if let Some((quantity, limit)) = quota.filter(|_| is_queued) {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        reasons.push(Reason::OverQuota(because::OverQuota { quota: quantity.to_string(), limit }));
    }
    let is_claimable = is_queued && reasons.is_empty();
    if *ahead > 0 {
        let behind = because::Behind {
            jobs: (*ahead).min(Explain::COUNTED) as i64,
            truncated: *is_unsure || *ahead > Explain::COUNTED,
        };
        reasons.push(Reason::Behind(behind));
    }
    if is_queued && *asking == 0 && !lacks_some {
        reasons.push(Reason::NoWorker(because::NoWorker {}));
    } else if is_claimable && *asking > 0 && *waiting == 0 && !lacks_some {
        reasons.push(Reason::WorkersBusy(because::WorkersBusy { workers: *asking as i64 }));
    }
    pb::ExplainJobResponse {
        job: Some(convert::seen_job(convert::job(job), view)),
        reasons: reasons.into_iter().map(|reason| pb::WaitReason { reason: Some(reason) }).collect(),
        next: is_claimable && *ahead == 0 && !is_unsure,
        as_of_seq: *as_of_seq,
        as_of: Some(timestamp(*as_of)),
        estimated_wait: explained.estimated_wait().map(convert::duration),
    }
}
