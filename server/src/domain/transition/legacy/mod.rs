//! Decisions about jobs of the service that jobledger replaces: jobs that are imported, and reports that name a status without
//! regard to transitions.

mod import;
mod report;

pub use self::{
    import::{Import, ImportOutcome, ImportRefusal, ImportedState, Mark, Past, PastKey},
    report::{LegacyReport, Target},
};
