//! Measures taken in turn, so that changes in the machine's speed affect all of them alike.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use crate::{
    common::{Result, median},
    spent::{Meter, Spent},
};

/// A measure that is taken once per round.
pub(crate) struct Measure<'a> {
    name: &'static str,
    /// For a rate of calls: the processes whose processor time is counted.
    meter: Option<Meter<'a>>,
    take: Box<dyn FnMut() -> Taking<'a> + 'a>,
}

type Taking<'a> = Pin<Box<dyn Future<Output = Result<f64>> + 'a>>;

impl<'a> Measure<'a> {
    pub(crate) fn new<F: Future<Output = Result<f64>> + 'a>(
        name: &'static str,
        mut take: impl FnMut() -> F + 'a,
    ) -> Self {
        Self { name, meter: None, take: Box::new(move || Box::pin(take())) }
    }

    /// A rate of calls, with the processor time per call.
    pub(crate) fn rate<F: Future<Output = Result<f64>> + 'a>(
        name: &'static str,
        meter: Meter<'a>,
        take: impl FnMut() -> F + 'a,
    ) -> Self {
        Self { meter: Some(meter), ..Self::new(name, take) }
    }

    async fn round(&mut self) -> Result<Round> {
        let (before, since) = (self.meter.map(Meter::look).transpose()?, Instant::now());
        let value = (self.take)().await.map_err(|error| format!("{}: {error}", self.name))?;
        let took = since.elapsed();
        let after = self.meter.map(Meter::look).transpose()?;
        let cpu = before.zip(after).map(|(before, after)| a_call(before, after, value * took.as_secs_f64()));
        Ok(Round { value, cpu })
    }
}

/// Processor time per call in µs: server, database, generator.
pub(crate) fn a_call(before: Spent, after: Spent, calls: f64) -> [f64; 3] {
    let a_call = |spent: Duration| spent.as_secs_f64() * 1e6 / calls.max(1.0);
    [
        after.server.saturating_sub(before.server),
        after.database.saturating_sub(before.database),
        after.generator.saturating_sub(before.generator),
    ]
    .map(a_call)
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    pub(crate) value: f64,
    /// For a rate: the processor time per call, see [`a_call`].
    pub(crate) cpu: Option<[f64; 3]>,
}

/// The results of all rounds of a measure.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rounds(Vec<Round>);

impl Rounds {
    pub(crate) fn add(&mut self, round: Round) {
        self.0.push(round);
    }

    /// The median of the values.
    pub(crate) fn value(&self) -> f64 {
        median(self.0.iter().map(|round| round.value).collect())
    }

    /// The medians of the processor times per call.
    pub(crate) fn cpu(&self) -> Option<[f64; 3]> {
        let all: Vec<_> = self.0.iter().filter_map(|round| round.cpu).collect();
        (!all.is_empty()).then(|| [0, 1, 2].map(|n| median(all.iter().map(|cpu| cpu[n]).collect())))
    }

    /// The smallest and largest ratio of a round to the same round of another measure.
    pub(crate) fn between(&self, others: &Self) -> Option<[f64; 2]> {
        let ratios = || self.0.iter().zip(&others.0).map(|(one, other)| one.value / other.value);
        Some([ratios().reduce(f64::min)?, ratios().reduce(f64::max)?])
    }
}

/// Takes each measure once per round, in turn.
pub(crate) async fn take<const N: usize>(rounds: usize, mut measures: [Measure<'_>; N]) -> Result<[Rounds; N]> {
    let mut taken = [(); N].map(|()| Rounds::default());
    for _ in 0..rounds {
        for (measure, taken) in measures.iter_mut().zip(&mut taken) {
            let round = measure.round().await?;
            eprint!("  {} {:.1}", measure.name, round.value);
            taken.add(round);
        }
        eprintln!();
    }
    Ok(taken)
}
