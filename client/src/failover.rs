//! Several servers behind one client: the one that answered last, and the next one when it does not.

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

/// The connections of a [`Client`](crate::Client), one for each of its endpoints. Clones share them. Calls go to one of them, and to
/// the next after a call that did not reach it, or that it answered with UNAVAILABLE.
#[derive(Debug, Clone)]
pub struct Connections(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    servers: Vec<Server>,
    /// Which of them calls go to.
    current: AtomicUsize,
    /// Nothing has been heard of any of them since a call failed.
    is_away: AtomicBool,
}

#[derive(Debug)]
struct Server {
    endpoint: String,
    channel: Channel,
}

impl Connections {
    /// With at least one endpoint, and its channel.
    pub(crate) fn new(servers: impl IntoIterator<Item = (String, Channel)>) -> Self {
        let servers = servers.into_iter().map(|(endpoint, channel)| Server { endpoint, channel });
        let (current, is_away) = Default::default();
        Self(Arc::new(Shared { servers: servers.collect(), current, is_away }))
    }

    /// Which server calls go to now.
    pub(crate) fn current(&self) -> usize {
        self.0.current.load(Ordering::Relaxed)
    }

    /// Has calls go to the next server, unless they do already: `failed` is the one that did not answer.
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
            tracing::warn!(endpoint, error = %why, next, "no answer; going on to the next endpoint");
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

    /// Calls are made ready one by one, on the channel that they go to.
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

/// An error with what lies behind it, which is where tonic has the reason.
fn with_sources(error: &transport::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
