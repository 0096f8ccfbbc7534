//! The probes: plain HTTP on the same port.

use axum::{Router, http::StatusCode, routing::get};
use tokio::sync::watch;

use crate::readiness::Readiness;

/// `/healthz` says that the process answers, whatever the state of its database. `/readyz` says whether the server can
/// be used. The reason why not is only logged, since anybody may ask.
pub(crate) fn probes(readiness: watch::Receiver<Readiness>) -> Router {
    let ready = move || {
        let found = *readiness.borrow();
        async move {
            match found {
                Readiness::Ready => (StatusCode::OK, "ready\n"),
                _ => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
            }
        }
    };
    Router::new().route("/healthz", get(async || "ok\n")).route("/readyz", get(ready))
}
