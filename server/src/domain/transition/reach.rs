//! Reports of workers that were written for a service which checked no transition: they say where a job is, and every
//! arrow that leads there is taken, at once.

use std::sync::Arc;

use super::{Cancel, Command, Ending, News, Outcome, Report, Retry, Step, Tick, Transition, TransitionError};
use crate::domain::{job::Job, status::JobStatus};

/// Says where a job is.
#[derive(Debug, Clone, PartialEq)]
pub struct Reach {
    /// Where; `None`: where it was.
    pub to: Option<Target>,
    /// What its worker is doing.
    pub news: News,
}

/// Where a job is said to be.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// Waiting; if somebody works on it, given back in this way.
    Queued(Ending),
    /// Being worked on.
    Running,
    /// Ended, well or not.
    Ended(Ending),
    /// Given up.
    Canceled,
    /// Out of attempts; nobody but the ledger takes it there.
    DeadLetter,
}

impl Job {
    pub(super) fn reach(&self, reach: &Reach, at: Tick) -> Result<Transition, TransitionError> {
        if self.lease.is_some() {
            return Err(TransitionError::LeaseLost);
        }
        let mut way = self.unchanged();
        for command in self.way_to(reach)? {
            let at = Tick { next_seq: at.next_seq + way.events.len() as i64, ..at };
            let step = way.job.apply(&command, at)?;
            way.job = step.job;
            way.events.extend(step.events);
            way.is_changed |= step.is_changed;
        }
        Ok(way)
    }

    /// The commands that lead there.
    fn way_to(&self, reach: &Reach) -> Result<Vec<Command>, TransitionError> {
        let nobody: Arc<str> = Arc::default();
        let report = |step: Option<Step>, news: &News| Report {
            step,
            news: news.clone(),
            lease: None,
            etag: None,
            actor: Arc::clone(&nobody),
        };
        let news = &reach.news;
        let retry = || Command::Retry(Retry { etag: None, request: None, actor: Arc::clone(&nobody) });
        let cancel =
            || Command::Cancel(Cancel { reason: Arc::clone(&news.message), etag: None, actor: Arc::clone(&nobody) });
        let begin = || Command::Report(report(Some(Step::Run), &News::default()));
        let say = |step| Command::Report(report(step, news));
        let end = |ending: &Ending| say(Some(Step::End(ending.clone())));
        let refused = Err(TransitionError::InvalidTransition { current: self.status });

        use JobStatus::{Canceled, DeadLetter, Failed, Queued, Running, Succeeded};
        Ok(match (self.status, &reach.to) {
            // Where somebody has asked for the job to run again, the same end is another.
            (_, Some(Target::Ended(ending)))
                if (self.status != Queued || self.failures > 0)
                    && self.repeats_outcome(&report(Some(Step::End(ending.clone())), news)) =>
            {
                Vec::new()
            }
            (_, Some(Target::Ended(ending))) if self.has_ended_by(&ending.outcome) => Vec::new(),
            // Who tells of a stage or of progress works on it.
            (Queued, None) if tells_of_work(news) => vec![say(Some(Step::Run))],
            (Queued, None) => Vec::new(),
            (_, None) => vec![say(None)],

            // Of a job that waits there is no stage.
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
    /// True if it has ended in this way, and nothing is said of it but what it has: what is absent stays as it is. A job that was
    /// brought in has ended by a report that is not known; its result is known by its being there.
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

/// True of what nobody says who has not begun: old workers send a progress of 0 with whatever they say.
fn tells_of_work(news: &News) -> bool {
    news.stage.as_ref().is_some_and(|stage| !stage.is_empty()) || news.progress.is_some_and(|progress| progress > 0)
}
