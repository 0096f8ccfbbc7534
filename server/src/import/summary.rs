//! What an import comes to.

use std::{collections::BTreeMap, fmt};

use crate::{
    domain::{status::JobStatus, transition::ImportOutcome},
    ledger::{Statistics, StatusCounts},
    legacy::parse_status,
};

/// What became of all rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Brought in for the first time.
    pub new: u64,
    /// Brought up to date.
    pub updated: u64,
    /// Here as they are there.
    pub unchanged: u64,
    /// Gone on here, and not there.
    pub ahead: u64,
    /// In the ledger, with differences that were noted.
    pub adjusted: u64,
    /// Events that were written.
    pub events: u64,
    /// Rows of `jobs` that `job` has too: they came as one.
    pub superseded: u64,
    /// Jobs of the orgs in question as the ledger counts them in the end, whatever they came from; `None` where it was not asked.
    pub counted: Option<StatusCounts>,
    /// By the status in the old database; `None` is one that is unknown there.
    pub of_statuses: BTreeMap<Option<JobStatus>, OfStatus>,
}

/// What became of the rows of one status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OfStatus {
    /// Rows in the old database, counted by a statement of its own after all were read.
    pub source: u64,
    /// Those that the ledger has in the same status, as of its answer.
    pub ledger: u64,
    /// Those in the ledger in another, since they have gone on there.
    pub ahead: u64,
    /// Those that were refused.
    pub refused: u64,
}

impl OfStatus {
    /// Rows of which it is not known what became of them: they came or changed while the others were read.
    pub const fn difference(&self) -> i64 {
        self.source as i64 - (self.ledger + self.ahead + self.refused) as i64
    }

    fn add(&mut self, other: &Self) {
        self.source += other.source;
        self.ledger += other.ledger;
        self.ahead += other.ahead;
        self.refused += other.refused;
    }
}

impl Summary {
    /// Rows that were refused.
    pub fn refused_rows(&self) -> u64 {
        self.total().refused
    }

    /// True if it is known of every row of the old database what became of it.
    pub fn is_reconciled(&self) -> bool {
        self.of_statuses.values().all(|of_status| of_status.difference() == 0)
    }

    /// All statuses together.
    pub fn total(&self) -> OfStatus {
        let mut total = OfStatus::default();
        self.of_statuses.values().for_each(|of_status| total.add(of_status));
        total
    }

    pub(super) fn brought(&mut self, outcome: ImportOutcome, there: JobStatus, here: JobStatus) {
        *match outcome {
            ImportOutcome::New => &mut self.new,
            ImportOutcome::Updated => &mut self.updated,
            ImportOutcome::Unchanged => &mut self.unchanged,
            ImportOutcome::Ahead => &mut self.ahead,
        } += 1;
        let of_status = self.of(Some(there));
        *(if there == here { &mut of_status.ledger } else { &mut of_status.ahead }) += 1;
    }

    /// Without a ledger every row is new.
    pub(super) fn would_bring(&mut self, status: JobStatus) {
        self.brought(ImportOutcome::New, status, status);
    }

    pub(super) fn refused(&mut self, status: Option<JobStatus>) {
        self.of(status).refused += 1;
    }

    pub(super) fn of_source(&mut self, counts: Vec<(Option<String>, u64)>) {
        for (word, n) in counts {
            self.of(word.as_deref().and_then(parse_status)).source += n;
        }
    }

    pub(super) fn of_ledger(&mut self, statistics: &Statistics) {
        let counted = self.counted.get_or_insert_default();
        statistics.types.iter().for_each(|of_type| counted.add_all(&of_type.counts));
    }

    fn of(&mut self, status: Option<JobStatus>) -> &mut OfStatus {
        self.of_statuses.entry(status).or_default()
    }
}

/// The table of statuses, the old database against the ledger.
impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<12}{:>12}{:>12}{:>12}{:>12}{:>12}{:>18}",
            "status", "source", "ledger", "ahead", "refused", "difference", "ledger's counter"
        )?;
        let mut line = |name: &str, of: &OfStatus, counted: Option<i64>| {
            let (source, ledger, ahead, refused) = (of.source, of.ledger, of.ahead, of.refused);
            let counted = counted.map_or_else(|| "-".to_owned(), |n| n.to_string());
            let difference = of.difference();
            writeln!(f, "{name:<12}{source:>12}{ledger:>12}{ahead:>12}{refused:>12}{difference:>12}{counted:>18}")
        };
        for status in JobStatus::ALL {
            let of_status = self.of_statuses.get(&Some(status)).copied().unwrap_or_default();
            line(status.as_str(), &of_status, self.counted.map(|counts| counts.get(status)))?;
        }
        if let Some(unknown) = self.of_statuses.get(&None) {
            line("(unknown)", unknown, None)?;
        }
        let counted = self.counted.map(|counts| JobStatus::ALL.into_iter().map(|status| counts.get(status)).sum());
        line("all", &self.total(), counted)
    }
}
