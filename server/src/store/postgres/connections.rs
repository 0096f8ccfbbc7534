//! A pool that reuses a connection only after work that ended well.
//!
//! sqlx's pool takes a connection back whatever its user was doing when it was dropped, and has returned some with an open
//! transaction. Here a connection comes back only by [`Connection::give_back`]. One that is dropped otherwise (after a failure,
//! at a time-out, or with its task) is closed, and PostgreSQL rolls back its transaction. A commit may go on in its backend:
//! the connection keeps its slot until that backend is gone (`lingering.rs`).

use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection as _, PgConnection, Row as _,
    postgres::{PgArguments, PgConnectOptions, PgRow},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{
    error::{is_lost, store_error},
    lingering::{Backend, Lingering},
};
use crate::store::StoreError;

/// Encodes the arguments of a statement, in order.
macro_rules! arguments {
    () => { sqlx::postgres::PgArguments::default() };
    ($($value:expr),+) => {{
        let mut arguments = sqlx::postgres::PgArguments::default();
        $(sqlx::Arguments::add(&mut arguments, $value).map_err($crate::store::postgres::connections::not_encoded)?;)+
        arguments
    }};
}
pub(super) use arguments;

pub(super) fn not_encoded(error: sqlx::error::BoxDynError) -> StoreError {
    StoreError::Refused(error.to_string())
}

/// How long work waits for a free connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long opening a connection and setting it up may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a read may take, its answer included. A second above `statement_timeout`, whose error arrives first.
const READ_TIMEOUT: Duration = Duration::from_secs(11);

/// A bounded pool of connections with the same settings.
pub(super) struct Connections {
    options: PgConnectOptions,
    /// Sets up a new connection, then asks for its backend. SQL, since a pooler may not pass on start-up parameters.
    settings: String,
    idle: Mutex<Vec<(PgConnection, Backend)>>,
    places: Arc<Semaphore>,
    lingering: Lingering,
}

impl Connections {
    /// Opens no connection yet.
    pub(super) fn new(options: PgConnectOptions, settings: &[&[(&str, &str)]], max: u32) -> Arc<Self> {
        let set = |(name, value): &(&str, &str)| format!("SET {name} = '{value}'; ");
        let mut settings: String = settings.iter().flat_map(|settings| settings.iter().map(set)).collect();
        settings += "/* new */ SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()";
        let (idle, places) = (Mutex::default(), Arc::new(Semaphore::new(max as usize)));
        Arc::new(Self { options, settings, idle, places, lingering: Lingering::default() })
    }

    /// Takes a connection. It waits for a free slot for 5 s at most. A reused connection may have died while it was idle.
    pub(super) async fn take(self: &Arc<Self>) -> Result<Connection, StoreError> {
        let place = timeout(ACQUIRE_TIMEOUT, Arc::clone(&self.places).acquire_owned()).await;
        let place = place
            .map_err(|_| StoreError::Unavailable("no connection became free in time".to_owned()))?
            .map_err(|_| StoreError::Unavailable("the store is closed".to_owned()))?;
        let idle = self.idle().pop();
        let is_reused = idle.is_some();
        let (inner, backend) = match idle {
            Some(connection) => connection,
            None => self.open().await?,
        };
        let (inner, place) = (Some(inner), Some(place));
        Ok(Connection { inner, backend, is_reused, is_committing: false, home: Arc::clone(self), place })
    }

    /// Opens this many connections, to be used later.
    pub(super) async fn open_all(self: &Arc<Self>, n: u32) -> Result<(), StoreError> {
        for _ in 0..n {
            let opened = self.open().await?;
            self.idle().push(opened);
        }
        Ok(())
    }

