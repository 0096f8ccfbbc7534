//! One org's queue of commands, and what a transaction takes of it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, LazyLock},
};

use super::{
    claims,
    command::{Claim, Command},
    pending::Pending,
};
use crate::{domain::id::OrgId, store::Capacity};

/// Types that an org's claims name in one transaction, and jobs of these that they are looked for among: of each type that nobody has asked
/// for of late they are read. The first claim may name more.
const TYPES: usize = 128;
const LOOKED_AT: usize = 8_192;
/// Labels that a transaction brings for which others wait: each is at a place of its own, and so mostly on a page of its own.
const LABELS: usize = 256;
/// Claims for which there is no room that others of an org's commands may pass.
pub(super) const PASSED_OVER: usize = 64;

/// Commands of an org with which its batch shares no transaction, where several may be open.
pub(super) const MANY: usize = 16;

/// Commands of an org that wait, and whether a batch of it is under way.
#[derive(Default)]
pub(super) struct Lane {
    /// Commands on running jobs, claims and sweeps: see [`Command::is_vital`].
    pub(super) vital: VecDeque<Pending>,
    /// All others.
    pub(super) rest: VecDeque<Pending>,
    /// The first of the rest was passed over for its size: it is next, before anything else.
    pub(super) is_rest_due: bool,
    /// What those take that wait.
    pub(super) bytes: usize,
    pub(super) is_busy: bool,
    /// Another held its head when it was to share a transaction: it goes alone the next time, and waits for it.
    pub(super) goes_alone: bool,
    /// Commands that wait and share no transaction with other orgs: see [`Command::goes_alone`].
    pub(super) loners: usize,
}

impl Lane {
    pub(super) fn waiting(&self) -> usize {
        self.vital.len() + self.rest.len()
    }

    /// True if its next batch has a transaction to itself: many commands are one's worth, and others would wait for them where they
    /// could go at the same time.
    pub(super) fn is_alone(&self, capacity: Capacity) -> bool {
        self.goes_alone || self.loners > 0 || capacity.transactions > 1 && self.waiting() >= MANY
    }

    pub(super) fn queue(&mut self, is_vital: bool) -> &mut VecDeque<Pending> {
        if is_vital { &mut self.vital } else { &mut self.rest }
    }
}

/// What a transaction can still take.
pub(super) struct Room {
    pub(super) commands: usize,
    pub(super) bytes: usize,
    labels: usize,
    /// It has nothing yet: a command that is larger than all of it is taken alone.
    pub(super) is_empty: bool,
    /// What the claims of each org ask for.
    asked: HashMap<OrgId, Asked>,
}

/// What claims of one org ask for.
#[derive(Default)]
struct Asked {
    /// How many jobs of each type, no more than are looked at.
    types: HashMap<Arc<str>, usize>,
    /// As many in all.
    looked_at: usize,
}

impl Room {
    pub(super) fn new(commands: usize, bytes: usize) -> Self {
        Self { commands, bytes, labels: usize::MAX, is_empty: true, asked: HashMap::new() }
    }

    /// With room for so few labels as others wait for.
    pub(super) fn with_few_labels(self) -> Self {
        Self { labels: LABELS, ..self }
    }

    /// True if a command fits in, with some bytes left for others.
    pub(super) fn fits(&self, next: &Pending, kept: Kept) -> bool {
        self.is_empty || next.weight + kept.bytes <= self.bytes && next.command.labels() <= self.labels
    }

    /// True of a claim that asks for too much beside what its org's others ask for.
    pub(super) fn passes_over(&self, org: OrgId, next: &Pending) -> bool {
        match (&next.command, self.asked.get(&org)) {
            (Command::Claim(claim), Some(asked)) => !asked.has_room_for(claim),
            _ => false,
        }
    }

    /// Takes room for a command.
    pub(super) fn take(&mut self, org: OrgId, next: &Pending) {
        self.commands = self.commands.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(next.weight);
        self.labels = self.labels.saturating_sub(next.command.labels());
        self.is_empty = false;
        if let Command::Claim(claim) = &next.command {
            self.asked.entry(org).or_default().add(claim);
        }
    }
}

impl Asked {
    fn has_room_for(&self, claim: &Claim) -> bool {
        let (mut types, mut looked_at) = (self.types.len(), self.looked_at);
        let names = claim.types.len().max(1);
        // Mostly there is room for more than it could ask for.
        if types + names <= TYPES && looked_at + names * claim.max_jobs <= LOOKED_AT {
            return true;
        }
        for name in names_of(claim) {
            let before = self.types.get(name);
            types += usize::from(before.is_none());
            let before = before.copied().unwrap_or_default();
            looked_at += (before + claim.max_jobs).min(claims::LOOKED_AT) - before;
        }
        types <= TYPES && looked_at <= LOOKED_AT
    }

    fn add(&mut self, claim: &Claim) {
        for name in names_of(claim) {
            let of_type = self.types.entry(Arc::clone(name)).or_default();
            let more = (*of_type + claim.max_jobs).min(claims::LOOKED_AT) - *of_type;
            *of_type += more;
            self.looked_at += more;
        }
    }
}

/// The types that a claim names; of one that takes any, a name that no type has.
fn names_of(claim: &Claim) -> impl Iterator<Item = &Arc<str>> {
    static ANY: LazyLock<Arc<str>> = LazyLock::new(|| "".into());
    claim.types.iter().chain(claim.types.is_empty().then(|| &*ANY))
}

/// Room that is left for others.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    pub(super) commands: usize,
    pub(super) bytes: usize,
}

impl Kept {
    pub(super) const NOTHING: Self = Self { commands: 0, bytes: 0 };
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use uuid::Uuid;

    use super::*;

    fn claim(types: std::ops::Range<usize>, max_jobs: usize) -> Pending {
        let types = types.map(|n| Arc::from(format!("t{n:04}"))).collect();
        let claim = Claim { worker: "w".into(), types, max_jobs, lease: Duration::from_secs(1), request: None };
        Pending::new(Command::Claim(Box::new(claim)), None, None)
    }

    #[test]
    fn claims_of_one_transaction_name_so_many_types_and_ask_for_so_many_jobs() {
        let [org, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        let mut room = Room::new(512, 4 << 20);
        let fits = |room: &Room, org, claim: &Pending| !room.passes_over(org, claim);
        assert!(fits(&room, org, &claim(0..300, 100)), "it is the first");
        room.take(org, &claim(0..100, 1));
        assert!(fits(&room, org, &claim(50..128, 1)) && !fits(&room, org, &claim(50..129, 1)));
        assert!(fits(&room, other, &claim(0..300, 100)), "it is the first of its org");
        let mut room = Room::new(512, 4 << 20);
        (0..80).for_each(|_| room.take(org, &claim(0..5, 100)));
        assert!(fits(&room, org, &claim(0..5, 100)), "of these so many are looked at as ever are");
        (0..20).for_each(|_| room.take(org, &claim(0..0, 100)));
        room.take(org, &claim(5..26, 100));
        assert!(!fits(&room, org, &claim(26..27, 100)) && fits(&room, org, &claim(0..5, 1)));
        assert!(fits(&room, org, &claim(0..0, 100)));
    }
}
