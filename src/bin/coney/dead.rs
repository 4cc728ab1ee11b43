//! `coney dead`: what a queue's listeners have given up, and what becomes of it.

use clap::Subcommand;
use coney::{Connection, Message};

use crate::ask;
use crate::exit::{CODES, Exit, Failure, Result, complain, error_at, explain};
use crate::letter::{self, Letter};
use crate::loan::Loan;
use crate::output;
use crate::progress::Progress;
use crate::source::{SETTINGS, Source};

const SUFFIX: &str = ".dead";

/// How many messages are put back on their way at a time.
const BATCH: usize = 200;

/// Looks at, puts back or drops the messages in a dead-letter queue: QUEUE.dead.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows the messages, oldest first, and leaves them where they are.
    ///
    /// They are taken, and put back in the end; the broker then marks them as redelivered, and in a quorum queue counts a
    /// delivery more. Whoever consumes from the queue meanwhile may get them in another order.
    #[command(after_help = format!("Examples:
  coney dead list orders
  coney dead list orders --reason timeout --count 10
  coney dead list orders --json-lines | jq -r .reason | sort | uniq -c
  coney dead list orders --json-lines | jq -c .message | coney publish '' elsewhere --json-lines

{SETTINGS}

{CODES}"))]
    List {
        #[command(flatten)]
        options: Options,
        /// Prints each message as a line of JSON: how it failed, its body (as it is, if it is a JSON object or list), and
        /// under `message` all there is to it, as `coney publish --json-lines` reads it.
        #[arg(long, visible_alias = "json")]
        json_lines: bool,
    },
    /// Moves the messages back to the queue they failed in, as if they had never failed.
    ///
    /// That is the queue in which the broker has found it dead, by its header x-death, and QUEUE where it has none. --to
    /// names another. The header coney-queue decides nothing: whoever has published the message may have written it.
    ///
    /// Each is published to its queue, and taken off the dead once that is confirmed: if this ends in between there are two
    /// of it, never none. Of the headers the attempts start at 0, and reason, time and x-death are gone.
    #[command(after_help = format!("Examples:
  coney dead replay orders --count 1
  coney dead replay orders --reason 'connection refused'
  coney dead replay orders --to orders-by-hand

{SETTINGS}

{CODES}"))]
    Replay {
        #[command(flatten)]
        options: Options,
        /// Moves the messages to this queue, wherever they failed.
        #[arg(long, value_name = "QUEUE", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        to: Option<String>,
    },
    /// Drops the messages for good.
    #[command(after_help = format!("Examples:
  coney dead drop orders --reason 'no such customer' --yes
  coney dead list orders --json-lines > backup.jsonl && coney dead drop orders

{SETTINGS}

{CODES}"))]
    Drop {
        #[command(flatten)]
        options: Options,
        /// Does not ask.
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Options {
    /// The queue whose messages have been given up: for orders.dead, orders; orders.dead itself will do.
    queue: String,
    /// How many at most, of those that --reason picks. Defaults to all.
    #[arg(long, value_name = "NUMBER", default_value_t = u64::MAX, hide_default_value = true,
        value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// Only messages whose reason has this text in it, in any case.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,
    #[command(flatten)]
    source: Source,
}

impl Arguments {
    pub fn source(&mut self) -> &mut Source {
        match &mut self.command {
            Command::List { options, .. } | Command::Replay { options, .. } | Command::Drop { options, .. } => {
                &mut options.source
            }
        }
    }
}

pub fn run(arguments: &Arguments) -> Result {
    match &arguments.command {
        Command::List { options, json_lines } => list(options, *json_lines),
        Command::Replay { options, to } => replay(options, to.as_deref()),
        Command::Drop { options, yes } => drop_all(options, *yes),
    }
}

impl Options {
    fn original(&self) -> &str {
        self.queue.strip_suffix(SUFFIX).unwrap_or(&self.queue)
    }

    fn dead(&self) -> String {
        format!("{}{SUFFIX}", self.original())
    }

    /// Runs `work` with a connection on which nothing is published without a queue to take it.
    fn connected(&self, work: impl FnOnce(&Connection, Dead<'_>) -> Result) -> Result {
        let app = self.source.app(|pool| pool.mandatory = true)?;
        let pool = self.source.pool(&app, app.listen_pool())?;
        let connection = pool.connection_or_cause()?;
        let queue = self.dead();
        let there = connection.queue_declare_passive(&queue).map_err(|error| match error.code() {
            Some(404) => {
                Failure::failed(format!("there is no queue {queue:?}; a listener with a retry policy makes it"))
            }
            _ => Failure::from(error),
        })?;
        let (there, user) = (u64::from(there.message_count), pool.settings().broker.user.as_str());
        work(&connection, Dead { options: self, queue, there, user })
    }
}

/// The dead of one queue.
struct Dead<'o> {
    options: &'o Options,
    queue: String,
    /// How many there were at the beginning. Those that come later are left alone, so that a replay ends even if its
    /// messages come back at once.
    there: u64,
    user: &'o str,
}

impl Dead<'_> {
    fn count(&self) -> String {
        output::count(self.there, "message")
    }

    /// Hands those that were asked for to `work`. Those that were not are put back in the end, as are those `work` keeps.
    fn each<'c>(
        &self,
        connection: &'c Connection,
        held: &mut Vec<Loan<'c>>,
        mut work: impl FnMut(&mut Vec<Loan<'c>>, Loan<'c>, Letter) -> Result<()>,
    ) -> Result<u64> {
        let mut chosen = 0;
        for _ in 0..self.there {
            if chosen == self.options.count {
                break;
            }
            let Some(loan) = Loan::get(connection, &self.queue)? else { break };
            let letter = Letter::of(&loan);
            if letter.has_reason(&self.options.reason) {
                chosen += 1;
                work(held, loan, letter)?;
            } else {
                held.push(loan);
            }
        }
        Ok(chosen)
    }
}

