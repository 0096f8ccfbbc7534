//! Starts the parts of a server, and stops them in order.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use jobledger_proto::{
    FILE_DESCRIPTOR_SET,
    v1::{
        bulk_operation_service_server::BulkOperationServiceServer, job_service_server::JobServiceServer,
        job_type_service_server::JobTypeServiceServer, server_service_server::ServerServiceServer,
        worker_service_server::WorkerServiceServer,
    },
};
use thiserror::Error;
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{server::NamedService, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::ServiceBuilder;

use crate::{
    access::{Access, AccessError, Authentication},
    api,
    config::Config,
    ledger::Ledger,
    legacy::rest,
    maintenance,
    net::{self, Tls, TlsError},
    readiness::Readiness,
    scheduler::Scheduler,
    store::{self, Store, StoreError},
};

/// At most this, and at most a tenth of the grace period, is left at its end to answer calls that were cut off.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Closing the database may take this long even after the grace period: otherwise the next start has to replay its log.
const CLOSE_AT_LEAST: Duration = Duration::from_secs(1);

/// A server with an open database, a bound listener and loaded credentials.
pub struct Server {
    listener: TcpListener,
    config: Config,
    store: Arc<dyn Store>,
    /// `None`: callers are not authenticated.
    access: Option<Arc<Access>>,
    tls: Option<Arc<Tls>>,
}

/// Why a server can't start, or has stopped.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The database can't be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The listener failed.
    #[error("the listener failed: {0}")]
    Listener(#[from] io::Error),
    /// Keys can't be used, or there is no credential with which anybody could call.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// TLS can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The reflection service can't be built.
    #[error("can't set up gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A newer server has migrated the database.
    #[error("a newer jobledger has migrated the database: this server stopped; start the newer version")]
    Outdated,
    /// A defect: the lanes ended without being closed.
    #[error("internal error: the ledger stopped unexpectedly; the log has the panic")]
    LedgerStopped,
}

impl Server {
    /// Opens the database, creates and migrates it if needed, and reads keys and certificates.
    ///
    /// # Errors
    ///
    /// [`ServeError::Store`] if the database can't be used; else those of [`Server::with_store`].
    pub async fn open(listener: TcpListener, config: Config) -> Result<Self, ServeError> {
        let store = store::open(&config.database_url, config.open_options()).await?;
        Self::with_store(listener, config, store).await
    }

    /// A server on a store that is open already. The database URL and the rest of [`Config::open_options`] are not used,
    /// but for the clock: credentials expire by it.
    ///
    /// # Errors
    ///
    /// [`ServeError::Access`] if keys can't be used or no credential exists; [`ServeError::Tls`] if certificates can't be
    /// used; [`ServeError::Listener`] if the listener has no address.
    pub async fn with_store(listener: TcpListener, config: Config, store: Arc<dyn Store>) -> Result<Self, ServeError> {
        let access = match config.access.is_on(listener.local_addr()?.ip().is_loopback()) {
            true => Some(Arc::new(Access::open(&config.access, Arc::clone(&store), Arc::clone(&config.clock)).await?)),
            false => None,
        };
        let tls = config.tls.clone().map(Tls::open).transpose()?.map(Arc::new);
        Ok(Self { listener, config, store, access, tls })
    }

    /// The address on which the server listens.
    ///
    /// # Errors
    ///
    /// If the socket doesn't tell its address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` completes. Then it takes no more work, answers the accepted calls, tells streams to resume
    /// elsewhere and closes the database. This ends with the grace period; only closing may take a second longer.
    ///
    /// # Errors
    ///
    /// [`ServeError::Outdated`] if a newer server has migrated the database; another if serving fails.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Self { listener, config, store, access, tls } = self;
        let (ledger, lanes) = Ledger::new(Arc::clone(&store), config.limits);
        let mut lanes = tokio::spawn(lanes);
        let draining = CancellationToken::new();

        let (health, health_service) = tonic_health::server::health_reporter();
        let (readiness, watched) = watch::channel(Readiness::Ready);
        // The store has answered while it was opened.
        report(&health, ServingStatus::Serving).await;
        let outdated = await_outdated(watched.clone());
        let reporting = report_readiness(health.clone(), watched.clone());
        let (retention, disk_reserve) = (config.retention, config.disk_reserve);
        let maintenance =
            maintenance::run(ledger.clone(), Arc::clone(&store), retention, disk_reserve, readiness.clone());
        let watching = watch_credentials(access.clone(), tls.clone());
        let is_deliberate = access.is_some() || config.access.authentication == Authentication::Off;
        let warning = warn_of_tokens((!is_deliberate).then(|| Arc::clone(&store)));
        let maintenance = AbortOnDropHandle::new(tokio::spawn(async {
            tokio::join!(reporting, maintenance, watching, warning);
        }));
        let service = api::Service::new(ledger.clone(), config.slow_consumer_after, draining.clone());
        let mut routes =
            services(&ledger, &config)?.add_service(health_service.max_decoding_message_size(api::ABOUT_NO_ORG));
        let router = routes.axum_router_mut();
        let legacy = config.legacy_http.then(|| rest::routes(ledger.clone(), config.calls.request_bytes));
        *router = std::mem::take(router).merge(api::probes(watched)).merge(legacy.unwrap_or_else(rest::no_routes));
        // Against DNS rebinding: a page from elsewhere whose host name resolves to this machine must not reach a loopback
        // server.
        let is_loopback = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
        let hosts = is_loopback.then(|| config.access.allowed_hosts.clone());
        let (scheduler, mut runners) = Scheduler::start();
        let limits = call_limits(config.calls, &ledger, &scheduler, &draining);
        let layers = ServiceBuilder::new()
            .layer(api::CallLayer(config.calls))
            .layer(api::AccessLayer::new(access, hosts))
            .layer(limits)
            .layer(api::WireLayer(api::WireService::new(service, config.calls.request_bytes)));
        let served = layers.service(routes.prepare());
        let serving = net::serve(listener, tls, served, config.connections, scheduler, draining.clone());
        let mut serving = tokio::spawn(serving);

        let outcome = tokio::select! {
            () = shutdown => Ok(()),
            () = outdated => Err(ServeError::Outdated),
            _ = &mut serving => Err(ServeError::Listener(io::Error::other("it ended unexpectedly"))),
            () = runners.ended() => Err(ServeError::Listener(io::Error::other("its tasks are not run"))),
            _ = &mut lanes => Err(ServeError::LedgerStopped),
        };

        tracing::info!(grace_s = config.shutdown_grace.as_secs(), "shutting down");
        readiness.send_replace(Readiness::Stopping);
        drop(maintenance);
        report(&health, ServingStatus::NotServing).await;
        for name in HEALTH_SERVICES {
            // This ends Watch streams, which would delay the shutdown.
            health.clone().clear_service_status(name).await;
        }
        let deadline = Instant::now() + config.shutdown_grace;
        ledger.close();
        draining.cancel();
        drain(AbortOnDropHandle::new(serving), lanes, deadline, config.shutdown_grace).await;
        if timeout_at(deadline.max(Instant::now() + CLOSE_AT_LEAST), store.close()).await.is_err() {
            tracing::warn!("the database was not closed in time; its log is replayed at the next start");
        }
        tracing::info!("stopped");
        outcome
    }
}

