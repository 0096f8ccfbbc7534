//! Two generators of the same load, because a server's apparent speed depends on its clients. One is this process: the
//! client crate on a few connections, like a service with many callers. The other is a process of its own: tonic alone
//! with a connection per caller, like many small clients, where no two calls share a system call.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use jobledger_client::{
    RawClient,
    proto::{self as pb, job_service_client::JobServiceClient},
};
use prost_types::{Struct, Value, value::Kind};
use tokio::task::JoinSet;
use tonic::{
    Request,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use uuid::Uuid;

use crate::{
    common::{CONNECTIONS, Result, Server},
    load::Load,
    spent::of_process,
};

/// Calls in flight.
const CALLERS: usize = 256;
/// First argument of a process that is the second generator.
const GENERATE: &str = "generate";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Generator {
    /// The client crate on a few connections, in this process.
    Client,
    /// tonic alone with a connection per caller, in a process of its own.
    Tonic,
}

impl Generator {
    pub(crate) const ALL: [Self; 2] = [Self::Client, Self::Tonic];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Tonic => "tonic",
        }
    }
}

/// The calls that each caller repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// An empty RPC: a health check.
    Empty,
    /// CreateJob without a payload.
    Create,
    /// CreateJob with a payload of about 150 bytes.
    Carry,
    /// CreateJob, a ClaimJobs of one job, and UpdateJobStatus of that job to SUCCEEDED.
    Life,
}

impl Work {
    const ALL: [Self; 4] = [Self::Empty, Self::Create, Self::Carry, Self::Life];

    const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Create => "create",
            Self::Carry => "carry",
            Self::Life => "life",
        }
    }
}

/// The result of a generator.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Done {
    pub(crate) calls: u64,
    pub(crate) time: Duration,
    /// Processor time of the generator.
    pub(crate) cpu: Duration,
}

fn asked<T>(message: T, org: Uuid) -> Result<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-org-id", MetadataValue::try_from(org.to_string())?);
    Ok(request)
}

/// A typical payload of a shop's jobs.
fn payload() -> Value {
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
    let fields = [
        ("order", text("7d0f3c52-9d4e-4a35-9a53-1f0e6c1c2f77")),
        ("customer", text("c-204177")),
        ("template", text("order-shipped")),
        ("locale", text("de-CH")),
        ("attempts", Value { kind: Some(Kind::NumberValue(3.0)) }),
    ];
    let fields = fields.map(|(name, value)| (name.to_owned(), value)).into();
    Value { kind: Some(Kind::StructValue(Struct { fields })) }
}

