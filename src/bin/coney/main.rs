//! The program `coney`: a broker to develop against where none is installed.
//!
//! Exit code 0 is an orderly end, 1 a failure, told in one line on stderr, and 2 a mistake in the arguments.

mod broker;
mod config;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tools around RabbitMQ, of the Rust library coney.
#[derive(Debug, Parser)]
#[command(name = "coney", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Broker(broker::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Broker(arguments) => broker::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("coney: {problem}");
            ExitCode::FAILURE
        }
    }
}
