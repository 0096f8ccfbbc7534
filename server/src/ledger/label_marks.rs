//! Whether labels may be among others, told from marks of 512 bits (Bloom 1970): a stream by many labels looks closer only at events that may
//! have them all.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    sync::LazyLock,
};

/// With keys of this process: who chooses labels can't have marks coincide.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// The marks of some labels, a bit for each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct LabelMarks([u64; 8]);

impl LabelMarks {
    pub(super) fn of(labels: &BTreeMap<String, String>) -> Self {
        let mut marks = Self::default();
        for label in labels {
            let hash = HASHER.hash_one(label);
            marks.0[(hash >> 6) as usize % 8] |= 1 << (hash % 64);
        }
        marks
    }

    /// False if one of the others is not among these labels; mostly, if not.
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
        let all = LabelMarks::of(&labels(0..32));
        assert!(all.may_have(&LabelMarks::of(&labels(3..30))) && all.may_have(&LabelMarks::default()));
        let taken = (100..1_100).filter(|n| all.may_have(&LabelMarks::of(&labels(*n..n + 1)))).count();
        assert!(taken < 200, "{taken} of 1,000");
        assert!(!LabelMarks::default().may_have(&all));
    }
}
