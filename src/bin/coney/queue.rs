//! `coney queue`: makes queues, removes them, empties them, and counts what is in them.

use clap::Subcommand;
use coney::{Connection, FieldValue, Pool, Queue};
use serde_json::json;

use crate::ask;
use crate::exit::{CODES, Exit, Failure, Result, complain, explain};
use crate::output;
use crate::source::{SETTINGS, Source};
use crate::values;

/// Declares, deletes, purges or lists queues.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a queue, unless it is there with the same properties.
    ///
    /// It is durable: a restart of the broker does not remove it. One that is there with other properties is left as it is, and
    /// told.
    #[command(after_help = format!("Examples:
  coney queue declare orders
  coney queue declare orders --argument x-message-ttl:=60000 --argument x-dead-letter-exchange=dead
  coney queue declare orders --quorum

{SETTINGS}

{CODES}"))]
    Declare {
        queue: String,
        /// A restart of the broker removes the queue.
        #[arg(long)]
        transient: bool,
        /// The queue goes when its last consumer goes.
        #[arg(long)]
        auto_delete: bool,
        /// A queue that is kept on several nodes of a RabbitMQ cluster.
        #[arg(long, conflicts_with_all = ["transient", "auto_delete"])]
        quorum: bool,
        /// An optional argument, as text, or with := as JSON; may be given several times.
        #[arg(long, value_name = "NAME=TEXT|NAME:=JSON", value_parser = values::named)]
        argument: Vec<(String, FieldValue)>,
        #[command(flatten)]
        source: Source,
    },
    /// Deletes a queue, with the messages in it and its bindings.
    ///
    /// Asks if there are messages in it.
    #[command(after_help = format!("Examples:
  coney queue delete orders
  coney queue delete orders --if-unused --yes

{SETTINGS}

{CODES}"))]
    Delete {
        queue: String,
        /// Not while it has consumers.
        #[arg(long)]
        if_unused: bool,
        /// Does not ask.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        source: Source,
    },
    /// Drops the messages in a queue for good, but those that a consumer has and has not acked.
    ///
    /// Asks if there are any.
    #[command(after_help = format!("Examples:
  coney queue purge orders
  coney queue purge orders --yes

{SETTINGS}

{CODES}"))]
    Purge {
        queue: String,
        /// Does not ask.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        source: Source,
    },
    /// Shows how many messages wait in queues, and how many consumers they have.
    ///
    /// The queues are those that are named, or else those of the topology in the settings: over AMQP a broker cannot be asked
    /// which queues it has. One that is not there is told, and the exit code is then 1.
    #[command(after_help = format!("Examples:
  coney queue list
  coney queue list orders orders.dead
  coney queue list --json-lines | jq 'select(.consumers == 0)'

{SETTINGS}

{CODES}"))]
    List {
        /// The queues. Defaults to those of the topology in the settings.
        queues: Vec<String>,
        /// Prints each queue as a line of JSON: queue, messages and consumers.
        #[arg(long)]
        json_lines: bool,
        #[command(flatten)]
        source: Source,
    },
}

impl Arguments {
    pub fn source(&mut self) -> &mut Source {
        match &mut self.command {
            Command::Declare { source, .. }
            | Command::Delete { source, .. }
            | Command::Purge { source, .. }
            | Command::List { source, .. } => source,
        }
    }
}