fn call_limits(
    calls: api::CallLimits,
    ledger: &Ledger,
    scheduler: &Arc<Scheduler>,
    draining: &CancellationToken,
) -> api::LimitsLayer {
    let (stalled, slowed) = (ledger.clone(), ledger.clone());
    let is_stalled = move || stalled.is_stalled();
    let tell_slowed = move |orgs| slowed.read_less_for(orgs);
    api::LimitsLayer::new(calls, Arc::clone(scheduler), draining.clone(), is_stalled, tell_slowed)
}

/// The services besides JobService and health.
fn services(ledger: &Ledger, config: &Config) -> Result<Routes, ServeError> {
    let facts = api::ServerFacts::of(config);
    Ok(Routes::new(BulkOperationServiceServer::new(api::BulkOperations::new(ledger.clone())))
        .add_service(JobTypeServiceServer::new(api::JobTypes::new(ledger.clone())))
        .add_service(WorkerServiceServer::new(api::Workers::new(ledger.clone())))
        .add_service(ServerServiceServer::new(api::ServerInfo::new(ledger.clone(), facts)))
        .add_service(reflection().build_v1()?.max_decoding_message_size(api::ABOUT_NO_ORG))
        .add_service(reflection().build_v1alpha()?.max_decoding_message_size(api::ABOUT_NO_ORG)))
}

