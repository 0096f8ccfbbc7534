//! What a run shows on stderr: progress bars in a terminal, a line now and then otherwise.

use std::{
    collections::HashMap,
    io::{IsTerminal as _, stderr},
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use jobledger_client::{JobEvent, JobStatus};
use jobledger_server::telemetry;
use parking_lot::Mutex;

use crate::terminal;

/// Time between two lines.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// One bar for the whole run, and one for each file in work. Cheap to clone.
#[derive(Clone)]
pub(super) struct Display {
    bars: MultiProgress,
    whole: ProgressBar,
    running: Arc<Mutex<HashMap<String, ProgressBar>>>,
    /// When the last line was printed; `None` in a terminal.
    last_line: Arc<Mutex<Option<Instant>>>,
}

impl Display {
    pub(super) fn new() -> Self {
        let bars = MultiProgress::with_draw_target(terminal::bars());
        let style = ProgressStyle::with_template(
            "{elapsed_precise} [{wide_bar}] {human_pos}/{human_len} files, {per_sec}, ETA {eta}",
        );
        let whole = bars.add(ProgressBar::new(0).with_style(style.expect("a valid template")));
        let last_line = (!stderr().is_terminal()).then(Instant::now);
        Self { bars, whole, running: Arc::default(), last_line: Arc::new(Mutex::new(last_line)) }
    }

    pub(super) fn found(&self) {
        self.whole.inc_length(1);
    }

    /// Counts a file that an earlier run has processed.
    pub(super) fn known(&self) {
        self.done();
    }

    fn done(&self) {
        self.whole.inc(1);
        let mut last_line = self.last_line.lock();
        if last_line.is_some_and(|last| last.elapsed() >= LINE_EVERY) {
            let (done, of) = (self.whole.position(), self.whole.length().unwrap_or_default());
            telemetry::say(&format!("{done} of {of} files"));
            *last_line = Some(Instant::now());
        }
    }

    pub(super) fn show(&self, event: &JobEvent) {
        let mut running = self.running.lock();
        if event.next_status() == JobStatus::Running {
            let bar = running.entry(event.job_id.clone()).or_insert_with(|| {
                let style = ProgressStyle::with_template("  {bar:20} {percent:>3}% {msg}").expect("a valid template");
                self.bars.insert_before(&self.whole, ProgressBar::new(100).with_style(style))
            });
            bar.set_position(u64::try_from(event.progress()).unwrap_or_default());
            bar.set_message(event.stage().to_owned());
        } else if let Some(bar) = running.remove(&event.job_id) {
            bar.finish_and_clear();
            self.bars.remove(&bar);
            drop(running);
            // A job that is queued again is not done.
            if event.next_status() != JobStatus::Queued {
                self.done();
            }
        }
    }

    pub(super) fn finish(&self) {
        self.whole.finish_and_clear();
    }
}
