//! What the user sees: a table, or a JSON object per line.

use anyhow::Result;

use crate::rounds::Figure;

pub struct Report {
    json: bool,
    rows: Vec<[String; 6]>,
}

impl Report {
    pub fn new(json: bool) -> Self {
        Self { json, rows: Vec::new() }
    }

    /// Adds the figures of a case; JSON is printed at once.
    pub fn add(&mut self, figures: &[Figure]) -> Result<()> {
        for figure in figures {
            if self.json {
                println!("{}", serde_json::to_string(figure)?);
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
        println!("{:10}{:22}{:>12}{:>12}  {:24}ratio", "bench", "metric", "ours", "peer", "");
        for [bench, metric, ours, peer, peer_name, ratio] in &self.rows {
            println!("{bench:10}{metric:22}{ours:>12}{peer:>12}  {peer_name:24}{ratio}");
        }
        println!("A ratio over 1 is in our favour.");
    }
}

fn row(figure: &Figure) -> [String; 6] {
    let Figure { bench, metric, ours, peer, peer_name, ratio } = figure;
    let (what, show): (_, fn(f64) -> String) = if let Some(what) = metric.strip_suffix("_per_s") {
        (what, |value| format!("{:.2} M/s", value / 1e6))
    } else if let Some(what) = metric.strip_suffix("_ns") {
        (what, |value| format!("{:.2} µs", value / 1e3))
    } else {
        (*metric, |value| format!("{value}"))
    };
    let ratio = format!("{ratio:.2}");
    [(*bench).into(), what.replace('_', " "), show(*ours), show(*peer), (*peer_name).into(), ratio]
}
