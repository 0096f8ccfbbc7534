//! Verifies the settings of types and the bulk operations of an org against the org's own events.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use uuid::Uuid;

use super::{Pause as Retention, What};
use crate::{
    domain::{
        bulk::{BulkOperation, BulkStatus},
        clock::Time,
        id::OrgId,
        job_type::{OrgSettings, Pause, TypeSettings},
        org_event::OrgChange,
    },
    store::{Store, StoreError},
};

/// The number of `seq`s whose events are read at a time: an event may have some kilobytes.
const STRETCH: i64 = 2_000;
/// Operations per page.
const PAGE: usize = 50;

/// What the events say of one type. `None`: no event says it.
#[derive(Default)]
struct Told {
    description: Option<Arc<str>>,
    pause: Option<Option<Pause>>,
    changed_seq: i64,
}

/// What an org's own events say.
struct Folded {
    /// False if retention may have removed events.
    is_whole: bool,
    types: BTreeMap<Arc<str>, Told>,
    /// How operations ended, and how many jobs matched and were changed.
    ended: HashMap<Uuid, (BulkStatus, i64, i64)>,
}

impl Folded {
    fn follow(&mut self, change: &OrgChange, seq: i64, differences: &mut Vec<What>) {
        let name = match change {
            OrgChange::TypePaused { job_type, .. }
            | OrgChange::TypeResumed { job_type, .. }
            | OrgChange::TypeUpdated { job_type, .. }
            | OrgChange::TypeReset { job_type, .. } => job_type,
            OrgChange::BulkStarted { .. } => return,
            OrgChange::BulkEnded { id, status, matched, changed } => {
                self.ended.insert(*id, (*status, *matched, *changed));
                return;
            }
        };
        let (is_whole, told) = (self.is_whole, self.types.entry(Arc::clone(name)).or_default());
        told.changed_seq = seq;
        let mut paused = |before: &Option<Pause>, after| followed(&mut told.pause, is_whole, before, after);
        let mut described = |before: &Arc<str>, after| followed(&mut told.description, is_whole, before, after);
        let follows = match change {
            OrgChange::TypePaused { pause, before, .. } => paused(before, Some(pause.clone())),
            OrgChange::TypeResumed { pause, .. } => paused(&Some(pause.clone()), None),
            OrgChange::TypeUpdated { before, after, .. } => described(before, Arc::clone(after)),
            OrgChange::TypeReset { description, pause, .. } => {
                let follows = described(description, Arc::default());
                paused(pause, None) && follows
            }
            OrgChange::BulkStarted { .. } | OrgChange::BulkEnded { .. } => true,
        };
        if !follows {
            differences
                .push(What::Settings(name.to_string(), format!("event {seq} does not follow the ones before it")));
        }
    }

    fn compare_settings(&self, stored: &OrgSettings, differences: &mut Vec<What>) {
        let none = (TypeSettings::default(), Told::default());
        let names = self.types.keys().chain(stored.types.keys().filter(|name| !self.types.contains_key(*name)));
        for name in names {
            let (stored, told) = (stored.types.get(name).unwrap_or(&none.0), self.types.get(name).unwrap_or(&none.1));
            let description = told.description.clone().or(self.is_whole.then(Arc::default));
            let pause = told.pause.clone().or(self.is_whole.then_some(None));
            let is_same = description.is_none_or(|description| description == stored.description)
                && pause.is_none_or(|pause| pause == stored.pause)
                && (told.changed_seq == stored.changed_seq
                    || stored.is_default()
                    || told.changed_seq == 0 && !self.is_whole);
            if !is_same {
                differences.push(What::Settings(name.to_string(), format!("{stored:?} is stored")));
            }
        }
    }

    /// `reached` are the jobs whose events name the operation.
    fn compare_operation(&self, stored: &BulkOperation, reached: i64, differences: &mut Vec<What>) {
        let id = stored.request.id;
        let mut differ = |what: String| differences.push(What::Bulk(id, what));
        let by_event = self.ended.get(&id);
        let by_row = stored.status.is_terminal().then_some((stored.status, stored.matched, stored.changed));
        if by_event != by_row.as_ref() && (by_event.is_some() || self.is_whole) {
            differ(format!("{by_row:?} is stored, {by_event:?} is its end by the log"));
        }
        let failed = stored.failed.values().sum::<i64>();
        if stored.reached != stored.changed + stored.unchanged + failed {
            differ(format!(
                "{} jobs were reached, and {} have an outcome",
                stored.reached,
                stored.changed + stored.unchanged + failed
            ));
        }
        // Retention may have removed jobs. One that goes on changes more than was read.
        let is_possible = reached <= stored.changed && (reached == stored.changed || !self.is_whole);
        if stored.status.is_terminal() && !is_possible {
            differ(format!("{} jobs were changed, events of {reached} name it", stored.changed));
        }
    }
}

/// Takes over a value. Returns whether the value was the one from before the change, as far as it is known.
fn followed<T: Default + PartialEq>(value: &mut Option<T>, is_whole: bool, before: &T, after: T) -> bool {
    let known = value.replace(after).or_else(|| is_whole.then(T::default));
    known.is_none_or(|known| known == *before)
}

/// What is stored of an org's settings and operations. Read before its jobs.
pub(super) struct Stored {
    settings: Arc<OrgSettings>,
    /// The lowest `seq` from which on the log is whole.
    floor: i64,
    operations: Vec<BulkOperation>,
}

impl Stored {
    pub(super) async fn read(
        store: &dyn Store,
        org: OrgId,
        settings: &Arc<OrgSettings>,
        floor: i64,
    ) -> Result<Self, StoreError> {
        let (mut operations, mut before): (Vec<_>, Option<(Time, Uuid)>) = (Vec::new(), None);
        loop {
            let page = store.bulk_operations(org, before, PAGE).await?;
            operations.extend(page.operations);
            before = page.next;
            if before.is_none() {
                return Ok(Self { settings: Arc::clone(settings), floor, operations });
            }
        }
    }

    /// Compares with the log. `reached` has the number of jobs whose events name an operation.
    pub(super) async fn compare(
        &self,
        store: &dyn Store,
        org: OrgId,
        pause: &mut Retention<'_>,
        reached: &HashMap<Uuid, i64>,
        differences: &mut Vec<What>,
    ) -> Result<(), StoreError> {
        let mut folded = Folded { is_whole: self.floor <= 1, types: BTreeMap::new(), ended: HashMap::new() };
        let last = self.settings.as_of;
        let mut after = self.floor.max(1) - 1;
        while after < last {
            pause.keep().await?;
            let until = (after + STRETCH).min(last);
            for event in store.audit().org_events(org, after, until).await? {
                folded.follow(&event.change, event.seq, differences);
            }
            after = until;
        }
        folded.compare_settings(&self.settings, differences);
        // Those that ended after the settings were read have no event here.
        for operation in
            self.operations.iter().filter(|of| !of.status.is_terminal() || folded.ended.contains_key(&of.request.id))
        {
            let reached = reached.get(&operation.request.id).copied().unwrap_or_default();
            folded.compare_operation(operation, reached, differences);
        }
        Ok(())
    }
}
