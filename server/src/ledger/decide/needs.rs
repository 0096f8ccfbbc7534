//! What a batch has to load before its commands are decided.

use std::{collections::HashSet, sync::Arc};

use super::{
    super::{claim_selection, command::Command, submission::Submission},
    bulk, retain, sweep,
};
use crate::{
    domain::transition,
    store::{BulkNeeds, ErasureNeeds, Needs},
};

/// What a batch has to load for its commands. `most` bounds the due jobs that it may change.
pub(in crate::ledger) fn needs<'a>(commands: impl IntoIterator<Item = &'a Submission>, most: Option<usize>) -> Needs {
    let most_due = sweep::most(most);
    let (mut jobs, mut keys, mut types, mut populations) =
        (HashSet::new(), HashSet::new(), HashSet::new(), HashSet::new());
    let (mut expired, mut due, mut misdated, mut claims, mut imports) = (None, None, None, Vec::new(), Vec::new());
    let (mut of_bulk, mut erasures, mut others) = (BulkNeeds::default(), ErasureNeeds::default(), 0);
    for command in commands {
        others += usize::from(!matches!(command, Submission::Sweep(..)));
        match command {
            Submission::Job(Command::Create(create), _) => {
                types.insert(Arc::clone(&create.spec.job_type));
                if let Some(idempotency) = &create.spec.idempotency {
                    keys.insert(Arc::clone(&idempotency.key));
                }
            }
            Submission::Job(Command::Apply { job, command }, _) => {
                jobs.insert(*job);
                erasures.jobs.extend(matches!(**command, transition::Command::Erase(_)).then_some(*job));
            }
            Submission::GiveBack(given) => {
                jobs.insert(given.token.job);
            }
            Submission::Type(command, _) => {
                types.insert(Arc::clone(&command.job_type));
                populations.insert(Arc::clone(&command.job_type));
            }
            Submission::Bulk(command, _) => {
                of_bulk.ids.push(command.id());
                of_bulk.is_counting = true;
            }
            Submission::Import(import, _) => {
                let job = &import.job;
                jobs.insert(job.id);
                imports.push((job.id, job.digest));
                types.insert(Arc::clone(&job.spec.job_type));
                keys.extend(job.spec.idempotency.as_ref().map(|idempotency| Arc::clone(&idempotency.key)));
            }
            Submission::Explain(explain, _) => {
                jobs.insert(explain.job);
                claims.push(&explain.claim);
            }
            Submission::Claim(claim, _) => claims.push(&**claim),
            Submission::Sweep(sweep, _) => {
                due = Some(most_due);
                erasures.of_any = true;
                of_bulk.step = Some(bulk::step(most, sweep.has_company));
            }
            Submission::Redate(by, _) => {
                due = Some(most_due);
                erasures.of_any = true;
                of_bulk.is_counting = true;
                misdated = Some((most_due, *by));
            }
            Submission::Retain(retention, _) => {
                expired = Some(retain::expired(retention));
            }
        }
    }
    if others > 0 && of_bulk.step.is_some() {
        of_bulk.step = Some(bulk::step(most, true));
    }
    erasures.has_company = most.is_some() && (erasures.of_any || !erasures.jobs.is_empty());
    Needs {
        jobs: jobs.into_iter().collect(),
        keys: keys.into_iter().collect(),
        types: types.into_iter().collect(),
        populations: populations.into_iter().collect(),
        expired,
        held: claim_selection::held(&claims),
        ready: claim_selection::ready(&claims),
        due,
        misdated,
        bulk: of_bulk,
        erasures,
        imports,
    }
}
