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
use tonic::{server::NamedService, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::ServiceBuilder;

use crate::{
    access::{Access, AccessError, Authentication},
    api,
    config::Config,
    ledger::Ledger,
    maintenance,
    net::{self, Tls, TlsError},
    readiness::Readiness,
    store::{self, Store, StoreError},
};

/// What is left of the grace period, at most, for callers to hear what became of what was cut off.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Closing the database may take this long even where the grace period is over: it saves the next start a replay.
const CLOSE_AT_LEAST: Duration = Duration::from_secs(1);

/// A server whose database is open, whose listener is bound, and that knows whom to let in.
pub struct Server {
    listener: TcpListener,
    config: Config,
    store: Arc<dyn Store>,
    /// `None`: nobody is asked who they are.
    access: Option<Arc<Access>>,
    tls: Option<Arc<Tls>>,
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
    /// Nobody can be let in.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// TLS can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The reflection service can't be built.
    #[error("the contract's descriptors can't be served: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A newer server has migrated the database.
    #[error("a newer jobledger has migrated the database: this server has stopped, and a newer one is to be started")]
    Outdated,
    /// A defect: the lanes ended by themselves.
    #[error("the ledger stopped by itself; this is a defect, and the log has its panic")]
    LedgerStopped,
}

impl Server {
    /// Opens the database, creating and migrating it where needed, and reads the keys and certificates.
    ///
    /// # Errors
    ///
    /// [`ServeError::Store`] if the database can't be used; else as for [`Server::with_store`].
    pub async fn open(listener: TcpListener, config: Config) -> Result<Self, ServeError> {
        let store = store::open(&config.database_url, config.open_options()).await?;
        Self::with_store(listener, config, store).await
    }

    /// A server on a store that is open already; the configuration's database and clock are not used.
    ///
    /// # Errors
    ///
    /// [`ServeError::Access`] if nobody could be let in, or keys can't be used; [`ServeError::Tls`] if certificates can't.
    pub async fn with_store(listener: TcpListener, config: Config, store: Arc<dyn Store>) -> Result<Self, ServeError> {
        let access = match config.access.is_on(listener.local_addr()?.ip().is_loopback()) {
            true => Some(Arc::new(Access::open(&config.access, Arc::clone(&store), Arc::clone(&config.clock)).await?)),
            false => None,
        };
        let tls = config.tls.clone().map(Tls::open).transpose()?.map(Arc::new);
        Ok(Self { listener, config, store, access, tls })
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
    /// If serving fails.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Self { listener, config, store, access, tls } = self;
        let (ledger, lanes) = Ledger::new(Arc::clone(&store), config.limits);
        let mut lanes = tokio::spawn(lanes);
        let draining = CancellationToken::new();

        let (health, health_service) = tonic_health::server::health_reporter();
        let (readiness, watched) = watch::channel(Readiness::Ready);
        // A store that was opened has just answered.
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
        let mut routes = Routes::new(health_service.max_decoding_message_size(api::ABOUT_NO_ORG))
            .add_service(reflection().build_v1()?.max_decoding_message_size(api::ABOUT_NO_ORG))
            .add_service(reflection().build_v1alpha()?.max_decoding_message_size(api::ABOUT_NO_ORG));
        let router = routes.axum_router_mut();
        let legacy =
            if config.legacy_http { api::legacy(ledger.clone(), config.calls.request_bytes) } else { api::no_legacy() };
        *router = std::mem::take(router).merge(api::probes(watched)).merge(legacy);
        // A name that leads to this machine, and is another's, is none of a server that only this machine can reach.
        let is_loopback = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
        let hosts = is_loopback.then(|| config.access.allowed_hosts.clone());
        let layers = ServiceBuilder::new()
            .layer(api::CallLayer(config.calls))
            .layer(api::AccessLayer::new(access, hosts))
            .layer(api::LimitsLayer::new(config.calls, draining.clone(), {
                let ledger = ledger.clone();
                move || ledger.is_stalled()
            }))
            .layer(api::WireLayer(api::WireService::new(service, config.calls.request_bytes)));
        let served = layers.service(routes.prepare());
        let mut serving = tokio::spawn(net::serve(listener, tls, served, config.connections, draining.clone()));

        let outcome = tokio::select! {
            () = shutdown => Ok(()),
            () = outdated => Err(ServeError::Outdated),
            _ = &mut serving => Err(ServeError::Listener(io::Error::other("it ended by itself"))),
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
        let mut serving = AbortOnDropHandle::new(serving);
        // Calls end with what they wait for, or are told that it was cut off.
        let last_words = deadline - LAST_WORDS.min(config.shutdown_grace / 10);
        if timeout_at(last_words, &mut serving).await.is_err() {
            finish(lanes, last_words, "accepted commands").await;
            if timeout_at(deadline, &mut serving).await.is_err() {
                tracing::warn!("the grace period is over; cutting off the connections that are left");
            }
        } else {
            finish(lanes, deadline, "accepted commands").await;
        }
        drop(serving);
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
            Readiness::NoDatabase | Readiness::Stalled | Readiness::Outdated => {
                report(&health, ServingStatus::NotServing).await;
            }
        }
    }
}

/// Done once a newer server has migrated the database.
async fn await_outdated(mut readiness: watch::Receiver<Readiness>) {
    if readiness.wait_for(|found| *found == Readiness::Outdated).await.is_err() {
        std::future::pending().await
    }
}

/// Somebody made tokens, and may believe that they are asked for.
async fn warn_of_tokens(store: Option<Arc<dyn Store>>) {
    if let Some(store) = store
        && store.about().await.is_ok_and(|about| about.credentials > 0)
    {
        tracing::warn!("API tokens were made, and nobody is asked for one on loopback: --require-auth does");
    }
}

/// Looks whether callers may still be let in, and with which certificates to serve.
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

/// Waits for a task until the deadline, then cuts it off. One that has ended already is nothing to wait for.
async fn finish(mut task: JoinHandle<()>, deadline: Instant, what: &'static str) {
    if !task.is_finished() && timeout_at(deadline, &mut task).await.is_err() {
        tracing::warn!(what, "the grace period is over; cutting off what is left");
        task.abort();
    }
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // The details of errors, so that grpcurl can show them.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}
