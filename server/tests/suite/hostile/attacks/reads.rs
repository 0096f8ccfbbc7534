//! Attacks by reading: lists, statistics, streams, and answers that are not taken.

use std::{iter, sync::Arc, time::Duration};

use jobledger_client::{
    Follow, NewJob, RawClient,
    proto::{
        ClaimJobsRequest, CreateJobRequest, GetJobRequest, GetStatisticsRequest, HeartbeatRequest, JobView, Lease,
        LeaseHeartbeat, ListJobsRequest, StreamJobEventsRequest,
    },
};
use prost::Message as _;
use tokio::{task::JoinSet, time::sleep};

use super::{KEPT, Tenant, batch, client, created, long_types, seconds};
use crate::{support::raw::RST_STREAM, support::seeded::Seeded};

/// A heartbeat of all these leases.
pub(super) fn beat(leases: &[Lease]) -> HeartbeatRequest {
    let beat = |lease: &Lease| LeaseHeartbeat { lease_token: lease.lease_token.clone(), ..Default::default() };
    HeartbeatRequest { worker_id: "w".to_owned(), leases: leases.iter().map(beat).collect(), extend_by: None }
}

impl Tenant {
    pub(super) async fn untaken_streams(self: Arc<Self>) {
        self.over_and_over(4, async |tenant: Arc<Self>| {
            let mut raw = tenant.raw(false).await;
            let request = StreamJobEventsRequest { after_seq: Some(0), ..Default::default() }.encode_to_vec();
            for _ in 0..40 {
                tenant.call(&mut raw, "StreamJobEvents", &request).await?;
            }
            while raw.drain(Duration::from_secs(1)).await {}
            Ok(())
        })
        .await;
    }

    pub(super) async fn lists(self: Arc<Self>) {
        self.flood(300, async |mut service: RawClient, _| {
            let request = ListJobsRequest { page_size: 1_000, view: JobView::Full.into(), ..Default::default() };
            service.list_jobs(request).await.map(drop)
        })
        .await;
    }

    pub(super) async fn reset_lists(self: Arc<Self>) {
        self.over_and_over(4, async |tenant: Arc<Self>| {
            let request = ListJobsRequest { page_size: 1_000, view: JobView::Full.into(), ..Default::default() };
            let (request, mut raw) = (request.encode_to_vec(), tenant.raw(true).await);
            loop {
                let stream = tenant.call(&mut raw, "ListJobs", &request).await?;
                sleep(Duration::from_millis(1)).await;
                raw.send(RST_STREAM, 0, stream, &8_u32.to_be_bytes()).await?;
                if !raw.drain(Duration::ZERO).await {
                    return Ok(());
                }
            }
        })
        .await;
    }

    pub(super) async fn statistics(self: Arc<Self>) {
        self.flood(100, async |mut service: RawClient, _| {
            let request = GetStatisticsRequest { window: seconds(7 * 86_400), series: true, ..Default::default() };
            service.get_statistics(request).await.map(drop)
        })
        .await;
    }

    pub(super) async fn matching_nothing(self: Arc<Self>) {
        let mut streams = JoinSet::new();
        for lane in 0..2 {
            let client = client(&self.address, &self.token);
            for n in 0..500 {
                let mut service = client.raw();
                streams.spawn(async move {
                    let types = (0..100).map(|type_| format!("none {lane} {n} {type_}"));
                    loop {
                        let request = StreamJobEventsRequest::from(Follow::org().types(types.clone()));
                        if let Ok(stream) = service.stream_job_events(request).await {
                            let mut stream = stream.into_inner();
                            while let Ok(Some(_)) = stream.message().await {}
                        }
                        sleep(Duration::from_millis(50)).await;
                    }
                });
            }
        }
        let creates = self.flood(16, async |mut service: RawClient, _| {
            service.create_job(CreateJobRequest::from(NewJob::new("t"))).await.map(drop)
        });
        tokio::join!(streams.join_all(), creates);
    }

    pub(super) async fn past(self: Arc<Self>) {
        self.flood(50, async |mut service: RawClient, _| {
            let request = StreamJobEventsRequest::from(Follow::org().after(0).history_only());
            let mut stream = service.stream_job_events(request).await?.into_inner();
            while stream.message().await?.is_some() {}
            Ok(())
        })
        .await;
    }

