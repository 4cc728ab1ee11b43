//! The rounds: in each, every client does every job once, one after another.

use std::collections::BTreeMap;

use crate::broker::Broker;
use crate::cases::{Case, Job};
use crate::child;
use crate::clients::{Client, Work};
use crate::measure::{Measure, Result};

/// Job and size: the same for two cases if their peers do the same.
type Key = (Job, usize, Client);

/// What every run has come to, round by round.
#[derive(Debug, Default)]
pub struct Runs {
    runs: BTreeMap<Key, Vec<Option<Measure>>>,
    /// What went wrong, for the end of the report.
    pub failures: Vec<String>,
}

impl Runs {
    /// The client's rounds in a case, with nothing for one that failed. Empty if it does not take part.
    pub fn of(&self, case: &Case, client: Client) -> &[Option<Measure>] {
        let job = if client == Client::Coney { case.ours } else { case.theirs };
        self.runs.get(&(job, case.size, client)).map(Vec::as_slice).unwrap_or_default()
    }
}

pub fn run(broker: &mut Broker, cases: &[Case], clients: &[Client], rounds: usize) -> Runs {
    let groups = groups(cases, clients);
    let mut runs = Runs::default();
    for round in 0..rounds {
        for (case, entries) in &groups {
            eprintln!("round {} of {rounds}: {}", round + 1, case.name);
            // Nobody is always first, or always behind the same one.
            let begin = round % entries.len();
            for &(client, job) in entries[begin..].iter().chain(&entries[..begin]) {
                let outcome = run_one(broker, case, client, job);
                if let Err(error) = &outcome {
                    let failure = format!("{}, {}, round {}: {error}", case.name, client.name(), round + 1);
                    eprintln!("{failure}");
                    runs.failures.push(failure);
                }
                runs.runs.entry((job, case.size, client)).or_default().push(outcome.ok());
            }
        }
    }
    runs
}

/// Who runs what, side by side: cases that share their peers' job are one group, for which the peers run once.
fn groups<'a>(cases: &'a [Case], clients: &[Client]) -> Vec<(&'a Case, Vec<(Client, Job)>)> {
    let mut groups: Vec<(&Case, Vec<(Client, Job)>)> = Vec::new();
    for case in cases {
        let ours = (Client::Coney, case.ours);
        match groups.iter_mut().find(|(first, _)| (first.theirs, first.size) == (case.theirs, case.size)) {
            Some((_, entries)) => entries.insert(1, ours),
            None => {
                let peers = clients.iter().filter(|client| client.does(case.theirs));
                groups.push((case, std::iter::once(ours).chain(peers.map(|&peer| (peer, case.theirs))).collect()));
            }
        }
    }
    groups
}

fn run_one(broker: &mut Broker, case: &Case, client: Client, job: Job) -> Result<Measure> {
    let filled = if job.drains() { case.count } else { 0 };
    let queue = if job.calls() { broker.called_queue()? } else { broker.fresh_queue(filled, case.size)? };
    let work = Work::new(case, job, &broker.url(), &queue);
    let measure = child::measure(client.program(&work)?);
    if job.calls() {
        return measure;
    }
    // Also after a failure, which is then the one to tell.
    let messages = measure.as_ref().map_or(0, |measure| measure.messages);
    let left = if job.fills() { messages } else { filled.saturating_sub(messages * usize::from(job.drains())) };
    let counted = broker.finish_queue(&queue, left);
    let measure = measure?;
    counted?;
    Ok(measure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::{Scale, cases};

    #[test]
    fn cases_that_share_their_peers_are_one_group_and_nobody_runs_twice_in_it() {
        let cases = cases("", Scale::Usual);
        let groups = groups(&cases, &Client::PEERS);
        let rpc = groups.iter().find(|(case, _)| case.theirs == Job::RpcAsync).unwrap();
        assert_eq!(rpc.1[..2], [(Client::Coney, Job::RpcAsync), (Client::Coney, Job::RpcThreads)]);
        assert_eq!(rpc.1.len(), 2 + Client::PEERS.len());
        let ours = groups.iter().flat_map(|(_, entries)| entries).filter(|(client, _)| *client == Client::Coney);
        assert_eq!(ours.count(), cases.len());
    }
}
