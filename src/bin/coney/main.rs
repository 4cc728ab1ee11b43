//! The program `coney`: what one wants at hand beside a RabbitMQ, and a broker to develop against where none is installed.
//!
//! Each command says with `--help` what it does, with examples, and where its settings come from. What goes wrong is told on
//! stderr, each thing in one line that says what, why and what to try. The exit codes are the same for all commands:
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed, in whole or in part |
//! | 2 | a mistake in the arguments |
//! | 3 | `topology plan`: something is still to be created; `outbox status`: messages were refused |
//! | 4 | `topology plan` and `apply`: something exists with other properties |
//! | 5 | no connection: the broker cannot be reached, or refuses us |
//! | 6 | `get`: there was no message |
//! | 7 | the reader of stdout has gone before it had everything |
//! | 130 | a second Ctrl-C, while the first was being heeded |

mod ask;
mod bench;
mod bind;
mod broker;
mod colour;
mod completions;
mod config;
mod dead;
mod deprecated;
mod doctor;
mod exchange;
mod exit;
mod failures;
mod get;
mod interrupt;
mod letter;
mod lines;
mod listen;
mod loan;
mod network;
#[cfg(feature = "outbox-sqlite")]
mod outbox;
mod output;
mod partitions;
mod plan;
mod progress;
mod publish;
mod queue;
mod sink;
mod source;
mod topology;
mod unconfirmed;
mod values;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::exit::Failure;
use crate::source::Source;

/// Tools around RabbitMQ, of the Rust library coney.
#[derive(Debug, Parser)]
#[command(name = "coney", version, after_help = format!("Examples:
  coney queue declare orders
  coney publish '' orders hello
  coney get orders
  coney get orders --all --json-lines > orders.jsonl
  coney topology plan
  coney doctor

{}

{}", source::SETTINGS, exit::CODES))]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    source: Source,
}

#[derive(Debug, Subcommand)]
enum Command {
    Publish(Box<publish::Arguments>),
    Get(get::Arguments),
    Listen(listen::Arguments),
    Queue(queue::Arguments),
    Exchange(exchange::Arguments),
    Bind(bind::BindArguments),
    Unbind(bind::UnbindArguments),
    Topology(topology::Arguments),
    Partitions(partitions::Arguments),
    #[cfg(feature = "outbox-sqlite")]
    Outbox(outbox::Arguments),
    Dead(dead::Arguments),
    Doctor(doctor::Arguments),
    Bench(bench::Arguments),
    Broker(broker::Arguments),
    Completions(completions::Arguments),
}

impl Command {
    /// What it is told of the broker, if it talks to one.
    fn source(&mut self) -> Option<&mut Source> {
        match self {
            Command::Publish(arguments) => Some(&mut arguments.source),
            Command::Get(arguments) => Some(&mut arguments.source),
            Command::Listen(arguments) => Some(&mut arguments.source),
            Command::Queue(arguments) => Some(arguments.source()),
            Command::Exchange(arguments) => Some(arguments.source()),
            Command::Bind(arguments) => Some(arguments.source()),
            Command::Unbind(arguments) => Some(arguments.source()),
            Command::Topology(arguments) => Some(arguments.source()),
            Command::Partitions(arguments) => Some(arguments.source()),
            #[cfg(feature = "outbox-sqlite")]
            Command::Outbox(arguments) => Some(arguments.source()),
            Command::Dead(arguments) => Some(arguments.source()),
            Command::Doctor(arguments) => Some(&mut arguments.source),
            Command::Bench(arguments) => Some(&mut arguments.source),
            Command::Broker(_) | Command::Completions(_) => None,
        }
    }

    fn run(&self) -> exit::Result {
        match self {
            Command::Publish(arguments) => publish::run(arguments),
            Command::Get(arguments) => get::run(arguments),
            Command::Listen(arguments) => listen::run(arguments),
            Command::Queue(arguments) => queue::run(arguments),
            Command::Exchange(arguments) => exchange::run(arguments),
            Command::Bind(arguments) => bind::bind(arguments),
            Command::Unbind(arguments) => bind::unbind(arguments),
            Command::Topology(arguments) => topology::run(arguments),
            Command::Partitions(arguments) => partitions::run(arguments),
            #[cfg(feature = "outbox-sqlite")]
            Command::Outbox(arguments) => outbox::run(arguments),
            Command::Dead(arguments) => dead::run(arguments),
            Command::Doctor(arguments) => doctor::run(arguments),
            Command::Bench(arguments) => bench::run(arguments),
            Command::Broker(arguments) => broker::run(arguments),
            Command::Completions(arguments) => completions::run(arguments),
        }
    }
}

fn main() -> ExitCode {
    let Arguments { mut command, source } = Arguments::parse();
    let result = match command.source() {
        Some(own) => {
            own.inherit(source);
            command.run()
        }
        None if source != Source::default() => {
            Err(Failure::usage("this command takes its options behind its name, and talks to no other broker"))
        }
        None => command.run(),
    };
    result.unwrap_or_else(Failure::tell).into()
}