    pub(super) async fn snapshots(self: Arc<Self>) {
        self.flood(50, async |mut service: RawClient, _| {
            let request = StreamJobEventsRequest::from(Follow::org().snapshot().history_only());
            let mut stream = service.stream_job_events(request).await?.into_inner();
            while stream.message().await?.is_some() {}
            Ok(())
        })
        .await;
    }

    pub(super) async fn labels(self: Arc<Self>) {
        self.flood(100, async |mut service: RawClient, n| {
            let labels = [("n".to_owned(), (n % 500).to_string()), ("none".to_owned(), "none".to_owned())].into();
            service.list_jobs(ListJobsRequest { labels, page_size: 1_000, ..Default::default() }).await.map(drop)
        })
        .await;
    }

    pub(super) async fn untaken_jobs(self: Arc<Self>) {
        let client = client(&self.address, &self.token);
        let large = NewJob::new("large").payload(&"x".repeat(1_000_000)).unwrap();
        let Ok(created) = client.create(large).await else { return };
        let request = GetJobRequest { job_id: created.job.id, ..Default::default() }.encode_to_vec();
        self.over_and_over(16, move |tenant: Arc<Self>| {
            let request = request.clone();
            async move {
                let mut raw = tenant.raw(false).await;
                for _ in 0..100 {
                    tenant.call(&mut raw, "GetJob", &request).await?;
                }
                while raw.drain(Duration::from_secs(1)).await {}
                Ok(())
            }
        })
        .await;
    }

    /// 6,000 streams, each with a filter of 35 KB.
    pub(super) async fn long_streams(self: Arc<Self>, seed: u64) {
        self.by_lane(6, move |tenant: Arc<Self>, lane| async move {
            let mut random = Seeded::new(seed ^ u64::from(lane));
            let mut connection = tenant.windowless(lane).await;
            for _ in 0..1_000 {
                let request = StreamJobEventsRequest { types: long_types(&mut random), ..Default::default() };
                connection.call(&tenant, "StreamJobEvents", &request.encode_to_vec()).await?;
            }
            connection.stays(KEPT).await;
            Ok(())
        })
        .await;
    }

    /// 6,000 live streams whose filters are tried on every new event and match none.
    pub(super) async fn live_streams(self: Arc<Self>) {
        let streams = self.by_lane(6, move |tenant: Arc<Self>, lane| async move {
            let mut connection = tenant.windowless(lane).await;
            for n in 0..1_000 {
                // These types have jobs, from `prepare`.
                let others = (0..20).map(|other| format!("type 0 {other}"));
                let types = iter::once(format!("none {lane} {n}")).chain(others).collect();
                let request = StreamJobEventsRequest { types, ..Default::default() };
                connection.call(&tenant, "StreamJobEvents", &request.encode_to_vec()).await?;
            }
            connection.stays(KEPT).await;
            Ok(())
        });
        tokio::join!(streams, Arc::clone(&self).batches());
    }

    /// Each connection leaves 300 KB or 900 KB of answers untaken: much together, but none much more than the others.
    pub(super) async fn held_answers(self: Arc<Self>) {
        let client = client(&self.address, &self.token);
        let job = NewJob::new("held").payload(&"x".repeat(300_000)).unwrap();
        let mut gets = Vec::new();
        for _ in 0..10 {
            gets.push(GetJobRequest { job_id: created(&client, &job).await, ..Default::default() }.encode_to_vec());
        }
        let (types, view) = (vec!["held".to_owned()], JobView::Full.into());
        let list = ListJobsRequest { types, view, page_size: 2, ..Default::default() }.encode_to_vec();
        self.by_lane(300, move |tenant: Arc<Self>, lane| {
            let (get, list) = (gets[lane as usize % gets.len()].clone(), list.clone());
            async move {
                let mut connection = tenant.windowless(lane).await;
                connection.call(&tenant, "GetJob", &get).await?;
                if lane.is_multiple_of(2) {
                    connection.call(&tenant, "ListJobs", &list).await?;
                }
                connection.stays(KEPT).await;
                Ok(())
            }
        })
        .await;
    }

