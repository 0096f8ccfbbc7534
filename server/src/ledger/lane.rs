//! One org's queue of commands, and the room that a transaction has for them.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, LazyLock},
};

use super::{claim_selection, command::Claim, pending::Pending};
use crate::{domain::id::OrgId, store::Capacity};

/// Bounds on the claims of one org in one transaction: the types that they name, and the candidates of these types, which are
/// read from the database unless the type was asked for lately. The first claim may exceed both.
const TYPES: usize = 128;
const LOOKED_AT: usize = 8_192;
/// Labels that a transaction may add while other orgs wait. Each is a row of its own, and mostly on a page of its own.
const LABELS: usize = 256;
/// Claims without room that other commands of the org may pass.
pub(super) const PASSED_OVER: usize = 64;

/// With this many waiting commands an org's batch shares no transaction, where several transactions may be open.
pub(super) const MANY: usize = 16;

/// Waiting commands of an org, and whether a batch of it is under way.
#[derive(Default)]
pub(super) struct Lane {
    /// Commands on running jobs, claims and sweeps: see [`Submission::is_vital`].
    pub(super) vital: VecDeque<Pending>,
    /// All others.
    pub(super) rest: VecDeque<Pending>,
    /// The first command of `rest` did not fit the last batch. It is next, before anything else.
    pub(super) is_rest_due: bool,
    /// Bytes of the waiting commands.
    pub(super) bytes: usize,
    pub(super) is_busy: bool,
    /// Another server held its head when it was to share a transaction. It goes alone the next time, and waits for the head.
    pub(super) goes_alone: bool,
    /// Waiting commands that share no transaction with other orgs: see [`Submission::goes_alone`].
    pub(super) loners: usize,
}

impl Lane {
    pub(super) fn waiting(&self) -> usize {
        self.vital.len() + self.rest.len()
    }

    /// True if its next batch has a transaction to itself. Many commands fill one, and other orgs, which could commit at the
    /// same time in their own, would wait for them.
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
    /// Nothing is taken yet. The first command is taken even if it exceeds the whole room.
    pub(super) is_empty: bool,
    /// What each org's claims ask for.
    asked: HashMap<OrgId, ClaimDemand>,
}

/// What the claims of one org ask for.
#[derive(Default)]
struct ClaimDemand {
    /// Jobs asked for by type, at most as many as are candidates in a batch.
    types: HashMap<Arc<str>, usize>,
    /// The sum of these jobs.
    looked_at: usize,
}

impl Room {
    pub(super) fn new(commands: usize, bytes: usize) -> Self {
        Self { commands, bytes, labels: usize::MAX, is_empty: true, asked: HashMap::new() }
    }

    /// Bounds the labels, while other orgs wait.
    pub(super) fn with_few_labels(self) -> Self {
        Self { labels: LABELS, ..self }
    }

    /// True if the command fits and leaves `kept` bytes.
    pub(super) fn fits(&self, next: &Pending, kept: Kept) -> bool {
        self.is_empty || next.weight + kept.bytes <= self.bytes && next.command.labels() <= self.labels
    }

    /// True of a claim that asks for too much in addition to the org's other claims.
    pub(super) fn passes_over(&self, org: OrgId, next: &Pending) -> bool {
        match (next.command.claim(), self.asked.get(&org)) {
            (Some(claim), Some(asked)) => !asked.has_room_for(claim),
            _ => false,
        }
    }

    pub(super) fn take(&mut self, org: OrgId, next: &Pending) {
        self.commands = self.commands.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(next.weight);
        self.labels = self.labels.saturating_sub(next.command.labels());
        self.is_empty = false;
        if let Some(claim) = next.command.claim() {
            self.asked.entry(org).or_default().add(claim);
        }
    }
}

impl ClaimDemand {
    fn has_room_for(&self, claim: &Claim) -> bool {
        let (mut types, mut looked_at) = (self.types.len(), self.looked_at);
        let names = claim.types.len().max(1);
        // The upper bound suffices in most cases and is cheap.
        if types + names <= TYPES && looked_at + names * claim.max_jobs <= LOOKED_AT {
            return true;
        }
        for name in names_of(claim) {
            let before = self.types.get(name);
            types += usize::from(before.is_none());
            let before = before.copied().unwrap_or_default();
            looked_at += (before + claim.max_jobs).min(claim_selection::LOOKED_AT) - before;
        }
        types <= TYPES && looked_at <= LOOKED_AT
    }

    fn add(&mut self, claim: &Claim) {
        for name in names_of(claim) {
            let of_type = self.types.entry(Arc::clone(name)).or_default();
            let more = (*of_type + claim.max_jobs).min(claim_selection::LOOKED_AT) - *of_type;
            *of_type += more;
            self.looked_at += more;
        }
    }
}

/// The types that a claim names. A claim of any type yields the empty name, which no type has.
fn names_of(claim: &Claim) -> impl Iterator<Item = &Arc<str>> {
    static ANY: LazyLock<Arc<str>> = LazyLock::new(|| "".into());
    claim.types.iter().chain(claim.types.is_empty().then(|| &*ANY))
}

/// Room that is left for other commands.
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

    use super::{
        super::submission::{ReplyTo, Submission},
        *,
    };

    fn claim(types: std::ops::Range<usize>, max_jobs: usize) -> Pending {
        let types = types.map(|n| Arc::from(format!("t{n:04}"))).collect();
        let claim = Claim { worker: "w".into(), types, max_jobs, lease: Duration::from_secs(1), request: None };
        Pending::new(Submission::Claim(Box::new(claim), ReplyTo::channel().0), None)
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
