//! A server inside another program.

use std::{fs, io, path::PathBuf};

use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use uuid::Uuid;

use crate::{Config, ServeError, Server, store::DatabaseUrl};

/// A server in this process, on a free loopback port: for tests of workers and producers against a real server.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let server = jobledger_server::InProcess::start().await?;
/// let client = jobledger_client::Client::new(server.endpoint())?;
/// // … create jobs, run workers, check what became of the jobs …
/// server.stop().await?;
/// # Ok(())
/// # }
/// ```
///
/// Dropping it stops the server without waiting for it.
pub struct InProcess {
    endpoint: String,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), ServeError>>,
    /// The database's directory, which is removed with the server.
    folder: Option<Folder>,
}

impl InProcess {
    /// Starts a server on an SQLite database of its own, which is removed at the end. The port is bound, so clients can
    /// connect at once.
    ///
    /// # Errors
    ///
    /// If the database can't be created or no port is free.
    pub async fn start() -> Result<Self, ServeError> {
        let folder = Folder::new()?;
        let url = DatabaseUrl::Sqlite(folder.0.join("ledger.db").display().to_string());
        let mut server = Self::start_with(Config::new(url)).await?;
        server.folder = Some(folder);
        Ok(server)
    }

    /// Starts a server with this configuration.
    ///
    /// # Errors
    ///
    /// If no port is free; else those of [`Server::open`].
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

    /// The URL that a client connects to.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Stops the server, and waits until it has ended.
    ///
    /// # Errors
    ///
    /// If the server has failed.
    pub async fn stop(mut self) -> Result<(), ServeError> {
        drop(self.stop.take());
        let ended = self.running.await;
        drop(self.folder.take());
        ended.unwrap_or(Err(ServeError::LedgerStopped))
    }
}

/// A new directory in the system's temporary directory. Dropping it removes it.
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
        // The system cleans up what can't be removed here.
        let _ = fs::remove_dir_all(&self.0);
    }
}
