//! The Rust client of jobledger. It creates jobs, reports on them, follows their events, and runs [workers](worker).
//!
//! ```no_run
//! # async fn example() -> Result<(), jobledger_client::Error> {
//! use jobledger_client::{Client, NewJob, Report};
//!
//! // Connects on the first call, and reconnects whenever the connection is lost.
//! let client = Client::new("http://127.0.0.1:50051")?;
//!
//! // A producer queues a job. The idempotency key makes a repeated create return the same job.
//! let job = NewJob::new("thumbnail").payload(&serde_json::json!({"path": "cat.jpg"}))?.idempotency_key("cat.jpg@7");
//! let created = client.create(job).await?;
//!
//! // Usually a `jobledger_client::worker` claims the job, runs it and reports. Here the caller runs the job itself.
//! // A job that existed before may already be done: check its status.
//! let id = &created.job.id;
//! if !created.deduplicated {
//!     client.update(Report::start(id).stage("scaling")).await?;
//!     client.update(Report::progress(id).percent(50)).await?;
//!     client.update(Report::succeeded(id).result(&serde_json::json!({"bytes": 4096}))?).await?;
//! }
//!
//! // Read the result, and the counts by type.
//! let job = client.get(id).await?;
//! let statistics = client.statistics(&["thumbnail"]).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Following events
//!
//! A [`Subscription`] delivers each event once, in the order of the org's log. After a lost connection it resumes by itself:
//!
//! ```no_run
//! # async fn example(client: jobledger_client::Client) -> Result<(), jobledger_client::Error> {
//! use jobledger_client::{Follow, Item};
//!
//! // Starts at the beginning of the log. `Follow::resume` continues later from a stored cursor.
//! let follow = Follow::org().after(0).types(["thumbnail"]);
//! let mut events = client.subscribe(follow).await?.on_cursor(|cursor| println!("store {cursor}"));
//! while let Some(item) = events.next().await {
//!     match item? {
//!         Item::Event(event) => println!("{} {:?} {}", event.seq, event.kind(), event.job_id),
//!         Item::Bookmark(bookmark) => println!("nothing is missing up to {}", bookmark.seq),
//!         _ => {} // an item of a newer version
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! [`Client::wait_for`] waits for one job to finish. [`Client::view`] keeps a local copy of many jobs up to date.
//!
//! # Authentication
//!
//! A server with authentication needs an API token or a JWT ([`ClientBuilder::token`]), or a client certificate
//! ([`ClientBuilder::identity`]). A token can be replaced while clients use it:
//!
//! ```no_run
//! # fn example(api_token: String) -> Result<(), jobledger_client::Error> {
//! use jobledger_client::{Client, Token};
//!
//! let token = Token::new(&api_token)?;
//! let client = Client::builder("https://jobs.example.com:50051").token(token.clone()).build()?;
//! // Later: token.replace(&another)?
//! # Ok(())
//! # }
//! ```
//!
//! # Timeouts and retries
//!
//! Every call has a deadline ([`ClientBuilder::timeout`], 30 s by default) that bounds all its tries together. Within
//! the deadline the client retries
//!
//! - every call that the service refuses for a time (RESOURCE_EXHAUSTED with a retry delay), because nothing was
//!   decided;
//! - calls that fail with UNAVAILABLE, or because the connection broke, if repeating them is safe. The client waits
//!   with jittered backoff, and goes to the next endpoint if there are several.
//!
//! | call | retried after UNAVAILABLE |
//! |---|---|
//! | [`Client::create`], [`Client::create_all`] | always: a job without an idempotency key gets a random one |
//! | [`Client::get`], [`Client::list`], [`Client::statistics`] | always |
//! | [`Client::claim`], [`Client::retry`] | always: they carry a request id |
//! | [`Client::heartbeat`], [`Client::cancel`] | always |
//! | [`Client::start_bulk`], [`Client::bulk_operation`], [`Client::bulk_operations`], [`Client::stop_bulk`] | always |
//! | [`Client::job_types`], [`Client::job_type`], [`Client::pause`], [`Client::resume`] and other calls about types | always |
//! | [`Client::tokens`], [`Client::revoke_token`] | always |
//! | [`Client::create_token`] | never: the first try may have made a token |
//! | [`Client::subscribe`], [`Client::view`], [`Client::wait_for`] | always |
//! | [`Client::update`] with an outcome, under a lease | always |
//! | [`Client::update`] to succeeded, canceled or permanently failed | always |
//! | [`Client::update`] to failed (retryable) or released | only with an etag or a lease |
//! | [`Client::update`] with a start or progress | unless it has an etag; its message may be logged twice |
//!
//! A retryable failure or a release without an etag or a lease is not repeated, because the next attempt may have begun
//! and the repetition would end it. A start or progress report with an etag is not repeated, because a successful first
//! try has changed the etag.
//!
//! All other errors are returned to the caller. [`Error`] says what to do about each.

mod batch;
mod bulk;
mod client;
mod connect;
mod cursor;
mod edit;
mod erase;
mod error;
mod failover;
mod job_types;
mod json;
mod request;
mod retry;
mod server_info;
mod shutdown;
mod subscription;
mod tokens;
mod view;
mod work;
pub mod worker;

pub use jobledger_proto::v1 as proto;
#[doc(no_inline)]
pub use jobledger_proto::v1::{
    Bookmark, BulkAction, BulkOperation, BulkStatus, GetStatisticsRequest, GetStatisticsResponse as Statistics,
    HeartbeatRequest, HeartbeatResult, Job, JobEvent, JobEventKind, JobFilter, JobOrder, JobStatus, JobType, JobView,
    Lease, LeaseHeartbeat, ListJobsRequest, ListJobsResponse, OrgEvent, Pause, RetryPolicy, StatusCounts,
    TypeStatistics,
};
#[doc(no_inline)]
pub use prost_types;

pub use self::{
    client::{Client, Created, Updated},
    connect::{
        ClientBuilder, Endpoints, RawBulkClient, RawClient, RawJobTypeClient, RawServerClient, RawWorkerClient, Token,
        WithCaller,
    },
    cursor::Cursor,
    edit::Edit,
    error::{Error, Violation},
    failover::Connections,
    job_types::PauseTarget,
    json::{from_value, to_value},
    request::{Claim, Follow, NewJob, Report},
    shutdown::shutdown_signal,
    subscription::{Item, Subscription},
    view::{Change, JobState, View},
};
