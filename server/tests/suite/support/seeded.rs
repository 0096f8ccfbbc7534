//! Random numbers for tests, which can be repeated by their seed.

use crate::support::cluster::environment;

/// A sequence of numbers that its seed determines: SplitMix64.
pub(crate) struct Seeded(u64);

impl Seeded {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The seed of a run: JOBLEDGER_TEST_SEED, or a random one. It is printed.
    pub(crate) fn from_environment(what: &str) -> u64 {
        let given = environment("JOBLEDGER_TEST_SEED").map(|seed| seed.parse().expect("a seed is a number"));
        let seed = given.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
        println!("{what}: JOBLEDGER_TEST_SEED={seed}");
        seed
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
