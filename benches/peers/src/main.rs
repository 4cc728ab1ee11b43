//! coney beside other AMQP 0-9-1 clients: the same work, against the same broker, in turn.
//!
//! ```text
//! scripts/bench                            # everything, in some five minutes
//! scripts/bench --cases "publish sync"     # of which the names contain that
//! scripts/bench --fast                     # against `coney broker` in a process of its own, so that clients are the limit
//! scripts/bench --url URL                  # against another broker
//! ```
//!
//! Each run is a process of its own, so that its CPU time and its memory are the client's and nobody else's. It is given a
//! durable queue that nobody has used, connects, does one job, and tells what it took; the queue is then counted. Messages
//! are persistent and mandatory, whoever publishes them.
//!
//! The peers: amiquip as it comes, and with TCP_NODELAY; lapin on tokio with two workers, with deadpool-lapin where there is
//! a pool; rabbitmq-c, if it was installed when this was built; pika, if it is in the `python3` at hand or in
//! `PEERS_PYTHON`.
//!
//! What is not quite the same: coney acks several deliveries at once while more are waiting, the others one by one. coney
//! opens its channel with the first message; the others have theirs when the clock starts. coney makes a call's text JSON and
//! decodes the answer, the others only look whether it is one. Through a pool coney publishes by `Pool::publish`, whose threads
//! share the next free connection, the others by taking one for each message. pika publishes in a pipeline by its asynchronous
//! adapter and does the rest by its blocking one.

mod broker;
mod calls;
mod cases;
mod chart;
mod child;
mod clients;
mod measure;
mod report;
mod rounds;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};

use crate::broker::{Broker, Which};
use crate::clients::{Client, Work};
use crate::measure::Result;

/// Measures coney beside other AMQP 0-9-1 clients, against a RabbitMQ node of its own.
#[derive(Debug, Parser)]
#[command(name = "coney-peers", args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    hidden: Option<Hidden>,
    /// Only cases whose names contain this, such as "publish sync" or 64KiB
    #[arg(long, value_name = "SUBSTRING", default_value = "")]
    cases: String,
    /// How often everything is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// A tenth of the messages, and two rounds: to see that it works
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// Another broker
    #[arg(long, value_name = "URL", conflicts_with_all = ["fast", "embedded"])]
    url: Option<String>,
    /// coney's embedded broker in this process
    #[arg(long, conflicts_with = "fast")]
    embedded: bool,
    /// The program `coney broker`, built for release and in a process of its own: a broker that is not the limit
    #[arg(long)]
    fast: bool,
    /// Writes the results here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draws the rates here too, as SVG
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
}

/// What the processes do that this one starts.
#[derive(Debug, Subcommand)]
enum Hidden {
    #[command(hide = true)]
    Client {
        client: Client,
        #[command(flatten)]
        work: Work,
    },
    #[command(hide = true)]
    Serve { url: String, queue: String },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.hidden {
        Some(Hidden::Client { client, work }) => tell(*client, work),
        Some(Hidden::Serve { url, queue }) => calls::serve(url, queue).map(|()| true),
        None => compare(&arguments),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("coney-peers: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn tell(client: Client, work: &Work) -> Result<bool> {
    println!("{}", serde_json::to_string(&client.run(work)?)?);
    Ok(true)
}

fn which(arguments: &Arguments) -> Which<'_> {
    match arguments {
        Arguments { url: Some(url), .. } => Which::At(url),
        Arguments { fast: true, .. } => Which::Program,
        Arguments { embedded: true, .. } => Which::Embedded,
        _ => Which::RabbitMq,
    }
}

/// How many messages a run has.
fn scale(arguments: &Arguments) -> cases::Scale {
    match arguments {
        Arguments { quick: true, .. } => cases::Scale::Quick,
        Arguments { fast: true, .. } => cases::Scale::Fast,
        _ => cases::Scale::Usual,
    }
}

/// Whether nothing failed.
fn compare(arguments: &Arguments) -> Result<bool> {
    let cases = cases::cases(&arguments.cases, scale(arguments));
    if cases.is_empty() {
        return Err(format!("no case has {:?} in its name", arguments.cases).into());
    }
    let rounds = if arguments.quick { 2 } else { usize::from(arguments.rounds) };
    let installed: Vec<Client> = Client::PEERS.into_iter().filter(|peer| peer.is_installed()).collect();
    let mut broker = Broker::start(which(arguments))?;
    let start = Instant::now();
    let runs = rounds::run(&mut broker, &cases, &installed, rounds);
    let rows = report::rows(&runs, &cases, broker.name());
    println!("broker: {}; medians of {rounds} rounds in {:.0?}\n", broker.name(), start.elapsed());
    print!("{}", report::tables(&rows, &installed));
    if let Some(file) = &arguments.json {
        fs::write(file, serde_json::to_string_pretty(&rows)? + "\n")?;
    }
    if let Some(file) = &arguments.chart {
        chart::draw(file, &rows)?;
    }
    for failure in &runs.failures {
        println!("failed: {failure}");
    }
    Ok(runs.failures.is_empty())
}
