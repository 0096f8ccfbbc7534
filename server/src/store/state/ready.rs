//! The ready jobs of a state, and the settings that keep some of them from claims.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use super::OrgState;
use crate::{
    domain::{id::JobId, job_type::OrgSettings},
    store::{
        ClaimOrder, FoundReady, Ready, ReadyJob,
        window::{ALL_TYPES, Short},
    },
};

impl OrgState {
    pub(in crate::store) fn settings(&self) -> &Arc<OrgSettings> {
        &self.settings
    }

    /// Sets the settings that were read from the database.
    pub(in crate::store) fn set_settings(&mut self, settings: Arc<OrgSettings>) {
        self.windows.pause(&settings);
        (self.settings, self.settings_before) = (settings, None);
    }

    /// Adds the ready jobs that were found for a window, and returns those of them whose rows are worth reading.
    pub(in crate::store) fn fill(&mut self, short: &Short, found: Vec<ReadyJob>) -> Vec<JobId> {
        self.windows.fill(short, found, |id| self.jobs.contains_key(&id))
    }

    /// What to load before windows have what is wanted. Queued rows that are behind look ready, so the limits rise by their
    /// number.
    pub(in crate::store) fn short(&mut self, wanted: &Ready) -> Vec<Short> {
        let wanted = self.claimable(wanted);
        self.windows.make_room(&wanted);
        let mut short = self.windows.short(&wanted);
        if short.is_empty() {
            return short;
        }
        let mut by_name: HashMap<_, _> = short.iter_mut().map(|short| (Arc::clone(&short.name), short)).collect();
        for behind in self.queued.values().filter_map(|id| self.jobs.get(id)) {
            let order = ClaimOrder::of(&behind.job);
            for name in [&behind.job.spec.job_type, &*ALL_TYPES] {
                if let Some(short) = by_name.get_mut(name)
                    && short.from.is_none_or(|from| order >= from)
                {
                    short.limit += 1;
                }
            }
        }
        short
    }

    /// The ready jobs of what is wanted. Nothing of that may be [short](Self::short).
    pub(in crate::store) fn ready(&self, wanted: &Ready) -> FoundReady {
        self.windows.ready(&self.claimable(wanted))
    }

    /// What claims may get of what they want while types are paused.
    fn claimable<'a>(&self, wanted: &'a Ready) -> Cow<'a, Ready> {
        if !self.settings.has_pause() {
            return Cow::Borrowed(wanted);
        }
        if self.settings.are_all_paused() {
            return Cow::default();
        }
        let mut wanted = wanted.clone();
        wanted.of.retain(|name, _| !self.settings.is_paused(name));
        Cow::Owned(wanted)
    }

    /// True if claims lack nothing that they want of the windows.
    pub(in crate::store) fn has(&self, wanted: &Ready) -> bool {
        self.windows.short(&self.claimable(wanted)).is_empty()
    }
}