    /// Opens a connection outside the pool, and asks which backend serves it.
    pub(super) async fn open(&self) -> Result<(PgConnection, Backend), StoreError> {
        let open = async {
            let mut connection = self.options.connect().await?;
            let row = sqlx::raw_sql(AssertSqlSafe(self.settings.as_str())).fetch_one(&mut connection).await?;
            let backend = Backend { pid: row.try_get(0)?, started: row.try_get(1)? };
            Ok((connection, backend))
        };
        match timeout(CONNECT_TIMEOUT, open).await {
            Ok(opened) => opened.map_err(store_error),
            Err(_) => Err(StoreError::Unavailable("the database did not answer a new connection in time".to_owned())),
        }
    }

    /// Runs one statement outside any transaction and returns all of its rows. The statement runs to its end even if this
    /// future is dropped, so a caller that goes away costs no connection.
    pub(super) async fn fetch(
        self: &Arc<Self>,
        sql: &'static str,
        arguments: PgArguments,
    ) -> Result<Vec<PgRow>, StoreError> {
        let connections = Arc::clone(self);
        let work = async move {
            let mut connection = connections.take().await?;
            loop {
                let query = sqlx::query_with(AssertSqlSafe(sql), arguments.clone());
                match query.fetch_all(&mut *connection).await {
                    Ok(rows) => {
                        connection.give_back();
                        return Ok(rows);
                    }
                    Err(error) if connection.is_reused && is_lost(&error) => connection.replace().await?,
                    Err(error) => {
                        if !is_lost(&error) {
                            connection.give_back();
                        }
                        return Err(store_error(error));
                    }
                }
            }
        };
        let bounded = tokio::spawn(timeout(ACQUIRE_TIMEOUT + READ_TIMEOUT, work));
        match bounded.await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(StoreError::Unavailable("a read took too long".to_owned())),
            Err(ended) => Err(StoreError::Unavailable(ended.to_string())),
        }
    }

    /// The backends that occupy slots without a connection.
    pub(super) fn lingering(&self) -> &Lingering {
        &self.lingering
    }

    pub(super) fn is_closed(&self) -> bool {
        self.places.is_closed()
    }

    /// Closes the idle connections. None can be taken afterwards.
    pub(super) async fn close(&self) {
        self.places.close();
        let idle = std::mem::take(&mut *self.idle());
        for (connection, _) in idle {
            // A courtesy: the server notices the end of the socket anyway.
            let _ = connection.close().await;
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(PgConnection, Backend)>> {
        self.idle.lock()
    }
}

/// A connection in use. Dropping it closes it.
pub(super) struct Connection {
    /// `None` only while the connection is given back or dropped.
    inner: Option<PgConnection>,
    backend: Backend,
    is_reused: bool,
    /// A commit may be under way, so the backend may outlive the connection.
    is_committing: bool,
    home: Arc<Connections>,
    /// The slot in the pool. `None` only once this is dropped.
    place: Option<OwnedSemaphorePermit>,
}

impl Connection {
    /// True if the connection was used before, and so may have died while it was idle.
    pub(super) fn is_reused(&self) -> bool {
        self.is_reused
    }

    /// Opens a new connection instead of this one. Closes the idle ones too, which are as old.
    pub(super) async fn replace(&mut self) -> Result<(), StoreError> {
        self.home.idle().clear();
        let (inner, backend) = self.home.open().await?;
        (self.inner, self.backend, self.is_reused) = (Some(inner), backend, false);
        Ok(())
    }

    /// Call this before a commit is sent. A connection that is dropped from then on keeps its slot until the commit is over.
    pub(super) fn commits(&mut self) {
        self.is_committing = true;
    }

    /// Returns the connection to the pool. No transaction may be open on it.
    pub(super) fn give_back(mut self) {
        if let Some(connection) = self.inner.take()
            && !self.home.places.is_closed()
        {
            self.home.idle().push((connection, self.backend));
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let was_given_up = self.inner.take().is_some() && self.is_committing;
        if let Some(place) = self.place.take().filter(|_| was_given_up) {
            self.home.lingering.keep(self.backend, place, &self.home);
        }
    }
}

impl Deref for Connection {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.inner.as_ref().expect("it is there until it is given back")
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.inner.as_mut().expect("it is there until it is given back")
    }
}
