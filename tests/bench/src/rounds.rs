//! Contenders take turns.
//!
//! A round runs each contender once, in its own process; the next round starts with the next one.
//! A figure is the median over the rounds. Two things outside of the program change figures by a
//! factor, so each round is measured itself: how long a cache line takes between the two cores,
//! which changes while we run, and how much processor time others used. Rounds that were disturbed
//! are repeated, up to as many as there are; what was left out is said on stderr.

use std::iter;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::machine::{CpuTime, cache_line_round_trip_ns};

/// One comparison.
pub struct Case {
    /// The area it belongs to.
    pub bench: &'static str,
    /// Unique among all cases.
    pub name: &'static str,
    /// What a run of a contender returns, in this order.
    pub metrics: &'static [Metric],
    pub ours: Contender,
    /// At least one; the ratio is that against the best of them.
    pub peers: &'static [Peer],
}

/// What ours is compared with.
pub struct Peer {
    pub name: &'static str,
    pub run: Contender,
}

/// Does the work and returns one value per metric.
pub type Contender = fn(Effort) -> Result<Vec<f64>>;

/// What is measured. The end of the name is the unit.
pub struct Metric {
    pub name: &'static str,
    pub better: Better,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

/// How much work a contender does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    Full,
    /// Next to none, to see that it works.
    Quick,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Ours,
    /// By its place in the list.
    Peer(usize),
}

/// What came out for one metric.
pub struct Figure {
    pub bench: &'static str,
    pub metric: &'static str,
    pub ours: f64,
    /// The names of the peers, and their values; the best one first.
    pub peers: Vec<(&'static str, f64)>,
    /// Against the best peer; over 1 is in our favour.
    pub ratio: f64,
}

/// What one round gave.
struct Round {
    /// For each side, in the order of [`Case::sides`].
    values: Vec<Vec<f64>>,
    /// Before, between and after the contenders.
    cache_line_ns: Vec<f64>,
    /// Of all processors' time, the part that was not ours.
    foreign: f64,
}

/// The most foreign processor time in a round that counts.
const MOST_FOREIGN: f64 = 0.1;

/// How far the cache line's time in a round that counts may be from the median of all rounds.
const SAME_PHASE: f64 = 1.6;

/// Runs a case for `wanted` good rounds, and at most twice as many.
pub fn run(case: &'static Case, wanted: usize, effort: Effort) -> Result<Vec<Figure>> {
    let most = if effort == Effort::Quick { wanted } else { 2 * wanted };
    let mut rounds = Vec::new();
    while rounds.len() < most && (rounds.len() < wanted || good(&rounds).len() < wanted) {
        rounds.push(round(case, rounds.len(), effort)?);
    }
    let mut counted = good(&rounds);
    // With hardly a good round all are equally bad.
    if 2 * counted.len() < wanted {
        counted = rounds.iter().collect();
    }
    say_how_it_went(case, &rounds, &counted);
    Ok(figures(case, &counted))
}

fn figures(case: &Case, rounds: &[&Round]) -> Vec<Figure> {
    let figure = |(place, metric): (usize, &Metric)| {
        let value = |side: usize| median(rounds.iter().map(|round| round.values[side][place]));
        let ours = value(0);
        let names = case.peers.iter().map(|peer| peer.name);
        let mut peers: Vec<_> = names.zip((1..).map(value)).collect();
        // From the one that leaves us the least.
        peers.sort_by(|(_, one), (_, other)| {
            metric.better.ratio(ours, *one).total_cmp(&metric.better.ratio(ours, *other))
        });
        let ratio = four_digits(metric.better.ratio(ours, peers[0].1));
        for (_, value) in &mut peers {
            *value = four_digits(*value);
        }
        Figure { bench: case.bench, metric: metric.name, ours: four_digits(ours), peers, ratio }
    };
    case.metrics.iter().enumerate().map(figure).collect()
}

/// Without the digits that mean nothing.
fn four_digits(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

/// Runs every side once, from another one on in each round.
fn round(case: &Case, number: usize, effort: Effort) -> Result<Round> {
    let sides: Vec<Side> = case.sides().collect();
    let mut values = vec![Vec::new(); sides.len()];
    let before = CpuTime::now()?;
    let mut cache_line_ns = vec![cache_line_round_trip_ns()?];
    for turn in 0..sides.len() {
        let place = (number + turn) % sides.len();
        values[place] = run_contender(case, sides[place], effort)?;
        cache_line_ns.push(cache_line_round_trip_ns()?);
    }
    let foreign = CpuTime::now()?.foreign_since(&before);
    Ok(Round { values, cache_line_ns, foreign })
}

fn run_contender(case: &Case, side: Side, effort: Effort) -> Result<Vec<f64>> {
    let output = this_program("--contender", case.name, side, effort)?
        .stderr(Stdio::inherit())
        .output()
        .context("starting a contender")?;
    let side = side.name();
    ensure!(output.status.success(), "contender {side} of {}: {}", case.name, output.status);
    let values: Vec<f64> = serde_json::from_slice(&output.stdout)?;
    let expected = case.metrics.len();
    ensure!(values.len() == expected, "{} figures, not {expected}", values.len());
    Ok(values)
}

/// This program again, as a part of a case.
pub fn this_program(role: &str, case: &str, side: Side, effort: Effort) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([role, case, &side.name()]);
    if effort == Effort::Quick {
        command.arg("--quick");
    }
    Ok(command)
}

/// The rounds in which nothing outside of the program changed.
fn good(rounds: &[Round]) -> Vec<&Round> {
    let usual = median(rounds.iter().flat_map(|round| round.cache_line_ns.iter().copied()));
    let of_the_phase = |&ns: &f64| ns <= usual * SAME_PHASE && ns * SAME_PHASE >= usual;
    let is_good = |round: &&Round| {
        round.foreign <= MOST_FOREIGN && round.cache_line_ns.iter().all(of_the_phase)
    };
    rounds.iter().filter(is_good).collect()
}

fn say_how_it_went(case: &Case, rounds: &[Round], counted: &[&Round]) {
    let good = good(rounds).len();
    let ns: Vec<f64> =
        rounds.iter().flat_map(|round| round.cache_line_ns.iter().copied()).collect();
    let least = ns.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ns.iter().copied().fold(0.0, f64::max);
    let usual = median(ns.iter().copied());
    let foreign = 100.0 * median(rounds.iter().map(|round| round.foreign));
    eprintln!(
        "{}: {} rounds, {good} undisturbed, {} counted; cache line there and back {usual:.0} ns \
         ({least:.0} to {most:.0}); others used {foreign:.0} % of the processors",
        case.name,
        rounds.len(),
        counted.len(),
    );
}

/// The value in the middle; the lower one of two. Panics on none.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    percentile(values.collect(), 50)
}