/// Defines a function that runs one create or one life, for one of the two kinds of client.
macro_rules! work {
    ($name:ident, $client:ty) => {
        async fn $name(mut client: $client, work: Work, org: Uuid) -> Result<()> {
            let payload = (work == Work::Carry).then(payload);
            let job = pb::CreateJobRequest { r#type: "bench".to_owned(), payload, ..Default::default() };
            client.create_job(asked(job, org)?).await?;
            if work != Work::Life {
                return Ok(());
            }
            let claim = pb::ClaimJobsRequest {
                worker_id: "w".to_owned(),
                types: vec!["bench".to_owned()],
                max_jobs: 1,
                ..Default::default()
            };
            let leases = client.claim_jobs(asked(claim, org)?).await?.into_inner().leases;
            let lease = leases.into_iter().next().ok_or("there is a job for each that claims one")?;
            let report = pb::UpdateJobStatusRequest {
                job_id: lease.job.unwrap_or_default().id,
                status: Some(pb::JobStatus::Succeeded.into()),
                lease_token: lease.lease_token,
                ..Default::default()
            };
            client.update_job_status(asked(report, org)?).await?;
            Ok(())
        }
    };
}

work!(by_client, RawClient);
work!(by_tonic, JobServiceClient<Channel>);

async fn empty(channel: Channel) -> Result<()> {
    HealthClient::new(channel).check(HealthCheckRequest { service: String::new() }).await?;
    Ok(())
}

/// The org of a caller's nth call. The callers together go through all orgs.
fn org(caller: usize, call: u64, orgs: usize) -> Uuid {
    Uuid::from_u128(0x1000 + ((caller as u64 + call * CALLERS as u64) % orgs as u64) as u128)
}

/// Runs a generator's callers on `orgs` orgs for some time.
pub(crate) async fn generate(
    generator: Generator,
    server: &Server,
    work: Work,
    orgs: usize,
    time: Duration,
) -> Result<Done> {
    match generator {
        Generator::Client => {
            let load = Load::without_org(server)?;
            let channels = server.channels.clone();
            let before = of_process("self")?;
            let (calls, time) = run(time, move |caller, n| {
                let (client, channel) = (load.client(caller), channels[caller % CONNECTIONS].clone());
                async move {
                    if work == Work::Empty {
                        empty(channel).await
                    } else {
                        by_client(client, work, org(caller, n, orgs)).await
                    }
                }
            })
            .await?;
            Ok(Done { calls, time, cpu: of_process("self")? - before })
        }
        Generator::Tonic => {
            let mut process = Command::new(std::env::current_exe()?);
            process.args([GENERATE, &server.endpoint, work.name(), &orgs.to_string(), &time.as_millis().to_string()]);
            let output = process.stderr(Stdio::inherit()).output()?;
            let text = String::from_utf8(output.stdout)?;
            let numbers = text.split_whitespace().map(str::parse).collect::<std::result::Result<Vec<u64>, _>>()?;
            let [calls, time, cpu] = numbers[..] else { return Err("the generator failed".into()) };
            Ok(Done { calls, time: Duration::from_micros(time), cpu: Duration::from_micros(cpu) })
        }
    }
}

/// Runs the second generator if this process was started as one; `None` otherwise.
pub(crate) async fn as_asked() -> Option<Result<()>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [first, endpoint, work, orgs, millis] = &arguments[..] else { return None };
    if first != GENERATE {
        return None;
    }
    Some(be_asked(endpoint, work, orgs, millis).await)
}

async fn be_asked(endpoint: &str, work: &str, orgs: &str, millis: &str) -> Result<()> {
    let work = Work::ALL.into_iter().find(|known| known.name() == work).ok_or("no such work")?;
    let (orgs, time) = (orgs.parse()?, Duration::from_millis(millis.parse()?));
    let endpoint = Endpoint::from_shared(endpoint.to_owned())?.tcp_nodelay(true);
    let mut channels = Vec::with_capacity(CALLERS);
    for _ in 0..CALLERS {
        channels.push(endpoint.connect().await?);
    }
    let before = of_process("self")?;
    let (calls, took) = run(time, move |caller, n| {
        let channel = channels[caller].clone();
        async move {
            match work {
                Work::Empty => empty(channel).await,
                Work::Create | Work::Carry | Work::Life => {
                    by_tonic(JobServiceClient::new(channel), work, org(caller, n, orgs)).await
                }
            }
        }
    })
    .await?;
    println!("{calls} {} {}", took.as_micros(), (of_process("self")? - before).as_micros());
    Ok(())
}

/// Runs callers that each wait for their answer before the next call. Returns the number of calls and their time.
async fn run<F>(time: Duration, call: impl Fn(usize, u64) -> F + Clone + Send + 'static) -> Result<(u64, Duration)>
where
    F: Future<Output = Result<()>> + Send,
{
    let started = Instant::now();
    let mut running = JoinSet::new();
    for caller in 0..CALLERS {
        let call = call.clone();
        running.spawn(async move {
            let mut calls = 0;
            while started.elapsed() < time {
                call(caller, calls).await?;
                calls += 1;
            }
            Result::Ok(calls)
        });
    }
    let mut calls = 0;
    while let Some(ended) = running.join_next().await {
        calls += ended??;
    }
    Ok((calls, started.elapsed()))
}