/// Waits until the connections and the lanes have ended. Calls end with their commands. If some are left shortly before the
/// deadline, the lanes are cut off, and the calls get errors.
async fn drain<T>(mut serving: AbortOnDropHandle<T>, lanes: JoinHandle<()>, deadline: Instant, grace: Duration) {
    let last_words = deadline - LAST_WORDS.min(grace / 10);
    if timeout_at(last_words, &mut serving).await.is_ok() {
        return finish(lanes, deadline, "accepted commands").await;
    }
    finish(lanes, last_words, "accepted commands").await;
    if timeout_at(deadline, &mut serving).await.is_err() {
        tracing::warn!("the grace period is over; closing the remaining connections");
    }
}

/// The names of which health is reported: of the server as a whole, and of the services.
const HEALTH_SERVICES: [&str; 6] = [
    "",
    JobServiceServer::<api::Service>::NAME,
    JobTypeServiceServer::<api::JobTypes>::NAME,
    BulkOperationServiceServer::<api::BulkOperations>::NAME,
    ServerServiceServer::<api::ServerInfo>::NAME,
    WorkerServiceServer::<api::Workers>::NAME,
];

async fn report(health: &HealthReporter, status: ServingStatus) {
    for name in HEALTH_SERVICES {
        health.set_service_status(name, status).await;
    }
}

/// Reports readiness as gRPC health, until the shutdown, which reports by itself.
async fn report_readiness(health: HealthReporter, mut readiness: watch::Receiver<Readiness>) {
    while readiness.changed().await.is_ok() {
        let found = *readiness.borrow_and_update();
        match found {
            Readiness::Stopping => return,
            Readiness::Ready => report(&health, ServingStatus::Serving).await,
            Readiness::NoDatabase | Readiness::Stalled | Readiness::Outdated => {
                report(&health, ServingStatus::NotServing).await;
            }
        }
    }
}

/// Completes once a newer server has migrated the database.
async fn await_outdated(mut readiness: watch::Receiver<Readiness>) {
    if readiness.wait_for(|found| *found == Readiness::Outdated).await.is_err() {
        std::future::pending().await
    }
}

/// Warns if API tokens exist while callers on loopback are not authenticated: whoever made them may expect that they are.
async fn warn_of_tokens(store: Option<Arc<dyn Store>>) {
    if let Some(store) = store
        && store.about().await.is_ok_and(|about| about.credentials > 0)
    {
        tracing::warn!("API tokens exist, but calls on loopback need none: set --require-auth to require them");
    }
}

/// Re-checks credentials, and reloads keys and certificates.
async fn watch_credentials(access: Option<Arc<Access>>, tls: Option<Arc<Tls>>) {
    let access = async {
        if let Some(access) = access {
            access.watch().await;
        }
    };
    let tls = async {
        if let Some(tls) = tls {
            tls.watch().await;
        }
    };
    tokio::join!(access, tls);
}

/// Waits for a task until the deadline, then aborts it. A task that has ended must not be awaited again.
async fn finish(mut task: JoinHandle<()>, deadline: Instant, what: &'static str) {
    if !task.is_finished() && timeout_at(deadline, &mut task).await.is_err() {
        tracing::warn!(what, "the grace period is over; aborting unfinished work");
        task.abort();
    }
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // The details of errors, which grpcurl can then show.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}