/// The value that `percent` of all are not above. Panics on none.
pub fn percentile(mut values: Vec<f64>, percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() * percent).div_ceil(100).max(1) - 1]
}

impl Case {
    fn sides(&self) -> impl Iterator<Item = Side> {
        iter::once(Side::Ours).chain((0..self.peers.len()).map(Side::Peer))
    }

    /// Reads a side's name.
    pub fn side(&self, name: &str) -> Result<Side> {
        let side = self.sides().find(|side| side.name() == name);
        side.with_context(|| format!("no side {name} of {}", self.name))
    }

    pub fn contender(&self, side: Side) -> Contender {
        match side {
            Side::Ours => self.ours,
            Side::Peer(place) => self.peers[place].run,
        }
    }
}

impl Better {
    /// Over 1 when ours is better.
    fn ratio(self, ours: f64, peer: f64) -> f64 {
        match self {
            Better::Higher => ours / peer,
            Better::Lower => peer / ours,
        }
    }
}

impl Effort {
    /// The number that this effort stands for.
    pub fn of(self, full: u64, quick: u64) -> u64 {
        match self {
            Effort::Full => full,
            Effort::Quick => quick,
        }
    }
}

impl Side {
    fn name(self) -> String {
        match self {
            Side::Ours => "ours".to_owned(),
            Side::Peer(place) => format!("peer-{place}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(cache_line_ns: f64, foreign: f64) -> Round {
        Round { values: vec![], cache_line_ns: vec![cache_line_ns; 3], foreign }
    }

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let values: Vec<f64> = (1..=100).map(f64::from).rev().collect();
        assert_eq!(percentile(values.clone(), 50), 50.0);
        assert_eq!(percentile(values, 99), 99.0);
        assert_eq!(percentile(vec![7.0], 99), 7.0);
    }

    #[test]
    fn a_round_of_another_phase_or_beside_a_busy_program_does_not_count() {
        let rounds = [round(100.0, 0.0), round(520.0, 0.0), round(110.0, 0.5), round(90.0, 0.05)];
        let good: Vec<f64> = good(&rounds).iter().map(|round| round.cache_line_ns[0]).collect();
        assert_eq!(good, [100.0, 90.0]);
    }
    #[test]
    fn the_ratio_is_that_to_the_peer_that_is_best_at_the_metric() {
        const CASE: Case = Case {
            bench: "test",
            name: "test",
            metrics: &[
                Metric { name: "ops_per_s", better: Better::Higher },
                Metric { name: "wait_ns", better: Better::Lower },
            ],
            ours: |_| unreachable!(),
            peers: &[
                Peer { name: "quick", run: |_| unreachable!() },
                Peer { name: "busy", run: |_| unreachable!() },
            ],
        };
        let values = vec![vec![10.0, 10.0], vec![4.0, 5.0], vec![8.0, 20.0]];
        let round = Round { values, ..round(0.0, 0.0) };
        let figures = figures(&CASE, &[&round]);
        let told: Vec<_> = figures.iter().map(|figure| (figure.ratio, &figure.peers[..])).collect();
        assert_eq!(told[0], (1.25, &[("busy", 8.0), ("quick", 4.0)][..]));
        assert_eq!(told[1], (0.5, &[("quick", 5.0), ("busy", 20.0)][..]));
    }
}
