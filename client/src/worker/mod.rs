//! Workers: claim jobs, run a handler on each, and see to it that the ledger hears what became of them.
//!
//! ```no_run
//! use jobledger_client::{Client, worker::{Context, Error, Worker}};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Deserialize)]
//! struct Thumbnail {
//!     path: String,
//! }
//!
//! #[derive(Serialize)]
//! struct Scaled {
//!     bytes: u64,
//! }
//!
//! async fn scale(context: Context, job: Thumbnail) -> Result<Scaled, Error> {
//!     context.stage("reading");
//!     let picture = tokio::fs::read(&job.path).await?; // any error: tried again while the job's budget lasts
//!     context.progress(50);
//!     if picture.is_empty() {
//!         return Err(Error::permanent("the picture is empty").code("EMPTY"));
//!     }
//!     Ok(Scaled { bytes: picture.len() as u64 })
//! }
//!
//! # mod tokio { pub mod fs { pub async fn read(_: &str) -> std::io::Result<Vec<u8>> { Ok(vec![]) } } }
//! # async fn example(shutdown: impl Future<Output = ()>) -> Result<(), jobledger_client::Error> {
//! let client = Client::new("http://127.0.0.1:50051")?;
//! Worker::builder(client).handle("thumbnail", scale).concurrency(8).build()?.run(shutdown).await
//! # }
//! ```
//!
//! # What a handler can rely on, and what not
//!
//! Of all attempts at a job the ledger accepts the outcome of one at most, and while a worker holds the lease nobody else is given the
//! job. But a handler may run more than once for one job: a worker may die after the work and before its report. What it does to
//! the world outside should bear being done twice: write to a place named by the job's id, or use the id as the other side's idempotency key.
//!
//! # How a handler ends
//!
//! | the handler | the job |
//! |---|---|
//! | returns `Ok` | succeeds, with the value as its result |
//! | returns an [`Error`] | fails, and is retried while its budget lasts; or as the error says |
//! | panics | fails with the code [`PANIC`], and is retried |
//! | can't read the payload | fails for good with [`INVALID_PAYLOAD`] |
//! | returns more than 1 MiB encoded, or what JSON or the service don't take | fails for good with [`INVALID_RESULT`] |
//! | is asked to stop ([`Context::canceled`]) because the job was canceled | is canceled, whatever it returns; after [`WorkerBuilder::cancel_grace`] it is dropped, and the job canceled |
//! | has lost the lease (the ledger took the worker for dead, or the run time-out is over) | belongs to others: what it returns is discarded; after the same time it is dropped |
//! | dies with its process | is queued again once the lease expires: the attempt is lost, which is no failure up to `max_lost_attempts` |
//! | never returns | goes on as long as its worker sends heartbeats, if it has no run time-out |
//! | is still running when a stop's grace is over | goes back to the queue, and none of its budget is used |
//!
//! A handler is dropped where it awaits; one that never does, such as a long computation, goes on until it does, but nobody
//! listens to it any more: use `tokio::task::spawn_blocking` and look at [`Context::is_canceled`]. Heartbeats have a thread of their
//! own, which no handler can hold up.

mod attempt;
mod context;
mod error;
mod handler;
mod keeper;
mod reporter;
mod run;

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use self::handler::Handler;
pub use self::{
    context::Context,
    error::{Error, HANDLER_FAILED, INVALID_PAYLOAD, INVALID_RESULT, PANIC},
};
use crate::Client;

/// Claims jobs and runs handlers on them. See the [module](self).
#[must_use]
pub struct Worker {
    client: Client,
    options: Options,
    handlers: Arc<BTreeMap<String, Handler>>,
}

/// How a worker works.
#[derive(Debug, Clone)]
struct Options {
    worker_id: String,
    concurrency: usize,
    lease: Duration,
    wait: Duration,
    progress_interval: Duration,
    cancel_grace: Duration,
    shutdown_grace: Duration,
}

/// Longer, a job's stage and progress would be of no use to anyone.
const LONGEST_PROGRESS_INTERVAL: Duration = Duration::from_secs(86_400);

/// A worker in the making.
#[must_use]
pub struct WorkerBuilder {
    client: Client,
    options: Options,
    handlers: BTreeMap<String, Handler>,
    /// A type that two handlers were given for.
    twice: Option<String>,
}

