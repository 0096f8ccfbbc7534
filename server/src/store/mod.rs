//! The storage interface: the trait [`Store`], implemented in one folder for each database, and [`Database`] for what its owner
//! does to it as a whole.
//!
//! A batch uses it in this order. [`Store::begin`] locks the heads of some orgs and reads the clock, [`Batch::load`] loads what
//! the commands name, pure code decides, [`Batch::write`] writes the changes, and [`Batch::commit`] makes them durable. Reads
//! are single statements outside transactions.

mod audit;
mod bulk;
mod changed;
mod changes;
mod copies;
mod database;
mod detail;
mod erasure;
mod error;
mod expired;
mod extension;
mod head;
mod image;
mod imports;
mod interface;
mod job_columns;
pub mod migrations;
mod options;
mod org_events;
pub mod postgres;
mod query;
mod ready;
mod record;
mod row_writes;
mod rows;
mod series;
mod settings;
pub mod sqlite;
mod state;
mod states;
mod tokens;
mod url;
mod value;
mod window;
mod workers;

pub use self::{
    audit::{Audit, LONGEST_PAUSE, LedgerInfo, Scheduled, Stretch},
    bulk::{BulkNeeds, BulkPage, BulkStep, FoundBulk},
    changed::{Changed, Differs},
    changes::{
        Changes, Edited, HeldBy, Loaded, MAX_SMALL_PAYLOAD, Needs, NewPayload, NextDue, Outdated, Retention,
        StatusCounts,
    },
    copies::{Restored, RevokeTokens},
    database::{CopyProgress, Database, MigratingDown, open},
    erasure::{ErasureNeeds, FoundErasures, StoredEvent, StoredEvents, Unblanked},
    error::StoreError,
    expired::{Expired, Most, Slice},
    head::{Head, Reach, Stock},
    interface::{Batch, Capacity, Disk, DueWork, FoundJob, LARGE_JOB, Listener, News, Store},
    options::{FileUse, ORGS_PER_TRANSACTION, OpenOptions},
    query::{
        EventFilter, EventPage, EventQuery, JobPage, ListOrder, ListQuery, SeriesKind, SeriesPoint, Statistics,
        StatisticsQuery, TypeStatistics,
    },
    ready::{ClaimOrder, FoundReady, Ready, ReadyJob},
    record::RecordId,
    series::{Bucket, RemovedFlow, Series, Tally, told_since},
    tokens::TokenKey,
    url::DatabaseUrl,
    workers::{HeardWorker, WorkerPage},
};
use self::{
    imports::{of_imported, other_than},
    query::{LIST_SCAN, SCAN_WINDOW},
};