pub fn run(arguments: &Arguments) -> Result {
    match &arguments.command {
        Command::Declare { queue, transient, auto_delete, quorum, argument, source } => {
            let declared = Queue::new(named("queue", queue)?).durable(!transient).auto_delete(*auto_delete);
            let declared = if *quorum { declared.quorum() } else { declared };
            let declared = argument.iter().fold(declared, |queue, (name, value)| queue.argument(name, value.clone()));
            connected(source, |connection| {
                let info = connection.queue_declare(&declared)?;
                output::say(&format!(
                    "declared queue {queue} ({}, {})",
                    output::count(info.message_count.into(), "message"),
                    output::count(info.consumer_count.into(), "consumer"),
                ))
                .map_err(Failure::from)
            })
        }
        Command::Delete { queue, if_unused, yes, source } => {
            connected(source, |connection| delete(connection, named("queue", queue)?, *if_unused, *yes))
        }
        Command::Purge { queue, yes, source } => connected(source, |connection| {
            let messages = connection.queue_declare_passive(named("queue", queue)?)?.message_count;
            may_be_dropped(queue, messages, *yes)?;
            let purged = connection.queue_purge(queue)?;
            Ok(output::say(&format!("purged {} from queue {queue}", output::count(purged.into(), "message")))?)
        }),
        Command::List { queues, json_lines, source } => list(queues, *json_lines, source),
    }
}

/// A name that is not empty. The broker would take an empty one for the last queue it has made up a name for.
pub fn named<'n>(what: &str, name: &'n str) -> Result<&'n str> {
    match name {
        "" => Err(Failure::usage(format!("{what}: expected a name, got ''"))),
        _ => Ok(name),
    }
}

/// Does `work` with a connection.
pub fn connected(source: &Source, work: impl FnOnce(&Connection) -> Result<()>) -> Result {
    let app = source.app(|_| ())?;
    let pool: &Pool = source.pool(&app, app.publish_pool())?;
    work(&*pool.connection_or_cause()?)?;
    Ok(Exit::Done)
}

fn may_be_dropped(queue: &str, messages: u32, yes: bool) -> Result<()> {
    if messages == 0 || yes {
        return Ok(());
    }
    let question = format!("Drop {} in queue {queue} for good?", output::count(messages.into(), "message"));
    if ask::agrees(&question)? { Ok(()) } else { Err(Failure::failed("nothing was dropped")) }
}

fn delete(connection: &Connection, queue: &str, if_unused: bool, yes: bool) -> Result<()> {
    // To delete what is not there is no error to a broker. A name that is mistyped is one to whoever has typed it.
    let messages = connection.queue_declare_passive(queue)?.message_count;
    may_be_dropped(queue, messages, yes)?;
    let deleted = if if_unused {
        connection.queue_delete_if_unused(queue)?
    } else if messages == 0 && !yes {
        // Nobody was asked about a message that has come meanwhile.
        connection.queue_delete_if_empty(queue).map(|()| 0)?
    } else {
        connection.queue_delete(queue)?
    };
    Ok(output::say(&format!("deleted queue {queue} ({})", output::count(deleted.into(), "message")))?)
}

fn list(queues: &[String], json_lines: bool, source: &Source) -> Result {
    let app = source.app(|_| ())?;
    let configured = || app.topology().queues.iter().map(|queue| queue.name.clone()).collect();
    let names: Vec<String> = if queues.is_empty() { configured() } else { queues.to_vec() };
    if names.is_empty() {
        return Err(Failure::usage(
            "over AMQP a broker cannot be asked which queues it has; name some, or have [[topology.queues]] in the settings",
        ));
    }
    let connection = source.pool(&app, app.publish_pool())?.connection_or_cause()?;
    let mut exit = Exit::Done;
    if !json_lines {
        output::say(&format!("{:>9} {:>9}  queue", "messages", "consumers"))?;
    }
    for name in &names {
        let info = match connection.queue_declare_passive(named("queue", name)?) {
            Ok(info) => info,
            Err(error) if matches!(error.code(), Some(403..=405)) => {
                complain(explain(&error));
                exit = Exit::Failed;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let (messages, consumers) = (info.message_count, info.consumer_count);
        if json_lines {
            let line = json!({ "queue": name, "messages": messages, "consumers": consumers });
            output::line(&output::json(&line)?)?;
        } else {
            output::say(&format!("{messages:>9} {consumers:>9}  {name}"))?;
        }
    }
    Ok(exit)
}
