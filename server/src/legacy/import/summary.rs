//! The result of an import.

use std::{collections::BTreeMap, fmt};

use crate::{
    domain::{status::JobStatus, transition::ImportOutcome},
    ledger::{Statistics, StatusCounts},
    legacy::parse_status,
};

/// What became of all rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Jobs that were imported for the first time.
    pub new: u64,
    /// Jobs that had changed in the old database, and were updated.
    pub updated: u64,
    /// Jobs that are equal on both sides.
    pub unchanged: u64,
    /// Jobs that have changed in the ledger since their import, and not in the old database.
    pub ahead: u64,
    /// Jobs that were erased in the ledger since their import. They stay blank.
    pub erased: u64,
    /// Jobs in the ledger that differ from their row in a reported way.
    pub adjusted: u64,
    /// Events that were written.
    pub events: u64,
    /// Rows of `jobs` whose ids `job` has too: each pair was imported as one job.
    pub superseded: u64,
    /// All jobs of the orgs concerned by the ledger's counters after the import, whatever their origin; `None` if not
    /// asked for.
    pub counted: Option<StatusCounts>,
    /// By the status in the old database; `None` is an unknown one.
    pub of_statuses: BTreeMap<Option<JobStatus>, OfStatus>,
}

/// What became of the rows of one status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OfStatus {
    /// Rows in the old database, counted by a separate statement after all were read.
    pub source: u64,
    /// Rows whose job had the same status in the ledger when it answered.
    pub ledger: u64,
    /// Rows whose job has another status in the ledger, since it has gone on there.
    pub ahead: u64,
    /// Rows that were refused.
    pub refused: u64,
}

impl OfStatus {
    /// Rows that are unaccounted for: they were added or changed while the others were read.
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

    /// True if every row of the old database is accounted for.
    pub fn is_reconciled(&self) -> bool {
        self.of_statuses.values().all(|of_status| of_status.difference() == 0)
    }

    /// The sum over all statuses.
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
            ImportOutcome::Erased => &mut self.erased,
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

/// Prints a table of the statuses in the old database and in the ledger.
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
