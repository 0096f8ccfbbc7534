//! Events shared by all subscribers of an org.

use std::sync::{Arc, OnceLock};

use super::label_bloom::LabelBloom;
use crate::{
    domain::{
        event::{EventKind, JobEvent},
        org_event::LogEvent,
    },
    store::EventFilter,
};

/// A committed event with its encoding, which is made by the first stream that sends it and shared by all.
#[derive(Debug)]
pub struct EncodedEvent {
    event: LogEvent,
    encoded: OnceLock<Box<[u8]>>,
    marks: OnceLock<LabelBloom>,
}

impl EncodedEvent {
    pub(super) fn new(event: LogEvent) -> Arc<Self> {
        Arc::new(Self { event, encoded: OnceLock::new(), marks: OnceLock::new() })
    }

    /// Its encoding on the wire, made by `encode` unless another stream has made it.
    pub fn encoded(&self, encode: impl FnOnce(&LogEvent) -> Vec<u8>) -> &[u8] {
        self.encoded.get_or_init(|| encode(&self.event).into_boxed_slice())
    }

    /// True if the event matches the filter, whose labels have these marks.
    pub(super) fn matches(&self, filter: &EventFilter, labels: &LabelBloom) -> bool {
        let Some(event) = self.event.job() else { return filter.has_org_events };
        let may_have = filter.labels.is_empty()
            || event.edit.is_some()
            || event.kind == EventKind::Erased
            || self.marks.get_or_init(|| LabelBloom::of(&event.labels)).may_have(labels);
        may_have && filter.matches(event)
    }

    /// The number of the event in the org's log.
    pub fn seq(&self) -> i64 {
        self.event.seq()
    }

    /// The event, if it is a change of one job.
    pub fn job(&self) -> Option<&JobEvent> {
        self.event.job().map(|event| &**event)
    }

    /// Approximate bytes in memory, its encoding included.
    pub(super) fn weight(&self) -> usize {
        2 * self.event.weight()
    }
}