    /// As many streams and claims as an org may have, pages of the past, answers and dialogues, all of them unread.
    pub(super) async fn all_held(self: Arc<Self>) {
        let waiting = self.by_lane(14, move |tenant: Arc<Self>, lane| async move {
            let mut connection = tenant.windowless(lane).await;
            for n in 0..1_000 {
                // This attack is about what stays in memory, not about how fast it comes.
                sleep(Duration::from_millis(7)).await;
                let (types, worker_id) = (vec![format!("none {n}")], format!("w{lane} {n}"));
                if lane.is_multiple_of(2) {
                    let request = StreamJobEventsRequest { types, ..Default::default() };
                    connection.call(&tenant, "StreamJobEvents", &request.encode_to_vec()).await?;
                } else {
                    let claim = ClaimJobsRequest { worker_id, types, wait: seconds(60), ..Default::default() };
                    connection.call(&tenant, "ClaimJobs", &claim.encode_to_vec()).await?;
                }
            }
            connection.stays(KEPT).await;
            Ok(())
        });
        tokio::join!(
            waiting,
            Arc::clone(&self).held_answers(),
            Arc::clone(&self).untaken_streams(),
            Arc::clone(&self).dialogues(),
        );
    }

    /// Reads 64 running jobs whose leases were extended, while the leases of 900 others are extended all the time.
    pub(super) async fn running_jobs(self: Arc<Self>) {
        let leases = self.leases(964, 3_600).await;
        let (some, others) = leases.split_at(64);
        let mut service = client(&self.address, &self.token).raw();
        for _ in 0..10 {
            let _ = service.heartbeat(beat(some)).await;
        }
        let beats = beat(others);
        let ids: Arc<[_]> = some.iter().map(|lease| lease.job.clone().unwrap_or_default().id).collect();
        let gets = self.flood(64, move |mut service: RawClient, n| {
            let get = GetJobRequest { job_id: ids[n as usize % ids.len()].clone(), ..Default::default() };
            async move { service.get_job(get).await.map(drop) }
        });
        let heartbeats = self.flood(2, move |mut service: RawClient, _| {
            let beats = beats.clone();
            async move { service.heartbeat(beats).await.map(drop) }
        });
        tokio::join!(gets, heartbeats);
    }

    /// Creates jobs and claims them: this many leases of this many seconds.
    pub(super) async fn leases(&self, number: usize, duration: i64) -> Vec<Lease> {
        let mut service = client(&self.address, &self.token).raw();
        let claim = ClaimJobsRequest {
            worker_id: "w".to_owned(),
            types: vec!["runs".to_owned()],
            max_jobs: 100,
            lease_duration: seconds(duration),
            ..Default::default()
        };
        let mut leases = Vec::new();
        while leases.len() < number {
            let missing = batch((leases.len()..number).map(|_| NewJob::new("runs")));
            let _ = service.batch_create_jobs(missing).await;
            while let Ok(claimed) = service.claim_jobs(claim.clone()).await {
                let claimed = claimed.into_inner().leases;
                if claimed.is_empty() {
                    break;
                }
                leases.extend(claimed);
            }
            sleep(Duration::from_millis(10)).await;
        }
        leases.truncate(number);
        leases
    }

    /// Streams that filter by 32 labels, of which each job has all but one.
    pub(super) async fn labeled_streams(self: Arc<Self>) {
        let labels = || (0..31).map(|n| (format!("l{n}"), "v".to_owned()));
        let streams = self.by_lane(3, move |tenant: Arc<Self>, lane| async move {
            let mut connection = tenant.windowless(lane).await;
            let labels = labels().chain([("z".to_owned(), "v".to_owned())]).collect();
            let request = StreamJobEventsRequest { labels, ..Default::default() }.encode_to_vec();
            for _ in 0..800 {
                connection.call(&tenant, "StreamJobEvents", &request).await?;
            }
            connection.stays(KEPT).await;
            Ok(())
        });
        let jobs = self.flood(1, move |mut service: RawClient, _| async move {
            let job = || labels().fold(NewJob::new("labeled"), |job, (key, value)| job.label(key, value));
            service.batch_create_jobs(batch((0..200).map(|_| job()))).await?;
            sleep(Duration::from_secs(1)).await;
            Ok(())
        });
        tokio::join!(streams, jobs);
    }
}
