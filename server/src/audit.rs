//! `jobledger verify`, `backup`, `restore`, `renew-log-id` and `confirm-clock`.

use std::{
    error::Error,
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::TimeDelta;
use jobledger_server::{
    domain::{
        clock::{Clock as _, SystemClock},
        id::OrgId,
    },
    store::{self, DatabaseUrl, FileUse, OpenOptions, RevokeTokens},
    telemetry::{self, Stderr},
    verify::{self, Progress},
};
use uuid::Uuid;

/// Exit code: there are differences.
const DIFFERENT: u8 = 1;
/// Exit code: verification was not possible, or not of all orgs.
const UNVERIFIED: u8 = 2;

enum AuditOutcome {
    Nothing,
    Differences,
    Unverified,
}

/// Verifies, and prints the differences.
pub(crate) fn verify(url: &DatabaseUrl, org: Option<Uuid>) -> ExitCode {
    match look(url, org) {
        Ok(AuditOutcome::Nothing) => ExitCode::SUCCESS,
        Ok(AuditOutcome::Differences) => DIFFERENT.into(),
        Ok(AuditOutcome::Unverified) => UNVERIFIED.into(),
        Err(error) => {
            telemetry::say(&format!("jobledger: {error}"));
            UNVERIFIED.into()
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn look(url: &DatabaseUrl, org: Option<Uuid>) -> Result<AuditOutcome, Box<dyn Error + Send + Sync>> {
    let options = OpenOptions { migrate: false, file_use: FileUse::Beside, ..OpenOptions::new(Arc::new(SystemClock)) };
    let store = store::open(url, options).await?;
    let mut display = Display::new();
    let verified = verify::verify(&*store, org.map(OrgId), |Progress { org, orgs, jobs }| {
        display.show(|| format!("{orgs} orgs and {jobs} jobs verified, in org {org}"));
    })
    .await;
    display.clear();
    store.close().await;
    let verified = verified?;
    let mut out = io::stdout().lock();
    for difference in &verified.differences {
        writeln!(out, "{difference}")?;
    }
    let (orgs, jobs, events) = (verified.orgs, verified.jobs, verified.events);
    let found = match verified.differences.len() {
        0 => "no difference".to_owned(),
        1 => "1 difference".to_owned(),
        n => format!("{n} differences"),
    };
    writeln!(out, "verified {orgs} orgs, {jobs} jobs, {events} events: {found}")?;
    for org in &verified.untold {
        writeln!(out, "org {org}: could not be verified: retention went on removing its jobs")?;
    }
    Ok(match (verified.differences.is_empty(), verified.untold.is_empty()) {
        (false, _) => AuditOutcome::Differences,
        (true, false) => AuditOutcome::Unverified,
        (true, true) => AuditOutcome::Nothing,
    })
}

/// Shows progress: on a terminal a line that is overwritten every 200 ms, elsewhere a line every 10 s.
struct Display {
    is_terminal: bool,
    next: Instant,
}

impl Display {
    fn new() -> Self {
        let is_terminal = io::stderr().is_terminal();
        Self { is_terminal, next: Instant::now() + Self::pause(is_terminal) }
    }

    fn pause(is_terminal: bool) -> Duration {
        if is_terminal { Duration::from_millis(200) } else { Duration::from_secs(10) }
    }

    fn show(&mut self, how_far: impl FnOnce() -> String) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + Self::pause(self.is_terminal);
        let (before, after) = if self.is_terminal { ("\r\x1b[K", "") } else { ("", "\n") };
        self.draw(&format!("{before}{}{after}", how_far()));
    }

    fn clear(&self) {
        if self.is_terminal {
            self.draw("\r\x1b[K");
        }
    }

    fn draw(&self, text: &str) {
        // This can't fail: `Stderr` queues the text or drops it.
        let _ = Stderr.write_all(text.as_bytes());
    }
}

/// Copies an SQLite database to a file.
#[tokio::main(flavor = "current_thread")]
pub(crate) async fn backup(url: &DatabaseUrl, file: &Path) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut display = Display::new();
    let log_id = store::backup(url, file, |written, of| display.show(|| how_much(written, of))).await?;
    display.clear();
    let bytes = std::fs::metadata(file)?.len();
    writeln!(
        io::stdout(),
        "{}: {:.1} MiB; its log is {log_id}, so cursors of today are void where it is restored",
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
    let restored =
        store::restore(url, copy, tokens, SystemClock.now(), |written, of| display.show(|| how_much(written, of)))
            .await?;
    display.clear();
    let mut out = io::stdout().lock();
    writeln!(out, "{} is in place; its log is {}: cursors of before are void", copy.display(), restored.log_id)?;
    if let Some(replaced) = restored.replaced {
        writeln!(out, "what was there is kept as {}", replaced.display())?;
    }
    match (restored.revoked, revoke_all) {
        (Some(revoked), true) => writeln!(out, "API tokens revoked: {revoked}, which are all that it had")?,
        (Some(revoked), false) => writeln!(out, "API tokens that were revoked since, and stay so: {revoked}")?,
        (None, _) => writeln!(
            out,
            "API tokens that were revoked since it was made hold again: see `jobledger token list`; --revoke-tokens would have revoked all"
        )?,
    }
    Ok(())
}

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
    writeln!(io::stdout(), "the clock says {} and is taken for right: retention goes on", confirmed?.to_rfc3339())?;
    Ok(())
}

/// Gives the log a new identity, which voids all cursors.
#[tokio::main(flavor = "current_thread")]
pub(crate) async fn renew_log_id(url: &DatabaseUrl) -> Result<(), Box<dyn Error + Send + Sync>> {
    let log_id = store::renew_log_id(url).await?;
    writeln!(io::stdout(), "the log is {log_id} from now on: cursors of before are void")?;
    Ok(())
}
