//! Accepts connections, up to the limits in all and for each address.

use std::{convert::Infallible, io, net::IpAddr, sync::Arc, time::Duration};

use http::{Request, Response};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::Service;

use super::{
    ConnectionLimits, Peer, Tls, connection,
    response_memory::{ResponseMemory, Share},
};
use crate::{
    scheduler::Scheduler,
    shares::{Full, Most, Part, Shares, network},
};

/// The pause when the system has no resources (files, memory) for another connection.
const PAUSE: Duration = Duration::from_millis(100);
/// The shortest time between two log lines about refused connections.
const SAID: Duration = Duration::from_secs(10);

/// Accepts connections until `draining` is cancelled, then waits until the open ones have ended. Dropping the future cuts them.
pub(crate) async fn serve<S>(
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    service: S,
    limits: ConnectionLimits,
    scheduler: Arc<Scheduler>,
    draining: CancellationToken,
) where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + Unpin + 'static,
    S::Future: Send + Unpin + 'static,
{
    let places = Shares::new(Most { in_all: limits.connections, each: limits.connections_per_address });
    let unread = ResponseMemory::new(Most { in_all: limits.unread, each: limits.unread_each });
    let mut connections = JoinSet::new();
    let mut turned_away = TurnedAway::default();
    loop {
        let accepted = tokio::select! {
            () = draining.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_of_one(&error) => continue,
            Err(error) => {
                turned_away.say(&format!("no connection can be accepted: {error}"));
                sleep(PAUSE).await;
                continue;
            }
        };
        match places.take(network(address.ip()), 1) {
            Ok(place) => {
                let (tls, cut) = (tls.clone(), CancellationToken::new());
                let unread = unread.share(address, cut.clone());
                let (ending, draining, service) = (CancellationToken::new(), draining.clone(), service.clone());
                connections.spawn(scheduler.spawn_connection(|owner| {
                    let peer = Peer { address, certificate: None, cut, ending, owner };
                    run(stream, peer, (place, unread), tls, service, limits, draining)
                }));
            }
            Err(Full::InAll) => turned_away.say("the server reached --max-connections"),
            Err(Full::Each) => turned_away.say(&format!("{} reached --max-connections-per-address", address.ip())),
        }
    }
    // Closing the listener refuses new connections instead of leaving them to wait.
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn run<S>(
    stream: TcpStream,
    mut peer: Peer,
    (_place, unread): (Part<IpAddr>, Share),
    tls: Option<Arc<Tls>>,
    service: S,
    limits: ConnectionLimits,
    draining: CancellationToken,
) where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + Unpin + 'static,
    S::Future: Send + Unpin + 'static,
{
    // Answers are small and must not wait to be joined with others (Nagle's algorithm).
    let _ = stream.set_nodelay(true);
    match tls {
        None => connection::run(stream, peer, unread, service, limits, draining).await,
        Some(tls) => match timeout(limits.first_bytes_within, tls.accept(stream, peer.address.ip())).await {
            Ok(Ok((stream, certificate))) => {
                peer.certificate = certificate.map(Arc::new);
                connection::run(stream, peer, unread, service, limits, draining).await;
            }
            Ok(Err(error)) => tracing::debug!(address = %peer.address, %error, "the handshake of TLS failed"),
            Err(_) => tracing::debug!(address = %peer.address, "the handshake of TLS took too long"),
        },
    }
}

/// True if the error concerns only one connection, which ended before it was accepted.
fn is_of_one(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    ) || error.kind() == io::ErrorKind::Interrupted
}

/// Logs refused connections, at most one line every [`SAID`].
#[derive(Default)]
struct TurnedAway {
    said: Option<Instant>,
    since: u64,
}

impl TurnedAway {
    fn say(&mut self, reason: &str) {
        self.since += 1;
        if self.said.is_none_or(|said| said.elapsed() >= SAID) {
            tracing::warn!(reason, connections = self.since, "connections are refused");
            self.said = Some(Instant::now());
            self.since = 0;
        }
    }
}
