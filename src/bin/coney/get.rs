//! `coney get`: messages of a queue, one by one, each settled only once it is out of the program.

use std::io;
use std::time::Duration;

use coney::{PooledConnection, Received};

use crate::exit::{CODES, Exit, Failure, Result};
use crate::loan::Loan;
use crate::output::Format;
use crate::progress::Progress;
use crate::sink::{GIVEN_BACK, Sink};
use crate::source::{SETTINGS, Source};

/// Takes messages out of a queue and prints them.
///
/// A message is acked once it has been written to stdout; where that is a pipe, once it has been read out of the pipe. If
/// that fails, as it does when the reader of a pipe has gone, the message goes back to its queue.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Examples:
  coney get orders
  coney get orders --count 10 --requeue --json-lines    # a look that takes nothing
  coney get orders --all --json-lines > orders.jsonl
  coney get orders --wait 30s || echo 'nothing came'

{SETTINGS}

{CODES}"))]
pub struct Arguments {
    queue: String,
    /// How many at most.
    #[arg(long, value_name = "NUMBER", default_value_t = 1, conflicts_with = "all", value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// All there are, until the queue is empty.
    #[arg(long)]
    all: bool,
    /// How long to wait for the first message, if there is none yet: 10s, 5m.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,
    /// Acks each message, which takes it off the queue. This is the default.
    #[arg(long, group = "settle")]
    ack: bool,
    /// Puts all of them back in the end, marked as redelivered. They are kept in memory, and from others, until then.
    #[arg(long, group = "settle")]
    requeue: bool,
    /// Rejects each message: dead-lettered where the queue says where to, dropped otherwise.
    #[arg(long, group = "settle")]
    reject: bool,
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    pub source: Source,
}

pub fn run(arguments: &Arguments) -> Result {
    let sink = Sink::open(arguments.format)?;
    let app = arguments.source.app(|_| ())?;
    let connection = arguments.source.pool(&app, app.listen_pool())?.connection_or_cause()?;
    match print_all(arguments, &sink, &connection)? {
        0 if !arguments.all => Err(Failure::new(Exit::Empty, format!("queue {:?} has no message", arguments.queue))),
        _ => Ok(Exit::Done),
    }
}

/// Writes a message. One that goes back anyhow need not have been read.
fn print(sink: &Sink, received: &Received, goes_back: bool) -> io::Result<()> {
    sink.write(received)?;
    if !goes_back {
        sink.wait_for_reader(|| false)?;
    }
    Ok(())
}

fn print_all(arguments: &Arguments, sink: &Sink, connection: &PooledConnection) -> Result<u64> {
    let Arguments { queue, count, all, wait, requeue, reject, .. } = arguments;
    let progress = Progress::of_printing(if *all { None } else { Some(*count) });
    // None is put back before all have been taken, or it would come round again.
    let mut held = Vec::new();
    let mut number = 0;
    while *all || number < *count {
        let loan = match wait.filter(|_| number == 0) {
            Some(wait) => connection.get_timeout(queue, wait)?.map(Loan::of),
            None => Loan::get(connection, queue)?,
        };
        let Some(loan) = loan else { break };
        print(sink, &loan, *requeue).map_err(|error| Failure::from(error).and(GIVEN_BACK))?;
        number += 1;
        progress.step();
        if *requeue {
            held.push(loan);
        } else if *reject {
            loan.reject()?;
        } else {
            loan.ack()?;
        }
    }
    drop(held);
    if number > 1 {
        progress.done(if *requeue { "looked at" } else { "taken" });
    }
    Ok(number)
}
