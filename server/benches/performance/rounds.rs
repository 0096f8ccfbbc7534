//! Measures taken in turn, so that whatever the machine does meanwhile befalls all of them.

use std::pin::Pin;

use crate::common::{Result, median};

/// A measure to be taken again and again.
pub(crate) struct Measure<'a> {
    name: &'static str,
    take: Box<dyn FnMut() -> Taking<'a> + 'a>,
}

type Taking<'a> = Pin<Box<dyn Future<Output = Result<f64>> + 'a>>;

impl<'a> Measure<'a> {
    pub(crate) fn new<F: Future<Output = Result<f64>> + 'a>(
        name: &'static str,
        mut take: impl FnMut() -> F + 'a,
    ) -> Self {
        Self { name, take: Box::new(move || Box::pin(take())) }
    }
}

/// The median of each measure.
pub(crate) async fn medians<const N: usize>(rounds: usize, mut measures: [Measure<'_>; N]) -> Result<[f64; N]> {
    let mut taken = [(); N].map(|()| Vec::with_capacity(rounds));
    for _ in 0..rounds {
        for (measure, taken) in measures.iter_mut().zip(&mut taken) {
            let value = (measure.take)().await.map_err(|error| format!("{}: {error}", measure.name))?;
            eprint!("  {} {value:.1}", measure.name);
            taken.push(value);
        }
        eprintln!();
    }
    Ok(taken.map(median))
}
