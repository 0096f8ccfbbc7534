//! `jobledger backup` and `restore`.

use std::{
    error::Error,
    io::{self, Write as _},
    path::Path,
};

use jobledger_server::{
    domain::clock::{Clock as _, SystemClock},
    store::{DatabaseUrl, RevokeTokens},
};

use crate::terminal::Display;

/// Copies an SQLite database to a file.
#[tokio::main(flavor = "current_thread")]
pub(crate) async fn backup(url: &DatabaseUrl, file: &Path) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut display = Display::new();
    let mut progress = |written, of| display.show(|| how_much(written, of));
    let log_id = url.database()?.back_up(file, &mut progress).await?;
    display.clear();
    let bytes = std::fs::metadata(file)?.len();
    writeln!(
        io::stdout(),
        "{}: {:.1} MiB, log id {log_id}; after a restore, existing cursors are invalid",
        file.display(),
        mib(bytes)
    )?;
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn how_much(written: u64, of: u64) -> String {
    format!("{:.1} of about {:.1} MiB written", mib(written), mib(of))
}

/// Puts a copy in the place of a database.
#[tokio::main(flavor = "current_thread")]
pub(crate) async fn restore(
    url: &DatabaseUrl,
    copy: &Path,
    revoke_all: bool,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut display = Display::new();
    let tokens = if revoke_all { RevokeTokens::All } else { RevokeTokens::RevokedSince };
    let mut progress = |written, of| display.show(|| how_much(written, of));
    let restored = url.database()?.restore(copy, tokens, SystemClock.now(), &mut progress).await?;
    display.clear();
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{} is restored; its new log id is {}: existing cursors are invalid",
        copy.display(),
        restored.log_id
    )?;
    if let Some(replaced) = restored.replaced {
        writeln!(out, "the replaced database is kept as {}", replaced.display())?;
    }
    match (restored.revoked, revoke_all) {
        (Some(revoked), true) => writeln!(out, "all API tokens of the copy were revoked: {revoked}")?,
        (Some(revoked), false) => {
            writeln!(out, "API tokens revoked since the copy was made, still revoked: {revoked}")?
        }
        (None, _) => writeln!(
            out,
            "API tokens revoked since the copy was made are valid again: check `jobledger token list`, or restore with --revoke-tokens"
        )?,
    }
    Ok(())
}
