//! A server inside another program.

use std::{fs, io, path::PathBuf};

use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use uuid::Uuid;

use crate::{Config, ServeError, Server, store::DatabaseUrl};

/// A server of this process, on a free port of loopback: for tests of workers and producers, against the real thing.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let server = jobledger_server::InProcess::start().await?;
/// let client = jobledger_client::Client::new(server.endpoint())?;
/// // … create jobs, run workers, look at what became of them …
/// server.stop().await?;
/// # Ok(())
/// # }
/// ```
///
/// Dropped, it stops without being waited for.
pub struct InProcess {
    endpoint: String,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), ServeError>>,
    /// Removed with everything in it.
    folder: Option<Folder>,
}

impl InProcess {
    /// A server on an SQLite database of its own, which is removed in the end. Its port is bound: it can be called at once.
    ///
    /// # Errors
    ///
    /// If there is no room for it, or no port.
    pub async fn start() -> Result<Self, ServeError> {
        let folder = Folder::new()?;
        let url = DatabaseUrl::Sqlite(folder.0.join("ledger.db").display().to_string());
        let mut server = Self::start_with(Config::new(url)).await?;
        server.folder = Some(folder);
        Ok(server)
    }

    /// A server that is configured as the caller likes.
    ///
    /// # Errors
    ///
    /// As for [`Server::open`].
    pub async fn start_with(config: Config) -> Result<Self, ServeError> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let server = Server::open(listener, config).await?;
        let endpoint = format!("http://{}", server.local_addr()?);
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        Ok(Self { endpoint, stop: Some(stop), running, folder: None })
    }

    /// Its URL: what a client connects to.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Stops it, and waits until it is gone.
    ///
    /// # Errors
    ///
    /// If it has failed.
    pub async fn stop(mut self) -> Result<(), ServeError> {
        drop(self.stop.take());
        let ended = self.running.await;
        drop(self.folder.take());
        ended.unwrap_or(Err(ServeError::LedgerStopped))
    }
}

/// A directory of its own among the temporary ones.
struct Folder(PathBuf);

impl Folder {
    fn new() -> io::Result<Self> {
        let folder = std::env::temp_dir().join(format!("jobledger-{}", Uuid::new_v4().simple()));
        fs::create_dir(&folder)?;
        Ok(Self(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What can't be removed is the system's to clean up.
        let _ = fs::remove_dir_all(&self.0);
    }
}
