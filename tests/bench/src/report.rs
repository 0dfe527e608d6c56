//! What the user sees: a table, or a JSON object per line.

use anyhow::Result;
use serde::Serialize;

use crate::rounds::Figure;

pub struct Report {
    json: bool,
    rows: Vec<[String; 5]>,
}

/// A figure in JSON: beside the best peer.
#[derive(Serialize)]
struct Line {
    bench: &'static str,
    metric: &'static str,
    ours: f64,
    peer: f64,
    peer_name: &'static str,
    ratio: f64,
}

impl Report {
    pub fn new(json: bool) -> Self {
        Self { json, rows: Vec::new() }
    }

    /// Adds the figures of a case; JSON is printed at once.
    pub fn add(&mut self, figures: &[Figure]) -> Result<()> {
        for figure in figures {
            if self.json {
                println!("{}", serde_json::to_string(&line(figure))?);
            } else {
                self.rows.push(row(figure));
            }
        }
        Ok(())
    }

    /// Prints the table.
    pub fn finish(&self) {
        if self.json {
            return;
        }
        println!("{:10}{:32}{:>10}{:>7}  peers", "bench", "metric", "ours", "ratio");
        for [bench, metric, ours, ratio, peers] in &self.rows {
            println!("{bench:10}{metric:32}{ours:>10}{ratio:>7}  {peers}");
        }
        println!("The ratio is that to the best peer, the first one; over 1 is in our favour.");
    }
}

fn line(figure: &Figure) -> Line {
    let &Figure { bench, metric, ours, ref peers, ratio } = figure;
    let (peer_name, peer) = peers[0];
    Line { bench, metric, ours, peer, peer_name, ratio }
}

fn row(figure: &Figure) -> [String; 5] {
    let Figure { bench, metric, ours, peers, ratio } = figure;
    let (what, show): (_, fn(f64) -> String) = if let Some(what) = metric.strip_suffix("_per_s") {
        (what, |value| format!("{:.2} M/s", value / 1e6))
    } else if let Some(what) = metric.strip_suffix("_ns") {
        (what, duration)
    } else {
        (*metric, |value| if value < 0.01 { format!("{value:.5}") } else { format!("{value:.2}") })
    };
    let peers: Vec<_> =
        peers.iter().map(|(name, value)| format!("{name} {}", show(*value))).collect();
    let ratio = format!("{ratio:.2}");
    [(*bench).into(), what.replace('_', " "), show(*ours), ratio, peers.join(", ")]
}

fn duration(ns: f64) -> String {
    if ns < 1e3 { format!("{ns:.1} ns") } else { format!("{:.2} µs", ns / 1e3) }
}
