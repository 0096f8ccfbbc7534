//! When a process is to end.

use std::future::Future;

use crate::Error;

/// Done once the process is told to end: by SIGTERM, as deployments do it, or by SIGINT, as Ctrl-C does. What
/// [`Worker::run`](crate::worker::Worker::run) takes, so that a deployment costs no job an attempt. From the call on neither signal
/// ends the process by itself.
///
/// # Errors
///
/// [`Error::Runtime`] outside a tokio runtime, or if the system refuses.
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

/// An error outside a tokio runtime, where tasks can't be spawned.
pub(crate) fn in_runtime() -> Result<tokio::runtime::Handle, Error> {
    tokio::runtime::Handle::try_current().map_err(|_| {
        Error::Runtime("this needs a tokio runtime: call it within #[tokio::main], or block_on".to_owned())
    })
}
