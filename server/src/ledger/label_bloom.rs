//! A Bloom filter (Bloom 1970) of 512 bits over labels. A stream with a label filter compares labels only of events that may
//! have all of them.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    sync::LazyLock,
};

/// Randomly keyed for each process, so that callers can't choose labels that collide.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// The marks of some labels, one bit for each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct LabelBloom([u64; 8]);

impl LabelBloom {
    pub(super) fn of(labels: &BTreeMap<String, String>) -> Self {
        let mut marks = Self::default();
        for label in labels {
            let hash = HASHER.hash_one(label);
            marks.0[(hash >> 6) as usize % 8] |= 1 << (hash % 64);
        }
        marks
    }

    /// False: at least one of the other labels is missing. True does not prove that all are there.
    pub(super) fn may_have(&self, others: &Self) -> bool {
        self.0.iter().zip(others.0).all(|(has, wanted)| has & wanted == wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_are_there_are_never_missed_and_others_seldom_taken_for_them() {
        let labels = |range: std::ops::Range<usize>| range.map(|n| (format!("l{n}"), "v".to_owned())).collect();
        let all = LabelBloom::of(&labels(0..32));
        assert!(all.may_have(&LabelBloom::of(&labels(3..30))) && all.may_have(&LabelBloom::default()));
        let taken = (100..1_100).filter(|n| all.may_have(&LabelBloom::of(&labels(*n..n + 1)))).count();
        assert!(taken < 200, "{taken} of 1,000");
        assert!(!LabelBloom::default().may_have(&all));
    }
}
