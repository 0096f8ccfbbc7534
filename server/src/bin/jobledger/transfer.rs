//! `jobledger import` and `jobledger export`.

use std::{
    fmt::{self, Write as _},
    fs::{self, File},
    io::{self, BufWriter, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use jobledger_client::shutdown_signal;
use jobledger_server::{
    domain::{clock::SystemClock, id::OrgId},
    files,
    ledger::{Ledger, Limits},
    legacy::{
        export,
        import::{self, ImportRequest, Observer, ReportedRow, RowVerdict, Summary, Table},
    },
    store::{self, DatabaseUrl, FileUse, OpenOptions, Store},
    telemetry,
};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::{
    cli::{ExportArgs, ImportArgs},
    terminal::{self, Failure},
};

/// Exit code: some rows are not in the ledger.
const INCOMPLETE: u8 = 1;
/// Exit code: the import failed.
const FAILED: u8 = 2;
/// The pause after each page beside a server on the same SQLite file. A server that waits for the file tries every 25 to
/// 100 ms.
const BREATHER: Duration = Duration::from_millis(25);
/// How often progress is printed if standard error is no terminal.
const PAUSE: Duration = Duration::from_secs(10);

/// Imports the old jobs, and prints the outcome.
pub(crate) fn import(args: ImportArgs) -> ExitCode {
    match terminal::block_on(bring_in(args)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => INCOMPLETE.into(),
        Err(error) => {
            telemetry::say(&format!("jobledger: {error}"));
            FAILED.into()
        }
    }
}

async fn bring_in(args: ImportArgs) -> Result<bool, Failure> {
    let began = Instant::now();
    let progress = Progress::new(args.refused.clone(), args.dry_run);
    let (bar, interrupted) = (progress.bar.clone(), shutdown_signal()?);
    // A task of its own, so that a signal gets through while printing blocks.
    let mut work = AbortOnDropHandle::new(tokio::spawn(async move {
        let store = open_target(&args.database.database_url, args.dry_run).await?;
        let request = ImportRequest {
            url: args.from,
            schema: args.schema,
            org: OrgId(args.org.unwrap_or(Uuid::nil())),
            is_dry_run: args.dry_run,
            breather: if args.database.database_url.database()?.is_served()? { BREATHER } else { Duration::ZERO },
        };
        let summary = import_into(store, &request, progress).await?;
        let shown = in_words(&summary, &args.refused, args.dry_run, began.elapsed())?;
        terminal::print(shown).await?;
        Ok(summary.is_reconciled() && summary.refused_rows() == 0)
    }));
    tokio::select! {
        done = &mut work => done?,
        () = interrupted => {
            bar.finish_and_clear();
            Err("interrupted: imported rows are kept; run the import again to continue".into())
        }
    }
}

async fn import_into(
    store: Option<Arc<dyn Store>>,
    request: &ImportRequest,
    mut progress: Progress,
) -> Result<Summary, Failure> {
    let imported = match store {
        None => import::run(request, None, &mut progress).await,
        Some(store) => {
            let (ledger, lanes) = Ledger::new(Arc::clone(&store), Limits::default());
            let lanes = tokio::spawn(lanes);
            let imported = import::run(request, Some(&ledger), &mut progress).await;
            ledger.close();
            lanes.await?;
            store.close().await;
            imported
        }
    };
    progress.finish()?;
    Ok(imported?)
}

/// Opens the target as a server would. `None` if a dry run finds no database.
async fn open_target(url: &DatabaseUrl, is_dry_run: bool) -> Result<Option<Arc<dyn Store>>, Failure> {
    let options = OpenOptions { write_connections: 4, read_connections: 2, ..OpenOptions::new(Arc::new(SystemClock)) };
    if !is_dry_run {
        return Ok(Some(store::open(url, OpenOptions { file_use: FileUse::Prepare, ..options }).await?));
    }
    if !url.database()?.exists().await? {
        return Ok(None);
    }
    Ok(Some(store::open(url, OpenOptions { migrate: false, file_use: FileUse::Beside, ..options }).await?))
}

fn in_words(summary: &Summary, refused: &Path, is_dry_run: bool, took: Duration) -> Result<String, fmt::Error> {
    let mut out = String::new();
    let Summary { new, updated, unchanged, ahead, erased, adjusted, superseded, events, .. } = summary;
    let rows = summary.total().refused + new + updated + unchanged + ahead + erased;
    let would = if is_dry_run { "would be " } else { "" };
    writeln!(
        out,
        "{rows} rows: {new} {would}new, {updated} {would}updated, {unchanged} unchanged, {ahead} newer in the ledger, {} {would}refused",
        summary.refused_rows()
    )?;
    if *erased > 0 {
        writeln!(out, "{erased} rows were skipped, since their jobs were erased in the ledger")?;
    }
    if *superseded > 0 {
        writeln!(out, "{superseded} rows of jobs were merged with the rows of job that have the same id")?;
    }
    if *adjusted > 0 || summary.refused_rows() > 0 {
        let file = refused.display();
        writeln!(out, "{adjusted} rows were adjusted; {file} lists adjusted and refused rows with reasons")?;
    }
    let seconds = took.as_secs_f64().max(0.001);
    let written = new + updated + events;
    writeln!(
        out,
        "{events} events {would}written; {took:.1?}, {:.0} rows/s, {:.0} jobs and events written/s",
        rows as f64 / seconds,
        if is_dry_run { 0.0 } else { written as f64 / seconds }
    )?;
    writeln!(out)?;
    write!(out, "{summary}")?;
    if !summary.is_reconciled() {
        writeln!(out, "rows were added or changed during the import: run the import again")?;
    }
    Ok(out)
}

/// Shows the progress of an import, and writes the rows that were refused or adjusted to a file.
struct Progress {
    bar: ProgressBar,
    is_terminal: bool,
    next: Instant,
    path: PathBuf,
    /// Created with the first row.
    file: Option<BufWriter<File>>,
    is_dry_run: bool,
}

impl Progress {
    fn new(path: PathBuf, is_dry_run: bool) -> Self {
        let is_terminal = io::stderr().is_terminal();
        let style =
            ProgressStyle::with_template("{bar:40} {pos}/{len} rows, {per_sec}, {eta} left").expect("a valid template");
        let bar = ProgressBar::with_draw_target(Some(0), terminal::bars()).with_style(style);
        Self { bar, is_terminal, next: Instant::now() + PAUSE, path, file: None, is_dry_run }
    }

    fn clear(&self) {
        self.bar.finish_and_clear();
    }

    fn finish(&mut self) -> io::Result<()> {
        self.clear();
        self.file.take().map_or(Ok(()), |mut file| file.flush())
    }
}

impl Observer for Progress {
    fn begin(&mut self, tables: &[Table], rows: u64) -> io::Result<()> {
        let cannot = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", self.path.display()));
        // Removes the file of an earlier run: this run reports every row again. Then tries whether a file can be created.
        let try_out = || {
            files::remove_earlier(&self.path)?;
            files::create_new(&self.path)?;
            fs::remove_file(&self.path)
        };
        try_out().map_err(cannot)?;
        let names: Vec<_> = tables.iter().map(|table| table.name()).collect();
        telemetry::say(&format!("{rows} rows in {}", names.join(" and ")));
        self.bar.set_length(rows);
        Ok(())
    }

    fn advance(&mut self, rows: u64) {
        self.bar.inc(rows);
        if !self.is_terminal && Instant::now() >= self.next {
            self.next = Instant::now() + PAUSE;
            let (done, all) = (self.bar.position(), self.bar.length().unwrap_or_default());
            let (rate, left) = (self.bar.per_sec(), self.bar.eta());
            telemetry::say(&format!("{done} of {all} rows, {rate:.0}/s, {left:.0?} left"));
        }
    }

    fn report(&mut self, row: &ReportedRow<'_>) -> io::Result<()> {
        if self.file.is_none() {
            self.file = Some(BufWriter::new(files::create_new(&self.path)?));
        }
        if let Some(file) = &mut self.file {
            serde_json::to_writer(&mut *file, row)?;
            file.write_all(b"\n")?;
        }
        if self.is_dry_run && row.verdict == RowVerdict::Refused {
            let line = format!("{} {}: {}", row.table.name(), row.id, row.reasons.join("; "));
            self.bar.suspend(|| writeln!(io::stdout(), "{line}"))?;
        }
        Ok(())
    }
}

/// Removes the file of an earlier run: this run reports again what still applies. Then tries whether a file can be created.
#[tokio::main(flavor = "current_thread")]
pub(crate) async fn export(args: ExportArgs) -> Result<(), Failure> {
    let options = OpenOptions { migrate: false, file_use: FileUse::Beside, ..OpenOptions::new(Arc::new(SystemClock)) };
    let store = store::open(&args.database.database_url, options).await?;
    let org = OrgId(args.org.unwrap_or(Uuid::nil()));
    let mut out: Box<dyn io::Write + Send> = match &args.output {
        Some(path) => Box::new(files::create_new(path).map_err(|error| format!("{}: {error}", path.display()))?),
        None => Box::new(io::stdout()),
    };
    let exported = export::to_old_table(&*store, org, &args.schema, &mut out).await;
    let others = export::other_orgs(&*store, org).await;
    store.close().await;
    let jobs = exported?;
    telemetry::say(&format!("{jobs} jobs exported"));
    match others? {
        0 => {}
        n => telemetry::say(&format!(
            "jobs of {n} other orgs were not exported: the old table has no org column; use --org UUID"
        )),
    }
    Ok(())
}
