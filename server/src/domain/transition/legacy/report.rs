//! Reports of workers that were written for the old service, which checked no transition. A report names the job's status,
//! and the job takes all arrows that lead there, or none.

use std::sync::Arc;

use super::super::{Cancel, Command, Ending, News, Outcome, Report, Retry, Step, Tick, Transition, TransitionError};
use crate::domain::{job::Job, status::JobStatus};

/// Sets a job's status.
#[derive(Debug, Clone, PartialEq)]
pub struct LegacyReport {
    /// The reported status; `None` leaves the status as it is.
    pub to: Option<Target>,
    /// What the worker is doing.
    pub news: News,
}

/// The status that a report names.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// queued. A running job is given back with this ending.
    Queued(Ending),
    /// running.
    Running,
    /// succeeded or failed.
    Ended(Ending),
    /// canceled.
    Canceled,
    /// dead_letter. Refused unless the job is there already: only the ledger takes a job there.
    DeadLetter,
}

impl Job {
    pub(in super::super) fn legacy_report(
        &self,
        report: &LegacyReport,
        at: Tick,
    ) -> Result<Transition, TransitionError> {
        if self.lease.is_some() {
            return Err(TransitionError::LeaseLost);
        }
        let mut way = self.unchanged();
        for command in self.way_to(report)? {
            let at = Tick { next_seq: at.next_seq + way.events.len() as i64, ..at };
            let step = way.job.apply(&command, at)?;
            way.job = step.job;
            way.events.extend(step.events);
            way.is_changed |= step.is_changed;
        }
        Ok(way)
    }

    /// The commands that lead to the reported status.
    fn way_to(&self, legacy: &LegacyReport) -> Result<Vec<Command>, TransitionError> {
        let nobody: Arc<str> = Arc::default();
        let report = |step: Option<Step>, news: &News| Report {
            step,
            news: news.clone(),
            lease: None,
            etag: None,
            actor: Arc::clone(&nobody),
        };
        let news = &legacy.news;
        let retry = || Command::Retry(Retry { etag: None, request: None, actor: Arc::clone(&nobody) });
        let cancel =
            || Command::Cancel(Cancel { reason: Arc::clone(&news.message), etag: None, actor: Arc::clone(&nobody) });
        let begin = || Command::Report(report(Some(Step::Run), &News::default()));
        let say = |step| Command::Report(report(step, news));
        let end = |ending: &Ending| say(Some(Step::End(ending.clone())));
        let refused = Err(TransitionError::InvalidTransition { current: self.status });

        use JobStatus::{Canceled, DeadLetter, Failed, Queued, Running, Succeeded};
        Ok(match (self.status, &legacy.to) {
            // A repeated outcome changes nothing. After a redrive (queued, no failures) it is the outcome of a new attempt.
            (_, Some(Target::Ended(ending)))
                if (self.status != Queued || self.failures > 0)
                    && self.repeats_outcome(&report(Some(Step::End(ending.clone())), news)) =>
            {
                Vec::new()
            }
            (_, Some(Target::Ended(ending))) if self.has_ended_by(&ending.outcome) => Vec::new(),
            // A report with a stage or progress comes from a worker at work, so it starts the job.
            (Queued, None) if tells_of_work(news) => vec![say(Some(Step::Run))],
            (Queued, None) => Vec::new(),
            (_, None) => vec![say(None)],

            // Nobody works on a queued job: its news is dropped.
            (Queued, Some(Target::Queued(_))) => Vec::new(),
            (Running, Some(Target::Queued(ending))) => vec![end(ending)],
            (Failed | DeadLetter | Canceled, Some(Target::Queued(_))) => vec![retry()],

            (Queued | Running, Some(Target::Running)) => vec![say(Some(Step::Run))],
            (Failed | DeadLetter | Canceled, Some(Target::Running)) => vec![retry(), say(Some(Step::Run))],

            (Running, Some(Target::Ended(ending))) => vec![end(ending)],
            (Queued, Some(Target::Ended(ending))) => vec![begin(), end(ending)],
            (Failed | DeadLetter | Canceled, Some(Target::Ended(ending))) => vec![retry(), begin(), end(ending)],

            (Queued | Running, Some(Target::Canceled)) => vec![cancel()],
            (Failed | DeadLetter, Some(Target::Canceled)) => vec![retry(), cancel()],
            (Canceled, Some(Target::Canceled)) | (DeadLetter, Some(Target::DeadLetter)) => Vec::new(),

            (Succeeded, Some(_)) | (_, Some(Target::DeadLetter)) => return refused,
        })
    }
}

impl Job {
    /// True if the job has ended with this outcome and the report adds nothing. A missing result or message counts as
    /// equal. An imported job has no outcome to compare with, so any result counts as equal to the one that it has.
    fn has_ended_by(&self, outcome: &Outcome) -> bool {
        use JobStatus::{DeadLetter, Failed, Succeeded};
        let has = |result: &Option<_>| result.is_none() || self.outcome.is_none() && self.result_at.is_some();
        match outcome {
            Outcome::Succeeded { result } => self.status == Succeeded && has(result),
            Outcome::Failed { result, error, .. } => {
                let last = self.last_error.as_ref();
                matches!(self.status, Failed | DeadLetter)
                    && has(result)
                    && (error.message.is_empty() || last.is_some_and(|last| last.message == error.message))
            }
            Outcome::Released { .. } | Outcome::Canceled { .. } => false,
        }
    }
}

/// True if the news proves that work has begun. A progress of 0 does not: old workers send it with every report.
fn tells_of_work(news: &News) -> bool {
    news.stage.as_ref().is_some_and(|stage| !stage.is_empty()) || news.progress.is_some_and(|progress| progress > 0)
}