fn list(options: &Options, json_lines: bool) -> Result {
    options.connected(|connection, dead| {
        let mut held = Vec::new();
        let mut number = 0;
        let chosen = dead.each(connection, &mut held, |held, loan, letter| {
            number += 1;
            let line = match json_lines {
                true => output::json(&letter.to_json(number, &loan))?,
                false => letter.to_line(number, &loan),
            };
            held.push(loan);
            Ok(output::line(&line)?)
        })?;
        if !json_lines {
            output::say(&format!("{chosen} of {} in {}", dead.count(), dead.queue))?;
        }
        Ok(Exit::Done)
    })
}

fn drop_all(options: &Options, yes: bool) -> Result {
    options.connected(|connection, dead| {
        let most = dead.there.min(options.count);
        if !yes && !agrees(most, &dead)? {
            return Err(Failure::failed("nothing was dropped"));
        }
        let progress = Progress::new(Some(most));
        let mut held = Vec::new();
        let dropped = dead.each(connection, &mut held, |_, loan, _| {
            loan.ack()?;
            progress.step();
            Ok(())
        })?;
        progress.done("dropped");
        output::say(&format!("dropped {dropped} of {} in {}", dead.count(), dead.queue))?;
        Ok(Exit::Done)
    })
}

/// Asks whoever sits at the terminal.
fn agrees(number: u64, dead: &Dead<'_>) -> Result<bool> {
    let which = if dead.options.reason.is_empty() { "" } else { "those with this reason of " };
    ask::agrees(&format!("Drop {which}{} in {} for good?", output::count(number, "message"), dead.queue))
}

fn replay(options: &Options, to: Option<&str>) -> Result {
    options.connected(|connection, dead| {
        let progress = Progress::new(Some(dead.there.min(options.count)));
        let mut batch = Batch { connection, progress, loans: Vec::new(), replayed: 0, failed: Vec::new() };
        // Those that fail are kept until the end too, so that none is tried twice.
        let mut held = Vec::new();
        let result = dead.each(connection, &mut held, |held, loan, letter| {
            let queue = to.map_or_else(|| letter.home(options.original(), &dead.queue), str::to_owned);
            let message = letter::revived(&loan, &letter, dead.user);
            batch.loans.push((queue, message, loan));
            if batch.loans.len() == BATCH { batch.send(held) } else { Ok(()) }
        });
        let sent = batch.send(&mut held);
        for (problem, number) in &batch.failed {
            let number = output::count(*number, "message");
            batch.progress.suspend(|| complain(format_args!("{number} not put back to {problem}")));
        }
        result.and(sent)?;
        batch.progress.done("replayed");
        output::say(&format!("replayed {} of {} in {}", batch.replayed, dead.count(), dead.queue))?;
        Ok(if batch.failed.is_empty() { Exit::Done } else { Exit::Failed })
    })
}

/// Messages on their way back.
struct Batch<'c> {
    connection: &'c Connection,
    progress: Progress,
    loans: Vec<(String, Message, Loan<'c>)>,
    replayed: u64,
    /// Where messages could not be put back and why, and how many each time.
    failed: Vec<(String, u64)>,
}

impl<'c> Batch<'c> {
    /// Publishes them and takes off the dead what is confirmed.
    fn send(&mut self, held: &mut Vec<Loan<'c>>) -> Result<()> {
        let loans = std::mem::take(&mut self.loans);
        let messages = loans.iter().map(|(queue, message, _)| ("", queue.as_str(), message.clone()));
        let sent = self.connection.publish_batch(messages);
        let mut acked = Ok(());
        for (position, (queue, _, loan)) in loans.into_iter().enumerate() {
            if let Some(error) = error_at(&sent, position) {
                held.push(loan);
                let problem = format!("{queue:?}: {}", explain(error));
                match self.failed.iter_mut().find(|(known, _)| *known == problem) {
                    Some((_, number)) => *number += 1,
                    None => self.failed.push((problem, 1)),
                }
                continue;
            }
            self.replayed += 1;
            self.progress.step();
            acked = acked.and(loan.ack().map_err(Failure::from));
        }
        acked
    }
}
