//! Results: a table for people, lines of JSON for programs.

use std::fmt::Write as _;

use serde::Serialize;

use crate::rounds::Rounds;

/// The goal of a ratio.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Bar {
    AtLeast(f64),
    AtMost(f64),
}

impl Bar {
    fn is_met(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(bar) => ratio >= bar,
            Self::AtMost(bar) => ratio <= bar,
        }
    }
}

/// A measured value, with its ratio and goal.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    name: String,
    unit: &'static str,
    value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    /// What the ratio compares the value with.
    #[serde(skip_serializing_if = "Option::is_none")]
    of: Option<String>,
    /// The smallest and largest ratio of a single round.
    #[serde(skip_serializing_if = "Option::is_none")]
    between: Option<[f64; 2]>,
    /// Processor time per call in µs: server, database, generator.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<[f64; 3]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    is_met: Option<bool>,
    #[serde(skip)]
    bar: Option<Bar>,
}

impl Figure {
    pub(crate) fn new(name: impl Into<String>, unit: &'static str, value: f64) -> Self {
        Self {
            name: name.into(),
            unit,
            value,
            ratio: None,
            of: None,
            between: None,
            cpu: None,
            is_met: None,
            bar: None,
        }
    }

    /// The median of the rounds, with the processor time per call.
    pub(crate) fn taken(name: impl Into<String>, unit: &'static str, rounds: &Rounds) -> Self {
        Self { cpu: rounds.cpu(), ..Self::new(name, unit, rounds.value()) }
    }

    /// Sets the ratio of the value to another value of the same run.
    pub(crate) fn of(mut self, what: impl Into<String>, other: f64) -> Self {
        self.ratio = Some(self.value / other);
        self.of = Some(what.into());
        self
    }

    /// Sets the ratio of two measures taken in turn, with its range over the rounds.
    pub(crate) fn of_taken(self, what: impl Into<String>, rounds: &Rounds, others: &Rounds) -> Self {
        Self { between: rounds.between(others), ..self.of(what, others.value()) }
    }

    pub(crate) fn at_least(self, bar: f64) -> Self {
        self.held_to(Bar::AtLeast(bar))
    }

    pub(crate) fn at_most(self, bar: f64) -> Self {
        self.held_to(Bar::AtMost(bar))
    }

    /// Applies a goal to the ratio, or to the value if there is no ratio.
    fn held_to(mut self, bar: Bar) -> Self {
        self.is_met = Some(bar.is_met(self.ratio.unwrap_or(self.value)));
        self.bar = Some(bar);
        self
    }
}

#[derive(Default)]
pub(crate) struct Figures(Vec<Figure>);

impl Figures {
    pub(crate) fn add(&mut self, figure: Figure) {
        eprintln!("{}", line(&figure));
        self.0.push(figure);
    }

    /// One line of JSON per figure.
    pub(crate) fn json(&self) -> String {
        let line = |figure| serde_json::to_string(figure).expect("numbers and texts serialise") + "\n";
        self.0.iter().map(line).collect()
    }

    pub(crate) fn table(&self) -> String {
        self.0.iter().fold(String::new(), |table, figure| table + &line(figure) + "\n")
    }

    /// Names of the figures that miss their goals.
    pub(crate) fn missed(&self) -> Vec<&str> {
        self.0.iter().filter(|figure| figure.is_met == Some(false)).map(|figure| &*figure.name).collect()
    }
}

fn line(figure: &Figure) -> String {
    let Figure { name, unit, value, ratio, of, between, cpu, .. } = figure;
    let value = if *value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") };
    let mut line = format!("{name:<58} {value:>9} {unit:<7}");
    if let (Some(ratio), Some(of)) = (ratio, of) {
        write!(line, " {ratio:>6.2} of {of}").expect("writing to a string");
    }
    if let Some([least, greatest]) = between {
        write!(line, ", {least:.2} to {greatest:.2}").expect("writing to a string");
    }
    if let Some([server, database, generator]) = cpu {
        write!(line, "; server {server:.1}, database {database:.1}, generator {generator:.1} µs a call")
            .expect("writing to a string");
    }
    if let (Some(bar), Some(is_met)) = (figure.bar, figure.is_met) {
        let (word, bar) = match bar {
            Bar::AtLeast(bar) => ("at least", bar),
            Bar::AtMost(bar) => ("at most", bar),
        };
        write!(line, " ({word} {bar}{})", if is_met { "" } else { ": MISSED" }).expect("writing to a string");
    }
    line
}
