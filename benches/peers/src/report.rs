//! What the rounds have come to: medians and ratios, as tables for people and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use crate::cases::Case;
use crate::clients::Client;
use crate::measure::Measure;
use crate::rounds::Runs;

/// Medians of a client's rounds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Medians {
    /// Messages per second.
    pub rate: f64,
    /// Of the client's process for each message, user and system.
    pub cpu_us: f64,
    pub peak_kib: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p50_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99_us: Option<f64>,
}

/// What coney's figure is by the peer's, of each round.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Ratio {
    pub min: f64,
    pub median: f64,
    pub max: f64,
}

/// One case.
#[derive(Debug, Serialize)]
pub struct Row {
    pub case: String,
    pub broker: &'static str,
    /// Nothing if every round of it failed.
    pub coney: Option<Medians>,
    pub peers: BTreeMap<&'static str, Medians>,
    /// coney's rate by the peer's.
    pub ratios: BTreeMap<&'static str, Ratio>,
    /// coney's CPU per message by the peer's.
    pub cpu_ratios: BTreeMap<&'static str, Ratio>,
}

pub fn rows(runs: &Runs, cases: &[Case], broker: &'static str) -> Vec<Row> {
    let row = |case: &Case| {
        let ours = runs.of(case, Client::Coney);
        let theirs = Client::PEERS.iter().map(|peer| (peer.name(), runs.of(case, *peer)));
        let peers = theirs.clone().filter_map(|(name, runs)| Some((name, medians(runs)?))).collect();
        let by = |figure: fn(&Measure) -> f64| {
            theirs.clone().filter_map(|(name, theirs)| Some((name, ratio(ours, theirs, figure)?))).collect()
        };
        let (ratios, cpu_ratios) = (by(Measure::rate), by(Measure::cpu_us_each));
        Row { case: case.name.clone(), broker, coney: medians(ours), peers, ratios, cpu_ratios }
    };
    cases.iter().map(row).collect()
}

fn medians(runs: &[Option<Measure>]) -> Option<Medians> {
    let of = |value: fn(&Measure) -> Option<f64>| median(runs.iter().flatten().filter_map(value).collect());
    Some(Medians {
        rate: of(|run| Some(run.rate()))?,
        cpu_us: of(|run| Some(run.cpu_us_each()))?,
        peak_kib: of(|run| Some(run.peak_kib as f64))?,
        p50_us: of(|run| run.p50_us),
        p99_us: of(|run| run.p99_us),
    })
}

fn ratio(ours: &[Option<Measure>], theirs: &[Option<Measure>], figure: fn(&Measure) -> f64) -> Option<Ratio> {
    let rounds = ours.iter().zip(theirs);
    let mut ratios: Vec<f64> =
        rounds.filter_map(|(ours, theirs)| Some(figure(ours.as_ref()?) / figure(theirs.as_ref()?))).collect();
    ratios.sort_by(f64::total_cmp);
    let (min, max) = (*ratios.first()?, *ratios.last()?);
    Some(Ratio { min, median: median(ratios)?, max })
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    Some(if values.len().is_multiple_of(2) { (values[values.len() / 2 - 1] + upper) / 2.0 } else { upper })
}

/// The tables. Peers that are not installed have a column that says so.
pub fn tables(rows: &[Row], installed: &[Client]) -> String {
    let mut text = String::new();
    let mut table = |title: &str, ours: bool, cell: &dyn Fn(&Row, Client) -> Option<String>| {
        let clients = ours.then_some(Client::Coney).into_iter().chain(Client::PEERS);
        let with_any = |row: &&Row| clients.clone().any(|client| cell(row, client).is_some());
        let rows: Vec<&Row> = rows.iter().filter(with_any).collect();
        if rows.is_empty() {
            return;
        }
        // Nothing can go wrong in writing to a String.
        let _ = write!(text, "{title:24}");
        for client in clients.clone() {
            let _ = write!(text, "{:>20}", client.name());
        }
        text.push('\n');
        for row in rows {
            let _ = write!(text, "{:24}", row.case);
            for client in clients.clone() {
                let there = client == Client::Coney || installed.contains(&client);
                let empty = if there { "-" } else { "not installed" };
                let _ = write!(text, "{:>20}", cell(row, client).unwrap_or_else(|| empty.to_owned()));
            }
            text.push('\n');
        }
        text.push('\n');
    };
    table("messages per second", true, &|row, client| Some(format!("{:.0}", of(row, client)?.rate)));
    table("coney : peer, by round", false, &|row, client| {
        let Ratio { min, median, max } = row.ratios.get(client.name())?;
        Some(format!("{min:.2} / {median:.2} / {max:.2}"))
    });
    table("CPU, coney : peer", false, &|row, client| {
        let Ratio { min, median, max } = row.cpu_ratios.get(client.name())?;
        Some(format!("{min:.2} / {median:.2} / {max:.2}"))
    });
    table("CPU us per message", true, &|row, client| Some(format!("{:.1}", of(row, client)?.cpu_us)));
    table("p50 / p99 us", true, &|row, client| {
        let medians = of(row, client)?;
        Some(format!("{:.0} / {:.0}", medians.p50_us?, medians.p99_us?))
    });
    table("peak MiB", true, &|row, client| Some(format!("{:.1}", of(row, client)?.peak_kib / 1024.0)));
    text
}

fn of(row: &Row, client: Client) -> Option<Medians> {
    if client == Client::Coney { row.coney } else { row.peers.get(client.name()).copied() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(rate: usize) -> Option<Measure> {
        let (seconds, cpu_us, peak_kib) = (1.0, 10.0 * rate as f64, 1024);
        Some(Measure { messages: rate, seconds, cpu_us, peak_kib, p50_us: None, p99_us: None })
    }

    #[test]
    fn ratios_are_of_the_same_round_and_leave_out_what_failed() {
        let ratio =
            super::ratio(&[run(10), None, run(30), run(40)], &[run(20), run(1), run(10), run(40)], Measure::rate);
        let ratio = ratio.unwrap();
        assert_eq!([ratio.min, ratio.median, ratio.max], [0.5, 1.0, 3.0]);
        assert!(super::ratio(&[None], &[run(1)], Measure::rate).is_none());
    }

    #[test]
    fn medians_are_of_the_rounds_that_there_were() {
        let medians = medians(&[run(10), None, run(30), run(20)]).unwrap();
        assert_eq!((medians.rate, medians.cpu_us, medians.p50_us), (20.0, 10.0, None));
        assert_eq!(median(vec![1.0, 2.0, 4.0, 9.0]), Some(3.0));
        assert!(super::medians(&[]).is_none());
    }
}
