//! Events shared by all subscribers of an org.

use std::{
    ops::Deref,
    sync::{Arc, OnceLock},
};

use super::label_bloom::LabelBloom;
use crate::{domain::event::JobEvent, store::EventFilter};

/// A committed event with its encoding, which is made by the first stream that sends it and shared by all.
#[derive(Debug)]
pub struct EncodedEvent {
    event: Arc<JobEvent>,
    encoded: OnceLock<Box<[u8]>>,
    marks: OnceLock<LabelBloom>,
}

impl EncodedEvent {
    pub(super) fn new(event: Arc<JobEvent>) -> Arc<Self> {
        Arc::new(Self { event, encoded: OnceLock::new(), marks: OnceLock::new() })
    }

    /// Its encoding on the wire, made by `encode` unless another stream has made it.
    pub fn encoded(&self, encode: impl FnOnce(&JobEvent) -> Vec<u8>) -> &[u8] {
        self.encoded.get_or_init(|| encode(&self.event).into_boxed_slice())
    }

    /// True if the event matches the filter, whose labels have these marks.
    pub(super) fn matches(&self, filter: &EventFilter, labels: &LabelBloom) -> bool {
        let may_have =
            filter.labels.is_empty() || self.marks.get_or_init(|| LabelBloom::of(&self.event.labels)).may_have(labels);
        may_have && filter.matches(&self.event)
    }

    /// Approximate bytes in memory, its encoding included.
    pub(super) fn weight(&self) -> usize {
        2 * self.event.weight()
    }
}

impl Deref for EncodedEvent {
    type Target = JobEvent;

    fn deref(&self) -> &JobEvent {
        &self.event
    }
}
