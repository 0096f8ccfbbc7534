//! Puts the parts together, and takes them apart in order.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use jobledger_proto::{FILE_DESCRIPTOR_SET, v1::job_service_server::JobServiceServer};
use thiserror::Error;
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{server::NamedService, service::Routes, transport::server::TcpIncoming};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    api,
    config::Config,
    ledger::Ledger,
    maintenance,
    readiness::Readiness,
    store::{self, Store, StoreError},
};

/// A silent peer is asked for a sign of life this often, and given up after the same time again.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Calls that one connection may have open, streams included.
const CALLS_PER_CONNECTION: u32 = 4_096;
/// Requests reset by us, for a protocol error, before the connection is closed.
const MAX_ERROR_RESETS: usize = 1_024;

/// Closing the database may take this long even where the grace period is over: it saves the next start a replay.
const CLOSE_AT_LEAST: Duration = Duration::from_secs(1);

/// A server whose database is open and whose listener is bound.
pub struct Server {
    listener: TcpListener,
    config: Config,
    store: Arc<dyn Store>,
}

/// Why a server can't start, or stopped.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The database can't be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The listener failed.
    #[error("the listener failed: {0}")]
    Listener(#[from] io::Error),
    /// The transport failed.
    #[error("serving failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The reflection service can't be built.
    #[error("the contract's descriptors can't be served: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A defect: the lanes ended by themselves.
    #[error("the ledger stopped by itself; this is a defect, and the log has its panic")]
    LedgerStopped,
}

impl Server {
    /// Opens the database, creating and migrating it where needed.
    ///
    /// # Errors
    ///
    /// [`ServeError::Store`] if the database can't be used.
    pub async fn open(listener: TcpListener, config: Config) -> Result<Self, ServeError> {
        let store = store::open(&config.database_url, config.open_options()).await?;
        Ok(Self::with_store(listener, config, store))
    }

    /// A server on a store that is open already; the configuration's database and clock are not used.
    pub fn with_store(listener: TcpListener, config: Config, store: Arc<dyn Store>) -> Self {
        Self { listener, config, store }
    }

    /// Where the server listens.
    ///
    /// # Errors
    ///
    /// If the socket can't tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` is done, then stops taking work, answers what was accepted, tells streams to resume
    /// elsewhere, and closes the database; all within the configured grace period.
    ///
    /// # Errors
    ///
    /// If serving fails, or can't begin.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Self { listener, config, store } = self;
        let (ledger, lanes) = Ledger::new(Arc::clone(&store), config.limits);
        let mut lanes = tokio::spawn(lanes);
        let draining = CancellationToken::new();

        let (health, health_service) = tonic_health::server::health_reporter();
        let (readiness, watched) = watch::channel(Readiness::Ready);
        // A store that was opened has just answered.
        report(&health, ServingStatus::Serving).await;
        let reporting = report_readiness(health.clone(), watched.clone());
        let maintenance = maintenance::run(ledger.clone(), Arc::clone(&store), config.retention, readiness.clone());
        let maintenance = AbortOnDropHandle::new(tokio::spawn(async {
            tokio::join!(reporting, maintenance);
        }));
        let service = api::Service::new(ledger.clone(), config.slow_consumer_after, draining.clone());
        let mut routes = Routes::new(health_service)
            .add_service(reflection().build_v1()?)
            .add_service(reflection().build_v1alpha()?);
        let router = routes.axum_router_mut();
        let legacy = if config.legacy_http { api::legacy(ledger.clone()) } else { api::no_legacy() };
        *router = std::mem::take(router).merge(api::probes(watched)).merge(legacy);
        let router = tonic::transport::Server::builder()
            // For probes and the old REST calls.
            .accept_http1(true)
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .http2_max_local_error_reset_streams(Some(MAX_ERROR_RESETS))
            .max_concurrent_streams(CALLS_PER_CONNECTION)
            .layer(api::CallLayer)
            .layer(api::WireLayer(api::WireService::new(service)))
            .add_routes(routes);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(KEEPALIVE));
        let mut serving =
            tokio::spawn(router.serve_with_incoming_shutdown(incoming, draining.clone().cancelled_owned()));

        let mut outcome = tokio::select! {
            () = shutdown => Ok(()),
            ended = &mut serving => Err(match ended {
                Ok(Err(error)) => ServeError::Transport(error),
                Ok(Ok(())) | Err(_) => ServeError::Listener(io::Error::other("it ended by itself")),
            }),
            _ = &mut lanes => Err(ServeError::LedgerStopped),
        };

        tracing::info!(grace_s = config.shutdown_grace.as_secs(), "shutting down");
        readiness.send_replace(Readiness::Stopping);
        drop(maintenance);
        report(&health, ServingStatus::NotServing).await;
        for name in HEALTH_SERVICES {
            // Ends the streams of those who watch, which would hold up the stop.
            health.clone().clear_service_status(name).await;
        }
        let deadline = Instant::now() + config.shutdown_grace;
        ledger.close();
        draining.cancel();
        if let Some(Err(error)) = finish(serving, deadline, "connections").await {
            outcome = outcome.and(Err(ServeError::Transport(error)));
        }
        finish(lanes, deadline, "accepted commands").await;
        if timeout_at(deadline.max(Instant::now() + CLOSE_AT_LEAST), store.close()).await.is_err() {
            tracing::warn!("the database was not closed in time; its log is replayed at the next start");
        }
        tracing::info!("stopped");
        outcome
    }
}

/// The names under which health is reported: the server's, and the service's.
const HEALTH_SERVICES: [&str; 2] = ["", JobServiceServer::<api::Service>::NAME];

async fn report(health: &HealthReporter, status: ServingStatus) {
    for name in HEALTH_SERVICES {
        health.set_service_status(name, status).await;
    }
}

/// Tells those who ask for the health what is found, until the stop, which tells them itself.
async fn report_readiness(health: HealthReporter, mut readiness: watch::Receiver<Readiness>) {
    while readiness.changed().await.is_ok() {
        let found = *readiness.borrow_and_update();
        match found {
            Readiness::Stopping => return,
            Readiness::Ready => report(&health, ServingStatus::Serving).await,
            Readiness::NoDatabase | Readiness::Stalled => report(&health, ServingStatus::NotServing).await,
        }
    }
}

/// Waits for a task until the deadline, then cuts it off. One that has ended already is nothing to wait for.
async fn finish<T>(mut task: JoinHandle<T>, deadline: Instant, what: &'static str) -> Option<T> {
    if task.is_finished() {
        return None;
    }
    match timeout_at(deadline, &mut task).await {
        Ok(ended) => ended.ok(),
        Err(_) => {
            tracing::warn!(what, "the grace period is over; cutting off what is left");
            task.abort();
            None
        }
    }
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // The details of errors, so that grpcurl can show them.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}