impl Worker {
    /// A worker for the jobs of the client's org.
    pub fn builder(client: Client) -> WorkerBuilder {
        let id = Uuid::new_v4().simple().to_string();
        let options = Options {
            worker_id: format!("{}-{}", std::process::id(), &id[..8]),
            concurrency: 10,
            lease: Duration::from_secs(30),
            wait: Duration::from_secs(20),
            progress_interval: Duration::from_millis(250),
            cancel_grace: Duration::from_secs(10),
            shutdown_grace: Duration::from_secs(30),
        };
        WorkerBuilder { client, options, handlers: BTreeMap::new(), twice: None }
    }

    /// Works until `shutdown` is done, [`shutdown_signal`](crate::shutdown_signal) for instance; then claims no more, lets the handlers
    /// that are running finish within the grace period, and gives the jobs of the others back. A server that is away is waited for, for
    /// as long as it takes. Dropped, it asks handlers to stop and drops them where they await; their leases end.
    ///
    /// # Errors
    ///
    /// If the service refuses its claims, for instance because of a type that can't be one; or, at the first, the caller
    /// ([`Error::Unauthenticated`](crate::Error::Unauthenticated), [`Error::PermissionDenied`](crate::Error::PermissionDenied)). Outside a
    /// tokio runtime, [`Error::Runtime`](crate::Error::Runtime).
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), crate::Error> {
        run::run(self, shutdown).await
    }
}

impl WorkerBuilder {
    /// Runs this handler on jobs of this type. Its input is the payload, its output the result.
    pub fn handle<H, F, In, Out>(self, job_type: impl Into<String>, handler: H) -> Self
    where
        H: Fn(Context, In) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Out, Error>> + Send + 'static,
        In: DeserializeOwned + Send + 'static,
        Out: Serialize + Send + 'static,
    {
        self.types([job_type], handler)
    }

    /// Runs one handler on jobs of several types; [`Context::job`] tells which.
    pub fn types<H, F, In, Out, T: Into<String>>(mut self, types: impl IntoIterator<Item = T>, handler: H) -> Self
    where
        H: Fn(Context, In) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Out, Error>> + Send + 'static,
        In: DeserializeOwned + Send + 'static,
        Out: Serialize + Send + 'static,
    {
        let handler = Handler::new(handler);
        for name in types {
            let name = name.into();
            if self.handlers.insert(name.clone(), handler.clone()).is_some() {
                self.twice.get_or_insert(name);
            }
        }
        self
    }

    /// How many handlers may run at the same time; at least 1. Default 10.
    pub fn concurrency(mut self, handlers: usize) -> Self {
        self.options.concurrency = handlers.max(1);
        self
    }

    /// A name for people, at most 255 characters. Default: the process's id and something random.
    pub fn worker_id(mut self, id: impl Into<String>) -> Self {
        self.options.worker_id = id.into();
        self
    }

    /// After how long without a sign of this worker its jobs are given to others, 1 s to 24 h. A sign is sent three times as
    /// often. Default 30 s.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease;
        self
    }

    /// The least time between two reports of one job's progress; the latest counts. Default 250 ms.
    pub fn progress_interval(mut self, interval: Duration) -> Self {
        self.options.progress_interval = interval.min(LONGEST_PROGRESS_INTERVAL);
        self
    }

    /// How long a handler that is asked to stop may take for it. Default 10 s.
    pub fn cancel_grace(mut self, grace: Duration) -> Self {
        self.options.cancel_grace = grace;
        self
    }

    /// How long handlers may go on after the worker was told to stop. Default 30 s.
    pub fn shutdown_grace(mut self, grace: Duration) -> Self {
        self.options.shutdown_grace = grace;
        self
    }

    /// The worker. It does nothing before [`Worker::run`].
    ///
    /// # Errors
    ///
    /// [`Error::Worker`](crate::Error::Worker) if it has no handler, or two for one type.
    pub fn build(self) -> Result<Worker, crate::Error> {
        if let Some(name) = self.twice {
            return Err(crate::Error::Worker(format!("the worker has two handlers for jobs of the type {name:?}")));
        }
        if self.handlers.is_empty() {
            return Err(crate::Error::Worker("the worker has no handler".to_owned()));
        }
        Ok(Worker { client: self.client, options: self.options, handlers: Arc::new(self.handlers) })
    }
}
