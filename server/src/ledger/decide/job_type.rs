//! Commands on the settings of types, and pauses that end by themselves.

use std::sync::Arc;

use super::{
    super::{LedgerError, command::TypeReply},
    Log,
};
use crate::domain::{
    event::ACTOR_LEDGER,
    job_type::{ALL_TYPES, OrgSettings, TypeChange, TypeCommand},
    org_event::{OrgChange, OrgEvent},
};

impl Log {
    /// Decides a command on a type's settings.
    pub(super) fn set_type(&mut self, command: &TypeCommand) -> Result<TypeReply, LedgerError> {
        let name = &command.job_type;
        let exists = **name == *ALL_TYPES || self.types.contains(name);
        let actor = self.by.clone().unwrap_or_default();
        match command.change {
            TypeChange::Resume | TypeChange::Reset if !exists => {
                return Err(LedgerError::TypeNotFound { job_type: name.to_string() });
            }
            TypeChange::Pause { .. } | TypeChange::Describe { .. } if !exists => {
                self.is_new_type(name)?;
            }
            _ => {}
        }
        if let TypeChange::Pause { until: Some(until), .. } = command.change
            && until <= self.now
        {
            return Err(LedgerError::UntilPast);
        }
        if let Some(change) = self.settings.apply(command, &actor, self.now)? {
            if matches!(command.change, TypeChange::Pause { .. } | TypeChange::Describe { .. }) {
                self.add_to_stock(0, command.text_bytes() as u64)?;
            }
            if !exists {
                self.add_type(name)?;
                // An empty tally makes the type known to statistics.
                self.changes.tallies.entry(Arc::clone(name)).or_default();
            }
            self.append_org(change, actor);
        }
        let settings = self.settings.types.get(name).cloned().unwrap_or_default();
        Ok(TypeReply { settings, as_of_seq: self.head.seq })
    }

    /// Ends the pauses whose time is over.
    pub(super) fn end_pauses(&mut self) {
        for job_type in self.settings.over(self.now) {
            let resume = TypeCommand { job_type, etag: None, change: TypeChange::Resume };
            let actor: Arc<str> = ACTOR_LEDGER.into();
            if let Ok(Some(change)) = self.settings.apply(&resume, &actor, self.now) {
                self.append_org(change, actor);
            }
        }
    }

    /// Appends an event that is about no single job, and applies what it changes.
    pub(super) fn append_org(&mut self, change: OrgChange, actor: Arc<str>) {
        let seq = self.head.seq + 1;
        match &change {
            OrgChange::TypeResumed { job_type, .. } | OrgChange::TypeReset { job_type, pause: Some(_), .. } => {
                self.resumed.insert(Arc::clone(job_type));
            }
            OrgChange::TypePaused { .. }
            | OrgChange::TypeUpdated { .. }
            | OrgChange::TypeReset { .. }
            | OrgChange::BulkStarted { .. }
            | OrgChange::BulkEnded { .. } => {}
        }
        let after = self.settings.after(&change, seq);
        let settings: &mut OrgSettings = Arc::make_mut(&mut self.settings);
        settings.as_of = seq;
        if let Some((name, after)) = after {
            settings.set(Arc::clone(&name), after.clone());
            self.changes.settings.insert(name, after);
        }
        let event = OrgEvent { org_id: self.org, seq, ts: self.now, recorded_at: self.recorded_at, actor, change };
        (self.head.seq, self.head.org_seq, self.head.recorded_at) = (seq, seq, Some(self.recorded_at));
        self.head.stock.bytes += event.weight() as i64;
        self.changes.org_events.push(Arc::new(event));
    }

    /// Forgets types that had settings, and have neither settings nor jobs any more.
    pub(super) fn reset_types(&self) -> impl Iterator<Item = &Arc<str>> {
        self.changes
            .settings
            .iter()
            .filter(|(name, after)| after.is_default() && !name.is_empty())
            .map(|(name, _)| name)
    }
}
