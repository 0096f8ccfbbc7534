//! What claims get. Jobs are chosen by keys once all other commands are decided, and handed out once their rows are read.

use std::{collections::HashMap, sync::Arc};

use super::{
    super::{
        LedgerError,
        claim_call::Claimed,
        claim_selection::{self, Candidates},
        command::{Claim, Explain, Explanation},
        pending::Pending,
        submission::Submission,
    },
    Decision, Inputs, Log, Quotas,
};
use crate::{
    domain::{
        id::{JobId, OrgId},
        job::Job,
        job_type::ALL_TYPES,
        transition::{self, Redeliver},
    },
    store::{FoundReady, Loaded},
};

/// A batch whose commands are decided and whose claims have chosen jobs. It still needs the rows of these jobs.
pub(in crate::ledger) struct Chosen<'a> {
    log: Log,
    commands: &'a mut [Pending],
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

/// Decides the commands in order, except jobs given back, and chooses jobs for claims. Each command sees the effects of those
/// before it. An error is its caller's alone.
pub(in crate::ledger) fn choose(
    org: OrgId,
    commands: &mut [Pending],
    mut loaded: Loaded,
    inputs: Inputs,
    quotas: Quotas,
) -> Chosen<'_> {
    let ready = std::mem::take(&mut loaded.ready);
    let mut log = Log::new(org, loaded, inputs, quotas);
    log.has_company = commands.len() > 1;
    commands.iter_mut().for_each(|command| log.decide(command));
    let choices = log.choose(commands, ready);
    Chosen { log, commands, choices }
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

    /// The org.
    pub(in crate::ledger) fn org(&self) -> OrgId {
        self.log.org
    }

    /// The last `seq` of the org's log before the batch.
    pub(in crate::ledger) fn loaded_seq(&self) -> i64 {
        self.log.loaded_head.seq
    }

    /// Hands the jobs out. Then takes back jobs that were not delivered, last so that a repeated claim still finds its leases.
    pub(in crate::ledger) fn decide(mut self, rows: Vec<Job>) -> Decision {
        self.log.jobs.extend(rows.into_iter().map(|job| (job.id, job)));
        self.hand_out();
        let Self { mut log, commands, .. } = self;
        let has_claims = commands.iter().any(|pending| matches!(pending.command, Submission::Claim(..)));
        let seen_by_claims = has_claims.then(|| log.ready_now());
        log.by = None;
        for pending in &*commands {
            if let Submission::GiveBack(given) = &pending.command {
                // Nothing happens if the lease is over or was extended meanwhile.
                let _ = log.apply(given.token.job, &transition::Command::GiveBack(*given));
            }
        }
        let loaded_gen = log.head.ready_gen;
        let ready = log.count_ready();
        if let Some(seen) = seen_by_claims {
            let seen_gen = if seen == ready { log.head.ready_gen } else { loaded_gen };
            for claimed in claimed(commands) {
                claimed.ready_gen = seen_gen;
            }
        }
        let doubts_keys = log.doubts_keys;
        Decision { changes: log.finish(), ready, doubts_keys }
    }

    /// Gives each claim its chosen jobs, as far as its answer has room.
    fn hand_out(&mut self) {
        let (mut taken, mut is_cut): (Vec<Vec<JobId>>, bool) = (Vec::with_capacity(self.choices.len()), false);
        for Choice { place, jobs, has_more } in std::mem::take(&mut self.choices) {
            let Pending { command, actor, .. } = &mut self.commands[place];
            let Submission::Claim(claim, reply) = command else { continue };
            self.log.by.clone_from(actor);
            let jobs = match jobs {
                Taken::SameAs(earlier) => {
                    let again = taken[earlier].clone();
                    again.into_iter().filter_map(|id| self.log.redeliver(id, claim)).take(claim.max_jobs).collect()
                }
                Taken::Jobs(chosen) => {
                    let wanted = chosen.len();
                    let jobs = self.log.claim(claim, chosen);
                    is_cut |= jobs.len() < wanted;
                    jobs
                }
            };
            taken.push(jobs.iter().map(|job: &Job| job.id).collect());
            reply.decide(Ok(Claimed::new(jobs, has_more)));
        }
        if is_cut {
            // Jobs left out of one answer may be another claim's, so all claims ask again.
            for claimed in claimed(self.commands) {
                claimed.has_more = true;
            }
        }
    }
}

