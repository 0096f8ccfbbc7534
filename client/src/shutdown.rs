//! Shutdown signals of the process.

use std::future::Future;

use crate::Error;

/// Completes on SIGTERM, which deployments send, or SIGINT, which Ctrl-C sends. Pass it to
/// [`Worker::run`](crate::worker::Worker::run), so that a deployment costs no job an attempt. After this call neither
/// signal ends the process by itself. Outside Unix it completes on Ctrl-C.
///
/// # Errors
///
/// [`Error::Runtime`] outside a tokio runtime, or if the system can't install the handlers.
pub fn shutdown_signal() -> Result<impl Future<Output = ()> + Send + 'static, Error> {
    in_runtime()?;
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let listen = |kind| signal(kind).map_err(|error| Error::Runtime(format!("can't listen to signals: {error}")));
        let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
        Ok(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
    }
    #[cfg(not(unix))]
    Ok(async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    })
}

/// The current tokio runtime; an error if there is none, because tasks could not be spawned.
pub(crate) fn in_runtime() -> Result<tokio::runtime::Handle, Error> {
    tokio::runtime::Handle::try_current().map_err(|_| {
        Error::Runtime("this needs a tokio runtime: call it within #[tokio::main], or block_on".to_owned())
    })
}
