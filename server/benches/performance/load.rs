//! The load generator: the client crate's generated stubs, with a number of calls in flight or at a fixed rate.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jobledger_client::{Client, RawClient, proto as pb};
use tokio::task::JoinSet;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use uuid::Uuid;

use crate::common::{CONNECTIONS, Result, Server};

/// The result of a load.
#[derive(Debug, Clone, Default)]
pub(crate) struct Measured {
    /// Calls per second.
    pub(crate) rate: f64,
    /// Durations of the calls in µs, ascending.
    took: Vec<u32>,
}

impl Measured {
    fn new(mut took: Vec<u32>, time: Duration) -> Self {
        took.sort_unstable();
        Self { rate: took.len() as f64 / time.as_secs_f64(), took }
    }

    pub(crate) fn calls(&self) -> f64 {
        self.took.len() as f64
    }

    /// A quantile of the durations in ms; `part` is 0.99 for the p99.
    pub(crate) fn at(&self, part: f64) -> f64 {
        let last = self.took.len().saturating_sub(1);
        let place = ((self.took.len() as f64 * part) as usize).min(last);
        f64::from(self.took.get(place).copied().unwrap_or_default()) / 1e3
    }
}

/// Clients of one org on a few connections.
#[derive(Clone)]
pub(crate) struct Load {
    clients: Arc<[RawClient]>,
}

impl Load {
    pub(crate) fn new(endpoint: &str, org: Uuid) -> Result<Self> {
        let client = |_| Ok(Client::builder(endpoint).org(org).build()?.raw());
        Ok(Self { clients: (0..CONNECTIONS).map(client).collect::<Result<_>>()? })
    }

    /// Clients without an org, for calls that name their orgs themselves.
    pub(crate) fn without_org(server: &Server) -> Result<Self> {
        let client = |_| Ok(Client::builder(&*server.endpoint).build()?.raw());
        Ok(Self { clients: (0..CONNECTIONS).map(client).collect::<Result<_>>()? })
    }

    /// Clients of the default org, the nil UUID.
    pub(crate) fn on(server: &Server) -> Result<Self> {
        Self::new(&server.endpoint, Uuid::nil())
    }

    pub(crate) fn client(&self, n: usize) -> RawClient {
        self.clients[n % self.clients.len()].clone()
    }

    /// Runs callers that each wait for their answer before the next call. `call` gets the caller and its call number.
    pub(crate) async fn calls<F>(
        &self,
        callers: usize,
        time: Duration,
        call: impl Fn(RawClient, usize, u64) -> F + Clone + Send + 'static,
    ) -> Result<Measured>
    where
        F: Future<Output = Result<()>> + Send,
    {
        let started = Instant::now();
        let mut running = JoinSet::new();
        for caller in 0..callers {
            let (client, call) = (self.client(caller), call.clone());
            running.spawn(async move {
                let mut took = Vec::new();
                let mut began = started.elapsed();
                while began < time {
                    call(client.clone(), caller, took.len() as u64).await?;
                    let ended = started.elapsed();
                    took.push((ended - began).as_micros() as u32);
                    began = ended;
                }
                Result::Ok(took)
            });
        }
        let mut took = Vec::new();
        while let Some(ended) = running.join_next().await {
            took.extend(ended??);
        }
        Ok(Measured::new(took, started.elapsed()))
    }

    /// Starts `rate` calls per second without waiting for answers. A call's duration counts from when it was due.
    pub(crate) async fn offered<F>(
        &self,
        rate: u32,
        time: Duration,
        call: impl Fn(RawClient, usize, u64) -> F + Clone + Send + 'static,
    ) -> Result<Measured>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let started = Instant::now();
        let mut running = JoinSet::new();
        let calls = u64::from(rate) * time.as_millis() as u64 / 1_000;
        for n in 0..calls {
            let due = started + Duration::from_secs_f64(n as f64 / f64::from(rate));
            if let Some(early) = due.checked_duration_since(Instant::now()) {
                tokio::time::sleep(early).await;
            }
            let call = call(self.client(n as usize), 0, n);
            running.spawn(async move {
                call.await?;
                Result::Ok(due.elapsed().as_micros() as u32)
            });
        }
        let mut took = Vec::new();
        while let Some(ended) = running.join_next().await {
            took.push(ended??);
        }
        Ok(Measured::new(took, started.elapsed()))
    }
}

