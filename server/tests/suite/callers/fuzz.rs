//! Bytes from outside: the corpus in `server/fuzz/corpus`, and random changes of it. `make fuzz` runs a coverage-guided fuzzer.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use jobledger_server::fuzzing::{TARGETS, Target};

use crate::{
    support::harness::{root, short_or_long},
    support::seeded::Seeded,
};

/// The corpus of a target.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = root().join("server/fuzz/corpus").join(name);
    let mut paths: Vec<_> =
        fs::read_dir(&folder).expect("every target has a corpus").map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", folder.display());
    paths.into_iter().map(|path| fs::read(path).expect("a file")).collect()
}

/// A random entry of the corpus with one to four random changes.
fn changed(random: &mut Seeded, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = corpus[random.below(corpus.len() as u64) as usize].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() as u64 + 1) as usize;
        let to = (at + random.below(9) as usize).min(bytes.len());
        match random.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'.', b'-'][random.below(8) as usize],
            2 => drop(bytes.drain(at..to)),
            3 => {
                let again = bytes[at..to].repeat(random.below(4) as usize + 1);
                bytes.splice(at..at, again);
            }
            4 => bytes.truncate(at),
            _ => {
                let other = &corpus[random.below(corpus.len() as u64) as usize];
                let from = random.below(other.len() as u64 + 1) as usize;
                bytes.splice(at..to, other[from..].iter().copied());
            }
        }
    }
    bytes
}

fn try_all(name: &str, target: Target, time: Duration, seed: u64) {
    let try_one = |bytes: &[u8]| {
        if catch_unwind(AssertUnwindSafe(|| target(bytes))).is_err() {
            panic!("{name} can't bear {:?}", String::from_utf8_lossy(bytes));
        }
    };
    let corpus = corpus(name);
    corpus.iter().for_each(|bytes| try_one(bytes));
    let (mut random, began, mut tried) = (Seeded::new(seed), Instant::now(), 0);
    while began.elapsed() < time {
        try_one(&changed(&mut random, &corpus));
        tried += 1;
    }
    println!("{name}: {} of the corpus, and {tried} of chance", corpus.len());
    assert!(tried > 100, "{tried} were tried");
}

#[test]
fn whatever_comes_from_outside_is_read_or_refused() {
    let seed = Seeded::from_environment("bytes from outside");
    for (name, target) in TARGETS {
        try_all(name, target, Duration::from_secs(short_or_long(1, 60)), seed);
    }
}
