//! `jobledger confirm-clock` and `renew-log-id`: what an operator states about a database.

use std::{
    error::Error,
    io::{self, Write as _},
    sync::Arc,
    time::Duration,
};

use chrono::TimeDelta;
use jobledger_server::{
    domain::{clock::SystemClock, id::LogId},
    store::{self, DatabaseUrl, FileUse, OpenOptions},
};
use uuid::Uuid;

/// Declares the database's clock to be right, so that retention goes on.
#[tokio::main(flavor = "current_thread")]
pub(crate) async fn confirm_clock(url: &DatabaseUrl) -> Result<(), Box<dyn Error + Send + Sync>> {
    let options = OpenOptions { migrate: false, file_use: FileUse::Beside, ..OpenOptions::new(Arc::new(SystemClock)) };
    let store = store::open(url, options).await?;
    let confirmed = async {
        store.note_clock(TimeDelta::MAX, Duration::ZERO).await?;
        store.audit().confirm_clock().await?;
        store.ping().await
    };
    let confirmed = confirmed.await;
    store.close().await;
    writeln!(io::stdout(), "the database's clock ({}) is confirmed: retention continues", confirmed?.to_rfc3339())?;
    Ok(())
}

/// Gives the log a new identity, which voids all cursors.
#[tokio::main(flavor = "current_thread")]
pub(crate) async fn renew_log_id(url: &DatabaseUrl) -> Result<(), Box<dyn Error + Send + Sync>> {
    let log_id = LogId(Uuid::new_v4());
    url.database()?.set_log_id(log_id).await?;
    writeln!(io::stdout(), "the log has the new id {log_id}: existing cursors are invalid")?;
    Ok(())
}
