//! The Rust client of jobledger: create jobs, [work](worker) on them, report on them, and follow what happens.
//!
//! ```no_run
//! # async fn example() -> Result<(), jobledger_client::Error> {
//! use jobledger_client::{Client, NewJob, Report};
//!
//! // Connects when first used, and again whenever the connection is lost.
//! let client = Client::new("http://127.0.0.1:50051")?;
//!
//! // A producer queues a job. With a key, doing it twice makes one job.
//! let job = NewJob::new("thumbnail").payload(&serde_json::json!({"path": "cat.jpg"}))?.idempotency_key("cat.jpg@7");
//! let created = client.create(job).await?;
//!
//! // Whoever works on it reports: a [`worker`](crate::worker), which claims jobs by itself, or as here somebody who was handed the job
//! // in another way. (One that existed before may be done already: look at its status.)
//! let id = &created.job.id;
//! if !created.deduplicated {
//!     client.update(Report::start(id).stage("scaling")).await?;
//!     client.update(Report::progress(id).percent(50)).await?;
//!     client.update(Report::succeeded(id).result(&serde_json::json!({"bytes": 4096}))?).await?;
//! }
//!
//! // Anyone reads the result, the whole history, or the numbers.
//! let job = client.get(id).await?;
//! let statistics = client.statistics(&["thumbnail"]).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Following events
//!
//! A [`Subscription`] brings each event once, in the order of the org's log, and resumes by itself after a lost connection:
//!
//! ```no_run
//! # async fn example(client: jobledger_client::Client) -> Result<(), jobledger_client::Error> {
//! use jobledger_client::{Follow, Item};
//!
//! // From the beginning of the log. The cursor that is stored goes on from there another day: `Follow::resume`.
//! let follow = Follow::org().after(0).types(["thumbnail"]);
//! let mut events = client.subscribe(follow).await?.on_cursor(|cursor| println!("store {cursor}"));
//! while let Some(item) = events.next().await {
//!     match item? {
//!         Item::Event(event) => println!("{} {:?} {}", event.seq, event.kind(), event.job_id),
//!         Item::Bookmark(bookmark) => println!("nothing is missing up to {}", bookmark.seq),
//!         _ => {} // from a newer version
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! [`Client::wait_for`] waits for one job to finish, and [`Client::view`] keeps a local copy of many.
//!
//! # Who calls
//!
//! A server that asks who calls is given an API token or a JWT ([`ClientBuilder::token`]), which can be replaced while it is used, or a
//! certificate ([`ClientBuilder::identity`]):
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
//! # Time-outs and retries
//!
//! Every call carries a deadline ([`ClientBuilder::timeout`], 30 s by default) that bounds all its tries together. What was refused for
//! now (RESOURCE_EXHAUSTED with a time to come back after) is tried again until then. What fails with UNAVAILABLE, or because the
//! connection broke, is tried again with jittered backoff, at the next endpoint where there are several, if repeating it is safe:
//!
//! | call | repeated |
//! |---|---|
//! | [`Client::create`], [`Client::create_all`] | always: without an idempotency key it gets one of its own |
//! | [`Client::get`], [`Client::list`], [`Client::statistics`] | always |
//! | [`Client::claim`], [`Client::retry`] | always: they carry a request id of their own |
//! | [`Client::heartbeat`], [`Client::cancel`] | always |
//! | [`Client::update`] of an end, under a lease | always |
//! | [`Client::update`], succeeded, canceled or permanently failed | always |
//! | [`Client::update`], start or progress | unless it has an etag, which a first try that went through would have changed; a remark may be logged twice |
//! | [`Client::update`], failed (but for good) or released | only with an etag or a lease: the next attempt may have begun, and would be ended by the repetition |
//!
//! Everything else is yours to decide: see [`Error`].

mod batch;
mod client;
mod connect;
mod cursor;
mod error;
mod failover;
mod json;
mod request;
mod retry;
mod shutdown;
mod subscription;
mod view;
mod work;
pub mod worker;

pub use jobledger_proto::v1 as proto;
#[doc(no_inline)]
pub use jobledger_proto::v1::{
    Bookmark, GetStatisticsRequest, GetStatisticsResponse as Statistics, HeartbeatRequest, HeartbeatResult, Job,
    JobEvent, JobEventKind, JobStatus, JobView, Lease, LeaseHeartbeat, ListJobsRequest, ListJobsResponse, RetryPolicy,
    StatusCounts, TypeStatistics,
};
#[doc(no_inline)]
pub use prost_types;

pub use self::{
    client::{Client, Created, Updated},
    connect::{ClientBuilder, Endpoints, RawClient, Token, WithCaller},
    cursor::Cursor,
    error::{Error, Violation},
    failover::Connections,
    json::{from_value, to_value},
    request::{Claim, Follow, NewJob, Report},
    shutdown::shutdown_signal,
    subscription::{Item, Subscription},
    view::{Change, JobState, View},
};