/// The empty RPC, a health check: the limit of the transport.
pub(crate) async fn empty(server: &Server, callers: usize, time: Duration) -> Result<Measured> {
    let channels: Arc<[_]> = server.channels.clone().into();
    let load = Load::on(server)?;
    load.calls(callers, time, move |_, caller, _| {
        let mut health = HealthClient::new(channels[caller % CONNECTIONS].clone());
        async move {
            health.check(HealthCheckRequest { service: String::new() }).await?;
            Ok(())
        }
    })
    .await
}

pub(crate) async fn create_one(mut client: RawClient, _: usize, _: u64) -> Result<()> {
    client.create_job(pb::CreateJobRequest { r#type: "bench".to_owned(), ..Default::default() }).await?;
    Ok(())
}

pub(crate) async fn create(load: &Load, callers: usize, time: Duration) -> Result<Measured> {
    load.calls(callers, time, create_one).await
}

/// BatchCreateJobs of `size` jobs. Returns jobs per second.
pub(crate) async fn batch_create(load: &Load, callers: usize, size: usize, time: Duration) -> Result<f64> {
    let measured = load.calls(callers, time, move |mut client, _, _| async move {
        let job = pb::CreateJobRequest { r#type: "bench".to_owned(), ..Default::default() };
        client.batch_create_jobs(pb::BatchCreateJobsRequest { requests: vec![job; size] }).await?;
        Ok(())
    });
    Ok(measured.await?.rate * size as f64)
}

/// Creates jobs and starts them without a lease. Returns their ids.
pub(crate) async fn running_jobs(load: &Load, n: usize) -> Result<Arc<[String]>> {
    let mut client = load.client(0);
    let job = pb::CreateJobRequest { r#type: "update".to_owned(), ..Default::default() };
    let mut ids = Vec::with_capacity(n);
    while ids.len() < n {
        let requests = vec![job.clone(); 500.min(n - ids.len())];
        let created = client.batch_create_jobs(pb::BatchCreateJobsRequest { requests }).await?.into_inner();
        let created: Vec<_> = created.results.into_iter().filter_map(|result| Some(result.job?.id)).collect();
        let update = |id: &String| pb::UpdateJobStatusRequest {
            job_id: id.clone(),
            status: Some(pb::JobStatus::Running.into()),
            ..Default::default()
        };
        let updates = created.iter().map(update).collect();
        client.batch_update_job_status(pb::BatchUpdateJobStatusRequest { updates }).await?;
        ids.extend(created);
    }
    Ok(ids.into())
}

/// UpdateJobStatus with a progress. The callers are spread over the jobs.
pub(crate) async fn update(load: &Load, jobs: &Arc<[String]>, callers: usize, time: Duration) -> Result<Measured> {
    let jobs = Arc::clone(jobs);
    load.calls(callers, time, move |mut client, caller, n| {
        let job_id = jobs[caller % jobs.len()].clone();
        let progress = Some(((caller as u64 + n) % 100) as i32);
        async move {
            client.update_job_status(pb::UpdateJobStatusRequest { job_id, progress, ..Default::default() }).await?;
            Ok(())
        }
    })
    .await
}

pub(crate) async fn get(load: &Load, jobs: &Arc<[String]>, callers: usize, time: Duration) -> Result<Measured> {
    let jobs = Arc::clone(jobs);
    load.calls(callers, time, move |mut client, caller, n| {
        let job_id = jobs[(caller * 31 + n as usize) % jobs.len()].clone();
        async move {
            client.get_job(pb::GetJobRequest { job_id, ..Default::default() }).await?;
            Ok(())
        }
    })
    .await
}

/// ClaimJobs of ten jobs. Returns jobs per second.
pub(crate) async fn claim(load: &Load, callers: usize, time: Duration) -> Result<f64> {
    let measured = load.calls(callers, time, |mut client, _, _| async move {
        let claim = pb::ClaimJobsRequest {
            worker_id: "w".to_owned(),
            types: vec!["waiting".to_owned()],
            max_jobs: 10,
            lease_duration: prost_types::Duration::try_from(Duration::from_secs(3_600)).ok(),
            ..Default::default()
        };
        match client.claim_jobs(claim).await?.into_inner().leases.len() {
            10 => Ok(()),
            n => Err(format!("{n} jobs claimed: those that wait are used up").into()),
        }
    });
    Ok(measured.await?.rate * 10.0)
}

pub(crate) async fn statistics(load: &Load, callers: usize, time: Duration) -> Result<Measured> {
    load.calls(callers, time, |mut client, _, _| async move {
        client.get_statistics(pb::GetStatisticsRequest::default()).await?;
        Ok(())
    })
    .await
}
