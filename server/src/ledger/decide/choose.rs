//! What claims get. Jobs are chosen by keys once all other commands are decided, and handed out once their rows are read.

use std::{collections::HashMap, sync::Arc};

use super::{
    super::{
        LedgerError,
        claim_selection::{self, Candidates},
        command::{Claim, Command, Reply},
    },
    Decision, Inputs, Log, Ordered, Quotas, is_last,
};
use crate::{
    domain::{
        id::{JobId, OrgId},
        job::Job,
        transition::{self, Redeliver},
    },
    store::Loaded,
};

/// A batch whose commands are decided and whose claims have chosen jobs. It still needs the rows of these jobs.
pub(in crate::ledger) struct Chosen<'a> {
    log: Log,
    commands: Vec<Ordered<'a>>,
    replies: Vec<Result<Reply, LedgerError>>,
    choices: Vec<Choice>,
}

/// What a claim gets.
struct Choice {
    /// Index of its command.
    place: usize,
    jobs: Taken,
    /// True if there are, or may be, more jobs for it.
    has_more: bool,
}

enum Taken {
    /// Ready jobs, in this order.
    Jobs(Vec<JobId>),
    /// A repeat of an earlier claim of the same batch, with the same `request_id`: gets the same jobs.
    SameAs(usize),
}

/// Decides the commands in order, except `Abandon`s, and chooses jobs for claims. Each command sees the effects of those before
/// it. An error is its caller's alone.
pub(in crate::ledger) fn choose<'a>(
    org: OrgId,
    commands: impl IntoIterator<Item = Ordered<'a>>,
    mut loaded: Loaded,
    inputs: Inputs,
    quotas: Quotas,
) -> Chosen<'a> {
    let ready = std::mem::take(&mut loaded.ready);
    let mut log = Log::new(org, loaded, inputs, quotas);
    let commands: Vec<_> = commands.into_iter().collect();
    let mut replies: Vec<_> = commands.iter().map(|ordered| log.decide(*ordered)).collect();
    let mut choices: Vec<Choice> = Vec::new();
    let claims = commands.iter().enumerate().filter_map(|(place, ordered)| match ordered.command {
        Command::Claim(claim) => Some((place, &**claim, ordered.by)),
        _ => None,
    });
    let mut claims = claims.peekable();
    if claims.peek().is_some() {
        let mut candidates = Candidates::new(ready, &log.jobs);
        let mut by_request: HashMap<(&Arc<str>, &Arc<str>), usize> = HashMap::new();
        // A claim that gets none because of this bound has `has_more` set, and asks again.
        let mut left = log.most.unwrap_or(usize::MAX);
        for (place, claim, by) in claims {
            log.by = by.cloned();
            if let Some(reply) = log.renew_held(claim, &candidates) {
                replies[place] = Ok(reply);
                continue;
            }
            if let Err(refused) = log.may_work() {
                replies[place] = Err(refused);
                continue;
            }
            let request = claim.request.as_ref().map(|request| (&claim.worker, request));
            let jobs = match request.and_then(|request| by_request.get(&request)) {
                Some(earlier) => Taken::SameAs(*earlier),
                None => {
                    let jobs = (0..claim.max_jobs.min(left)).map_while(|_| candidates.take(claim));
                    Taken::Jobs(jobs.collect())
                }
            };
            left -= if let Taken::Jobs(jobs) = &jobs { jobs.len() } else { 0 };
            if let (Some(request), Taken::Jobs(jobs)) = (request, &jobs)
                && !jobs.is_empty()
            {
                by_request.insert(request, choices.len());
            }
            choices.push(Choice { place, jobs, has_more: candidates.has_more(claim) });
        }
    }
    Chosen { log, commands, replies, choices }
}

