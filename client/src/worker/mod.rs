//! Workers claim jobs, run a handler on each, and report the outcome to the ledger.
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
//!     let picture = tokio::fs::read(&job.path).await?; // any error: retried while the job's budget lasts
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
//! # What a handler can rely on
//!
//! A job succeeds at most once: the ledger accepts reports only under the current lease, and while a worker holds the
//! lease nobody else gets the job. A handler may still run more than once for one job, because a worker may die after
//! the work and before its report. Make its side effects repeatable: write to a location named by the job's id, or use
//! the id as the other system's idempotency key.
//!
//! # How a handler ends
//!
//! | the handler | the job |
//! |---|---|
//! | returns `Ok` | succeeds, with the value as its result |
//! | returns an [`Error`] | fails and is retried while its budget lasts, unless the error says otherwise |
//! | panics | fails with the code [`PANIC`] and is retried |
//! | can't read the payload | fails permanently with [`INVALID_PAYLOAD`] |
//! | returns a result that can't be stored | fails permanently with [`INVALID_RESULT`] |
//! | is asked to stop because the job was canceled | is canceled, whatever the handler returns |
//! | loses its lease by expiry or the run timeout | is no longer this worker's: what the handler returns is discarded |
//! | dies with its process | is queued again once the lease expires: a lost attempt, up to `max_lost_attempts` no failure |
//! | never returns | runs on while its worker sends heartbeats, unless it has a run timeout |
//! | still runs when [`WorkerBuilder::shutdown_grace`] is over | goes back to the queue with its budget unchanged |
//!
//! A handler that should stop sees [`Context::canceled`]. After [`WorkerBuilder::cancel_grace`], or 1 s at the end of a
//! shutdown, the worker drops it at its next `.await`. A handler that never awaits, such as a long computation, runs
//! on, but its result is ignored. Run computations in `tokio::task::spawn_blocking`, and check [`Context::is_canceled`]
//! there. Heartbeats have a thread of their own, which no handler can block.

mod attempt;
mod context;
mod error;
mod handler;
mod heartbeats;
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

/// Claims jobs and runs handlers on them. The [module](self) describes the guarantees.
#[must_use]
pub struct Worker {
    client: Client,
    options: Options,
    handlers: Arc<BTreeMap<String, Handler>>,
}

#[derive(Debug, Clone)]
struct Options {
    worker_id: String,
    version: String,
    host: String,
    concurrency: usize,
    lease: Duration,
    wait: Duration,
    progress_interval: Duration,
    cancel_grace: Duration,
    shutdown_grace: Duration,
}

/// Bound of the progress interval: a day.
const LONGEST_PROGRESS_INTERVAL: Duration = Duration::from_secs(86_400);

/// Configures a [`Worker`].
#[must_use]
pub struct WorkerBuilder {
    client: Client,
    options: Options,
    handlers: BTreeMap<String, Handler>,
    /// A type with two handlers, which [`WorkerBuilder::build`] refuses.
    twice: Option<String>,
}

/// The machine's name, where Linux tells it.
fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}

impl Worker {
    /// Configures a worker for jobs of the client's org.
    pub fn builder(client: Client) -> WorkerBuilder {
        let id = Uuid::new_v4().simple().to_string();
        let options = Options {
            worker_id: format!("{}-{}", std::process::id(), &id[..8]),
            version: String::new(),
            host: host_name(),
            concurrency: 10,
            lease: Duration::from_secs(30),
            wait: Duration::from_secs(20),
            progress_interval: Duration::from_millis(250),
            cancel_grace: Duration::from_secs(10),
            shutdown_grace: Duration::from_secs(30),
        };
        WorkerBuilder { client, options, handlers: BTreeMap::new(), twice: None }
    }

    /// Works until `shutdown` completes, for instance [`shutdown_signal`](crate::shutdown_signal). The worker then stops
    /// claiming, lets running handlers finish within the [grace period](WorkerBuilder::shutdown_grace), and gives the other jobs
    /// back. During an outage it retries without limit. Dropping the future stops the handlers; their leases expire.
    ///
    /// # Errors
    ///
    /// The error of a claim that the service refuses for good, for instance because a type is invalid.
    /// [`Error::Unauthenticated`](crate::Error::Unauthenticated) and
    /// [`Error::PermissionDenied`](crate::Error::PermissionDenied) end the worker only before its first answered claim.
    /// [`Error::Runtime`](crate::Error::Runtime) outside a tokio runtime.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), crate::Error> {
        run::run(self, shutdown).await
    }
}

impl WorkerBuilder {
    /// Runs this handler on jobs of this type. The handler's input is the payload, its output the result.
    pub fn handle<H, F, In, Out>(self, job_type: impl Into<String>, handler: H) -> Self
    where
        H: Fn(Context, In) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Out, Error>> + Send + 'static,
        In: DeserializeOwned + Send + 'static,
        Out: Serialize + Send + 'static,
    {
        self.types([job_type], handler)
    }

    /// Runs one handler on jobs of several types. [`Context::job`] has the type.
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

    /// How many jobs the worker runs at the same time, at least 1. Default 10.
    pub fn concurrency(mut self, handlers: usize) -> Self {
        self.options.concurrency = handlers.max(1);
        self
    }

    /// A name for people, at most 255 characters. Default: the process id and a random suffix.
    pub fn worker_id(mut self, id: impl Into<String>) -> Self {
        self.options.worker_id = id.into();
        self
    }

    /// The worker's version, which lists of workers show. At most 255 characters. Default: none.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.options.version = version.into();
        self
    }

    /// The machine that the worker runs on, which lists of workers show. At most 255 characters. Default: on Linux the
    /// machine's name, elsewhere none.
    pub fn host(mut self, host: impl Into<String>) -> Self {
        self.options.host = host.into();
        self
    }

    /// Length of the leases, 1 s to 24 h. If the service gets no heartbeat of a job for this long, another worker gets
    /// the job. The worker sends three heartbeats per lease. Default 30 s.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease;
        self
    }

    /// Minimum time between two progress reports of a job; the latest value is reported. Default 250 ms, at most a day.
    pub fn progress_interval(mut self, interval: Duration) -> Self {
        self.options.progress_interval = interval.min(LONGEST_PROGRESS_INTERVAL);
        self
    }

    /// How long a handler that is asked to stop may take to end. Default 10 s.
    pub fn cancel_grace(mut self, grace: Duration) -> Self {
        self.options.cancel_grace = grace;
        self
    }

    /// How long running handlers may go on after `shutdown` has completed. Default 30 s.
    pub fn shutdown_grace(mut self, grace: Duration) -> Self {
        self.options.shutdown_grace = grace;
        self
    }

    /// Builds the worker. It does nothing before [`Worker::run`].
    ///
    /// # Errors
    ///
    /// [`Error::Worker`](crate::Error::Worker) if it has no handler, or two handlers for one type.
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
