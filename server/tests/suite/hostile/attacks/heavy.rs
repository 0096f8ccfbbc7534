//! Attacks by heavy jobs: long labels, a long history, deadlines that move, and claims that many jobs could wake.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jobledger_client::{
    NewJob, RawClient, Report,
    proto::{
        BatchUpdateJobStatusRequest, ClaimJobsRequest, HeartbeatRequest, RetryPolicy, StreamJobEventsRequest,
        UpdateJobStatusRequest,
    },
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use prost::Message as _;
use tokio::time::sleep;

use super::{KEPT, Tenant, batch, client, created, reads::beat, seconds};

/// How many jobs with long labels fit into one request.
const LONG_JOBS: usize = 200;

/// 16 KB of labels, the most that a job may have.
fn long_labels() -> impl Iterator<Item = (String, String)> {
    (0..32).map(|n| (format!("{}{n:02}", "🦀".repeat(61)), "🦀".repeat(63)))
}

fn long_job(job_type: &str) -> NewJob {
    long_labels().fold(NewJob::new(job_type), |job, (key, value)| job.label(key, value))
}

impl Tenant {
    /// Jobs with long labels become due all the time. A sweep handles up to 1,000 of them at once.
    pub(super) async fn long_and_due(self: Arc<Self>) {
        self.flood(4, async |mut service: RawClient, _| {
            let soon = SystemClock.now() + Duration::from_secs(2);
            service.batch_create_jobs(batch((0..LONG_JOBS).map(|_| long_job("due").scheduled_at(soon)))).await.map(drop)
        })
        .await;
    }

    /// Jobs with long labels are claimed by hundreds, and are ready again when their leases of 1 s expire.
    pub(super) async fn long_and_claimed(self: Arc<Self>) {
        let client = client(&self.address, &self.token);
        // The shortest backoff, without growth.
        let wait = Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 });
        let policy = RetryPolicy { initial_backoff: wait, multiplier: Some(1.0), max_backoff: wait };
        for _ in 0..15 {
            let jobs = (0..LONG_JOBS).map(|_| long_job("long").max_attempts(100).max_lost_attempts(100));
            let _ = client.create_all(jobs.map(|job| job.retry_policy(policy))).await;
        }
        self.flood(64, async |mut service: RawClient, _| {
            let (worker_id, types) = ("w".to_owned(), vec!["long".to_owned()]);
            let lease_duration = seconds(1);
            let claim = ClaimJobsRequest { worker_id, types, max_jobs: 100, lease_duration, ..Default::default() };
            service.claim_jobs(claim).await.map(drop)
        })
        .await;
    }

    /// 6,000 claims wait, each for 99 types of its own and one common type, of which jobs are created all the time.
    pub(super) async fn woken_claims(self: Arc<Self>) {
        let claims = self.by_lane(6, move |tenant: Arc<Self>, lane| async move {
            let mut connection = tenant.windowless(lane).await;
            for n in 0..1_000 {
                let own = (0..99).map(|own| format!("none {lane} {n} {own}"));
                let types = own.chain(["wanted".to_owned()]).collect();
                let claim = ClaimJobsRequest {
                    worker_id: format!("w{lane} {n}"),
                    types,
                    wait: seconds(60),
                    lease_duration: seconds(3_600),
                    ..Default::default()
                };
                connection.call(&tenant, "ClaimJobs", &claim.encode_to_vec()).await?;
            }
            connection.stays(KEPT).await;
            Ok(())
        });
        let wanted = self.flood(2, async |mut service: RawClient, _| {
            service.batch_create_jobs(batch([NewJob::new("wanted")])).await?;
            sleep(Duration::from_millis(20)).await;
            Ok(())
        });
        let others = self.flood(16, async |mut service: RawClient, _| {
            service.batch_create_jobs(batch([NewJob::new("t0")])).await.map(drop)
        });
        tokio::join!(claims, wanted, others);
    }

    /// A job with 50,000 events, each with the most labels, is read from its beginning for a label that it lacks.
    pub(super) async fn long_history(self: Arc<Self>) {
        let labels = || (0..32).map(|n| (format!("l{n}"), "v".to_owned()));
        let job = labels().fold(NewJob::new("history"), |job, (key, value)| job.label(key, value));
        let id = self.reported(&job, 50).await;
        let labels: BTreeMap<_, _> = labels().skip(1).chain([("none".to_owned(), "none".to_owned())]).collect();
        self.flood(16, move |mut service: RawClient, _| {
            let (job_id, labels, after_seq) = (id.clone(), labels.clone(), Some(0));
            let request =
                StreamJobEventsRequest { job_id, labels, history_only: true, after_seq, ..Default::default() };
            async move {
                let mut stream = service.stream_job_events(request).await?.into_inner();
                while stream.message().await?.is_some() {}
                Ok(())
            }
        })
        .await;
    }

    /// Small reports, each of which writes an event with the job's long labels.
    pub(super) async fn long_and_reported(self: Arc<Self>) {
        self.reported(&long_job("reported"), u32::MAX).await;
    }

    /// Creates a job and reports on it, this many thousand times. Returns its id.
    async fn reported(&self, job: &NewJob, thousands: u32) -> String {
        let client = client(&self.address, &self.token);
        let id = created(&client, job).await;
        let _ = client.update(Report::start(&id)).await;
        let mut service = client.raw();
        for n in 0..thousands {
            let update = |m| UpdateJobStatusRequest::from(Report::progress(&id).message(format!("{n} {m}")));
            let updates = (0..1_000).map(update).collect();
            let _ = service.batch_update_job_status(BatchUpdateJobStatusRequest { updates }).await;
        }
        id
    }

    /// 5,000 leases of 5 s are extended all the time.
    pub(super) async fn extended_leases(self: Arc<Self>) {
        let leases: Arc<[_]> = self.leases(5_000, 5).await.into();
        self.flood(10, move |mut service: RawClient, n| {
            let leases = Arc::clone(&leases);
            async move {
                let of_one = leases.chunks(1_000).nth(n as usize % 5).unwrap_or_default();
                service.heartbeat(HeartbeatRequest { extend_by: seconds(60), ..beat(of_one) }).await.map(drop)
            }
        })
        .await;
    }
}
