//! What is answered to plain HTTP, on the same port: probes.

use axum::{Router, http::StatusCode, routing::get};
use tokio::sync::watch;

use crate::readiness::Readiness;

/// `/healthz`: the process answers, whatever its database does. `/readyz`: it can be used; why not is for the log, since anybody may ask.
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