/// What was decided on the claims among these commands that were not refused.
fn claimed(commands: &mut [Pending]) -> impl Iterator<Item = &mut Claimed> {
    commands.iter_mut().filter_map(|pending| match &mut pending.command {
        Submission::Claim(_, reply) => reply.decided_mut(),
        _ => None,
    })
}

impl Log {
    /// Chooses jobs for the claims among these commands.
    fn choose(&mut self, commands: &mut [Pending], ready: FoundReady) -> Vec<Choice> {
        let mut choices: Vec<Choice> = Vec::new();
        if !commands.iter().any(|pending| pending.command.claim().is_some()) {
            return choices;
        }
        let mut candidates = Candidates::new(ready, &self.jobs, &self.settings);
        for Pending { command, .. } in &mut *commands {
            if let Submission::Explain(explain, reply) = command {
                reply.decide(self.explain(explain, &candidates));
            }
        }
        let mut by_request: HashMap<(Arc<str>, Arc<str>), usize> = HashMap::new();
        // A claim that gets none because of this bound has `has_more` set, and asks again.
        let mut left = self.most.unwrap_or(usize::MAX);
        for (place, Pending { command, actor, .. }) in commands.iter_mut().enumerate() {
            let Submission::Claim(claim, reply) = command else { continue };
            self.by.clone_from(actor);
            if let Some(redelivered) = self.redeliver_held(claim, &candidates) {
                reply.decide(Ok(redelivered));
                continue;
            }
            if let Err(refused) = self.may_work() {
                reply.decide(Err(refused));
                continue;
            }
            let request = claim.request.as_ref().map(|request| (Arc::clone(&claim.worker), Arc::clone(request)));
            let jobs = match request.as_ref().and_then(|request| by_request.get(request)) {
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
        choices
    }

    /// Why a job does not run, before the batch's claims take theirs.
    fn explain(&self, explain: &Explain, candidates: &Candidates) -> Result<Explanation, LedgerError> {
        let job = self.jobs.get(&explain.job).ok_or(LedgerError::JobNotFound { job: explain.job })?;
        let pauses = [ALL_TYPES, &job.spec.job_type].map(|name| self.settings.types.get(name)?.pause.clone());
        let is_claimable = job.is_ready() && pauses.iter().all(Option::is_none);
        let (ahead, is_beyond) = if is_claimable { candidates.ahead(job) } else { (0, false) };
        let is_resumed = [ALL_TYPES, &job.spec.job_type].iter().any(|name| self.resumed.contains(*name));
        let quota = match self.may_work() {
            Err(LedgerError::QuotaExceeded { quantity, limit }) => Some((quantity, limit)),
            _ => None,
        };
        Ok(Explanation {
            job: job.clone(),
            is_scheduled: job.is_scheduled(),
            pauses,
            ahead,
            is_unsure: is_claimable && (is_resumed || is_beyond && ahead <= Explain::COUNTED),
            quota,
            as_of_seq: self.head.seq,
            as_of: self.now,
        })
    }

    /// If the claim is a repeat, extends the leases that it has; `None` if it has none.
    fn redeliver_held(&mut self, claim: &Claim, candidates: &Candidates) -> Option<Claimed> {
        let request = (Arc::clone(&claim.worker), Arc::clone(claim.request.as_ref()?));
        let held = self.held.get(&request).cloned()?;
        let redelivered: Vec<_> =
            held.into_iter().filter_map(|id| self.redeliver(id, claim)).take(claim.max_jobs).collect();
        (!redelivered.is_empty()).then(|| Claimed::new(redelivered, candidates.has_more(claim)))
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
    fn redeliver(&mut self, id: JobId, claim: &Claim) -> Option<Job> {
        let job = self.jobs.get(&id)?;
        // A `request_id` identifies a claim only together with its worker.
        if job.lease.as_ref()?.worker != claim.worker {
            return None;
        }
        let token = job.lease_token()?;
        self.apply(id, &transition::Command::Redeliver(Redeliver { token, lease: claim.lease })).ok()
    }
}
