//! Events as many subscribers are told of them.

use std::{
    ops::Deref,
    sync::{Arc, OnceLock},
};

use super::label_marks::LabelMarks;
use crate::{domain::event::JobEvent, store::EventFilter};

/// A committed event, with room for what it is on the wire: made by whoever tells it first, and the same for all.
#[derive(Debug)]
pub struct SharedEvent {
    event: Arc<JobEvent>,
    encoded: OnceLock<Box<[u8]>>,
    marks: OnceLock<LabelMarks>,
}

impl SharedEvent {
    /// Not told to anyone yet.
    pub(super) fn new(event: Arc<JobEvent>) -> Arc<Self> {
        Arc::new(Self { event, encoded: OnceLock::new(), marks: OnceLock::new() })
    }

    /// What it is on the wire.
    pub fn encoded(&self, encode: impl FnOnce(&JobEvent) -> Vec<u8>) -> &[u8] {
        self.encoded.get_or_init(|| encode(&self.event).into_boxed_slice())
    }

    /// True if a filter, whose labels have these marks, has it.
    pub(super) fn matches(&self, filter: &EventFilter, labels: &LabelMarks) -> bool {
        let may_have =
            filter.labels.is_empty() || self.marks.get_or_init(|| LabelMarks::of(&self.event.labels)).may_have(labels);
        may_have && filter.matches(&self.event)
    }

    /// About what it takes in memory, once it was told.
    pub(super) fn weight(&self) -> usize {
        2 * self.event.weight()
    }
}

impl Deref for SharedEvent {
    type Target = JobEvent;

    fn deref(&self) -> &JobEvent {
        &self.event
    }
}
