//! Failover between several servers: calls go to one server until it does not answer, and then to the next.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use tonic::{
    Code, Status,
    body::Body,
    codegen::{Service, http},
    transport::{self, Channel},
};

/// The connections of a [`Client`](crate::Client), one per endpoint, shared by clones. All calls go to the current
/// server. After a call that did not reach it, timed out, or was answered with UNAVAILABLE, the next server is current.
#[derive(Debug, Clone)]
pub struct Connections(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    servers: Vec<Server>,
    /// Index of the server that calls go to.
    current: AtomicUsize,
    /// True if a call failed and no server has answered since.
    is_away: AtomicBool,
}

#[derive(Debug)]
struct Server {
    endpoint: String,
    channel: Channel,
}

impl Connections {
    /// `servers` has at least one endpoint, each with its channel.
    pub(crate) fn new(servers: impl IntoIterator<Item = (String, Channel)>) -> Self {
        let servers = servers.into_iter().map(|(endpoint, channel)| Server { endpoint, channel });
        let (current, is_away) = Default::default();
        Self(Arc::new(Shared { servers: servers.collect(), current, is_away }))
    }

    pub(crate) fn current(&self) -> usize {
        self.0.current.load(Ordering::Relaxed)
    }

    /// Makes the server after `failed` current, unless another call has already done so.
    pub(crate) fn leave(&self, failed: usize, why: &dyn std::fmt::Display) {
        let shared = &*self.0;
        let next = (failed + 1) % shared.servers.len();
        let is_first = shared.current.compare_exchange(failed, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        let was_away = shared.is_away.swap(true, Ordering::Relaxed);
        let endpoint = &shared.servers[failed].endpoint;
        if was_away {
            tracing::debug!(endpoint, error = %why, "still no answer");
        } else if is_first && next != failed {
            let next = &shared.servers[next].endpoint;
            tracing::warn!(endpoint, error = %why, next, "no answer; trying the next endpoint");
        } else {
            tracing::warn!(endpoint, error = %why, "no answer; trying again");
        }
    }

    fn has_answered(&self, server: usize) {
        if self.0.is_away.load(Ordering::Relaxed) && self.0.is_away.swap(false, Ordering::Relaxed) {
            tracing::info!(endpoint = self.0.servers[server].endpoint, "connected again");
        }
    }
}

impl Service<http::Request<Body>> for Connections {
    type Response = http::Response<Body>;
    type Error = transport::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    /// Always ready: each call waits for the readiness of the channel that it uses.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let connections = self.clone();
        let server = connections.current();
        let mut channel = connections.0.servers[server].channel.clone();
        Box::pin(async move {
            let answered = async {
                std::future::poll_fn(|context| channel.poll_ready(context)).await?;
                channel.call(request).await
            };
            let answer = answered.await;
            match &answer {
                Err(error) => connections.leave(server, &with_sources(error)),
                Ok(response) => match Status::from_header_map(response.headers()) {
                    Some(status) if status.code() == Code::Unavailable => connections.leave(server, &status.message()),
                    Some(_) | None => connections.has_answered(server),
                },
            }
            answer
        })
    }
}

/// The error followed by its sources, where tonic puts the reason.
fn with_sources(error: &transport::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