impl Chosen<'_> {
    /// The jobs whose rows [`Self::decide`] takes.
    pub(in crate::ledger) fn wanted(&self) -> impl Iterator<Item = (OrgId, JobId)> {
        let jobs = self.choices.iter().flat_map(|choice| match &choice.jobs {
            Taken::Jobs(jobs) => &jobs[..],
            Taken::SameAs(_) => &[],
        });
        jobs.filter(|id| !self.log.jobs.contains_key(id)).map(|id| (self.log.org, *id))
    }

    /// Hands the jobs out. Then decides `Abandon`s, last so that a repeated claim still finds its leases.
    pub(in crate::ledger) fn decide(mut self, rows: Vec<Job>) -> Decision {
        self.log.jobs.extend(rows.into_iter().map(|job| (job.id, job)));
        let has_claims = self.commands.iter().any(|ordered| matches!(ordered.command, Command::Claim(_)));
        self.hand_out();
        let Self { mut log, commands, mut replies, .. } = self;
        let seen_by_claims = has_claims.then(|| log.ready_now());
        log.by = None;
        for (Ordered { command, .. }, reply) in commands.into_iter().zip(&mut replies) {
            if let Command::Apply { job, command } = command
                && is_last(command)
            {
                *reply = log.apply(*job, command).map(|job| Reply::of_job(job, false));
            }
        }
        let loaded_gen = log.head.ready_gen;
        let ready = log.count_ready();
        if let Some(seen) = seen_by_claims {
            let seen_gen = if seen == ready { log.head.ready_gen } else { loaded_gen };
            for reply in &mut replies {
                if let Ok(Reply::Claimed(claimed)) = reply {
                    claimed.ready_gen = seen_gen;
                }
            }
        }
        let doubts_keys = log.doubts_keys;
        Decision { replies, changes: log.finish(), ready, doubts_keys }
    }

    /// Gives each claim its chosen jobs, as far as its answer has room.
    fn hand_out(&mut self) {
        let (mut taken, mut is_cut): (Vec<Vec<JobId>>, bool) = (Vec::with_capacity(self.choices.len()), false);
        for Choice { place, jobs, has_more } in std::mem::take(&mut self.choices) {
            let Ordered { command, by } = self.commands[place];
            let Command::Claim(claim) = command else { continue };
            self.log.by = by.cloned();
            let jobs = match jobs {
                Taken::SameAs(earlier) => {
                    let again = taken[earlier].clone();
                    again.into_iter().filter_map(|id| self.log.renew(id, claim)).take(claim.max_jobs).collect()
                }
                Taken::Jobs(chosen) => {
                    let wanted = chosen.len();
                    let jobs = self.log.claim(claim, chosen);
                    is_cut |= jobs.len() < wanted;
                    jobs
                }
            };
            taken.push(jobs.iter().map(|job: &Job| job.id).collect());
            self.replies[place] = Ok(Reply::of_claim(jobs, has_more));
        }
        if is_cut {
            // Jobs left out of one answer may be another claim's, so all claims ask again.
            for claimed in self.replies.iter_mut().flatten() {
                if let Reply::Claimed(claimed) = claimed {
                    claimed.has_more = true;
                }
            }
        }
    }
}

impl Log {
    /// If the claim is a repeat, extends the leases that it has; `None` if it has none.
    fn renew_held(&mut self, claim: &Claim, candidates: &Candidates) -> Option<Reply> {
        let request = (Arc::clone(&claim.worker), Arc::clone(claim.request.as_ref()?));
        let held = self.held.get(&request).cloned()?;
        let renewed: Vec<_> = held.into_iter().filter_map(|id| self.renew(id, claim)).take(claim.max_jobs).collect();
        (!renewed.is_empty()).then(|| Reply::of_claim(renewed, candidates.has_more(claim)))
    }

    /// Claims ready jobs, as many as an answer has room for.
    fn claim(&mut self, claim: &Claim, chosen: Vec<JobId>) -> Vec<Job> {
        let command = transition::Command::Claim(transition::Claim {
            worker: Arc::clone(&claim.worker),
            lease: claim.lease,
            request: claim.request.clone(),
        });
        let (mut jobs, mut bytes) = (Vec::with_capacity(chosen.len()), 0);
        for id in chosen {
            bytes += self.jobs.get(&id).map_or(0, claim_selection::weight);
            if !jobs.is_empty() && bytes > claim_selection::ANSWER_BYTES {
                break;
            }
            // Skips jobs that were removed or are not ready any more.
            jobs.extend(self.apply(id, &command));
        }
        jobs
    }

    /// Extends a lease that an earlier call of this claim took, if it is alive.
    fn renew(&mut self, id: JobId, claim: &Claim) -> Option<Job> {
        let job = self.jobs.get(&id)?;
        // A `request_id` identifies a claim only together with its worker.
        if job.lease.as_ref()?.worker != claim.worker {
            return None;
        }
        let token = job.lease_token()?;
        self.apply(id, &transition::Command::Redeliver(Redeliver { token, lease: claim.lease })).ok()
    }
}
