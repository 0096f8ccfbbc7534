//! `jobledger verify`.

use std::{
    error::Error,
    io::{self, Write as _},
    process::ExitCode,
    sync::Arc,
};

use jobledger_server::{
    domain::{clock::SystemClock, id::OrgId},
    store::{self, DatabaseUrl, FileUse, OpenOptions},
    telemetry,
    verify::{self, Progress},
};
use uuid::Uuid;

use crate::terminal::Display;

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
    match run(url, org) {
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
async fn run(url: &DatabaseUrl, org: Option<Uuid>) -> Result<AuditOutcome, Box<dyn Error + Send + Sync>> {
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
        writeln!(out, "org {org}: not verified, because retention kept removing its jobs; try again")?;
    }
    Ok(match (verified.differences.is_empty(), verified.untold.is_empty()) {
        (false, _) => AuditOutcome::Differences,
        (true, false) => AuditOutcome::Unverified,
        (true, true) => AuditOutcome::Nothing,
    })
}
