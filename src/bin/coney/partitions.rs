//! `coney partitions`: where a key goes, and how a partitioned queue gets another number of partitions.

use std::collections::HashSet;
use std::time::Duration;

use clap::Subcommand;
use coney::{App, Connection, HashedBy, Partitioned, QueueInfo, Topology, Unsettled};
use crossbeam_channel::{Receiver, unbounded};
use serde_json::json;

use crate::exit::{CODES, Exit, Failure, Result, complain, error_at, explain};
use crate::lines;
use crate::output;
use crate::progress::Progress;
use crate::source::{SETTINGS, Source};

/// How many messages are taken at a time.
const PREFETCH: u16 = 500;

/// For so long no message comes before the broker is asked whether there are more.
const QUIET: Duration = Duration::from_millis(200);

/// Looks at partitioned queues and changes their number of partitions.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says which partition a key has, and how to publish to it. Asks no broker.
    #[command(after_help = format!("Examples:
  coney partitions of orders customer-7
  coney partitions of orders customer-7 --partitions 32 --json

{SETTINGS}

{CODES}"))]
    Of {
        /// The name of the partitioned queue.
        name: String,
        key: String,
        /// So many partitions. Defaults to the number in the settings.
        #[arg(long, value_name = "N")]
        partitions: Option<u16>,
        /// Prints one JSON object: partition, queue, exchange and routing_key.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        source: Source,
    },
    /// Moves all messages of a partitioned queue to another number of partitions, and deletes the old ones.
    ///
    /// In this order: stop the publishers; stop the listeners; set the new number in the settings; run this; start the listeners
    /// and the publishers. The listeners may be started before it has ended, the publishers may not, or their messages would
    /// overtake older ones of the same key.
    ///
    /// First the old partitions are taken out of the exchange, so that a publisher that still has the old number gets an error.
    /// Then the messages of each are published to their new partition, in order, and taken off the old one once that is confirmed.
    /// An old partition is deleted when it is empty. If this ends in between, run it again: it goes on where it was. A message may
    /// then be there twice; none is lost, and each key keeps its order.
    #[command(after_help = format!("Examples:
  coney partitions move orders --from 16
  coney partitions move orders --from 16 --to 32 --url amqp://localhost

{SETTINGS}

{CODES}"))]
    Move {
        /// The name of the partitioned queue.
        name: String,
        /// The number of partitions that the messages are in now.
        #[arg(long, value_name = "N")]
        from: u16,
        /// The number of partitions to move them to. Defaults to the number in the settings.
        #[arg(long, value_name = "N")]
        to: Option<u16>,
        #[command(flatten)]
        source: Source,
    },
}

impl Arguments {
    pub fn source(&mut self) -> &mut Source {
        match &mut self.command {
            Command::Of { source, .. } | Command::Move { source, .. } => source,
        }
    }
}

pub fn run(arguments: &Arguments) -> Result {
    match &arguments.command {
        Command::Of { name, key, partitions, json, source } => {
            let partitioned = chosen(&source.app(|_| ())?, name, *partitions, "--partitions")?;
            of(&partitioned, key, *json)
        }
        Command::Move { name, from, to, source } => {
            let app = source.app_listening_on_pool(|_| ())?;
            let new = chosen(&app, name, *to, "--to")?;
            let mut old = new.clone();
            old.partitions = *from;
            check(&old, "--from")?;
            if old.partitions == new.partitions {
                return Err(Failure::usage(format!(
                    "--from: expected another number than {from}, to which they are moved"
                )));
            }
            let user = app.publish_pool().settings().broker.user.clone();
            let connection = source.pool(&app, app.publish_pool())?.connection_or_cause()?;
            let moving = Move { app: &app, connection: &connection, old, new, user: &user, moved: 0 };
            moving.run()
        }
    }
}

/// The partitioned queue of that name, in the settings or with the number that was given.
fn chosen(app: &App, name: &str, number: Option<u16>, option: &str) -> Result<Partitioned> {
    let configured = app.topology().partitioned.iter().find(|partitioned| partitioned.name == name).cloned();
    let partitioned = match (configured, number) {
        (Some(configured), None) => configured,
        (Some(mut configured), Some(number)) => {
            configured.partitions = number;
            configured
        }
        (None, Some(number)) => Partitioned::new(name, number),
        (None, None) => {
            return Err(Failure::usage(format!(
                "no partitioned queue {name:?} is in the settings; name its number of partitions with {option}, or add \
                 [[topology.partitioned]]"
            )));
        }
    };
    check(&partitioned, option)?;
    Ok(partitioned)
}

fn check(partitioned: &Partitioned, option: &str) -> Result<()> {
    let checked = Topology::new().partitioned(partitioned.clone()).check();
    checked.map_err(|error| {
        let problems: Vec<&str> = error.problems.iter().map(|problem| problem.problem.as_str()).collect();
        Failure::usage(format!(
            "{:?} with {option} {}: {}",
            partitioned.name,
            partitioned.partitions,
            problems.join("; ")
        ))
    })
}

fn of(partitioned: &Partitioned, key: &str, json: bool) -> Result {
    if partitioned.hashed_by != HashedBy::Publisher {
        return Err(Failure::failed(format!(
            "{:?} is hashed by the broker, which does not tell where a key goes",
            partitioned.name
        )));
    }
    let partition = partitioned.partition_of(key);
    let (queue, exchange) = (partitioned.queue_name(partition), partitioned.exchange());
    let routing_key = partitioned.routing_key(key);
    if json {
        let line = json!({ "partition": partition, "queue": queue, "exchange": exchange, "routing_key": routing_key });
        output::line(&output::json(&line)?)?;
    } else {
        output::line(&output::in_one_line(&format!("queue {queue}, exchange {exchange}, routing key {routing_key}")))?;
    }
    Ok(Exit::Done)
}

/// Messages on their way to another number of partitions.
struct Move<'c> {
    app: &'c App,
    connection: &'c Connection,
    old: Partitioned,
    new: Partitioned,
    /// The user of the connection. A message may claim to come from this one alone.
    user: &'c str,
    moved: u64,
}

impl Move<'_> {
    fn run(mut self) -> Result {
        let there = self.old_queues()?;
        if there.is_empty() {
            let (name, number) = (&self.old.name, self.old.partitions);
            return Err(Failure::failed(format!(
                "{name:?} has no queue of {number} partitions: there is nothing to move"
            )));
        }
        self.connection.declare(&Topology::new().partitioned(self.new.clone()))?;
        // A publisher that knows of the old number alone is told from now on, and adds nothing to what is moved.
        for binding in &self.old.topology().bindings {
            unless_missing(self.connection.unbind(binding))?;
        }
        let progress = Progress::new(Some(there.iter().map(|queue| u64::from(queue.message_count)).sum()));
        for QueueInfo { name, .. } in &there {
            self.empty(name, &progress)?;
            self.delete_if_idle(name)?;
            self.delete_if_idle(&format!("{name}.dead"))?;
        }
        self.delete_if_idle(&self.old.members_queue())?;
        if self.old.exchange() != self.new.exchange() {
            unless_missing(self.connection.exchange_delete(&self.old.exchange(), true))?;
        }
        progress.done("moved");
        let (moved, from, to) = (output::count(self.moved, "message"), self.old.partitions, self.new.partitions);
        output::say(&format!("moved {moved} of {} from {from} to {to} partitions", self.old.name))?;
        Ok(Exit::Done)
    }

    /// The old partitions that are there. None of them may have a consumer: it would handle what is behind what has been moved.
    fn old_queues(&self) -> Result<Vec<QueueInfo>> {
        let mut there = Vec::new();
        for name in self.old.queue_names() {
            let Some(queue) = unless_missing(self.connection.queue_declare_passive(&name))? else { continue };
            if queue.consumer_count > 0 {
                return Err(Failure::failed(format!(
                    "queue {name:?} has a consumer; nothing was moved: end the listeners first"
                )));
            }
            there.push(queue);
        }
        Ok(there)
    }

    /// Moves all messages of a queue. The broker has no other way to get at those of a queue with a single active consumer.
    fn empty(&mut self, queue: &str, progress: &Progress) -> Result<()> {
        while self.connection.queue_declare_passive(queue)?.message_count > 0 {
            let (arrived, arrivals) = unbounded();
            let listener = self.app.listener(queue).concurrency(1).prefetch(PREFETCH).without_retry().spawn_manual(
                move |_, unsettled| {
                    // Received from until the listener has ended.
                    let _ = arrived.send(unsettled);
                },
            )?;
            let mut back = Vec::new();
            let sent = self.send_all(queue, &arrivals, &mut back, progress);
            // What is not settled goes back when its channel is closed: all of it, in order, and not before.
            let stopped = listener.stop();
            sent?;
            stopped?;
        }
        Ok(())
    }

    /// Sends on what comes, until no more is in the queue. What is not confirmed is put into `back`.
    fn send_all(
        &mut self,
        queue: &str,
        arrivals: &Receiver<Unsettled>,
        back: &mut Vec<Unsettled>,
        progress: &Progress,
    ) -> Result<()> {
        loop {
            match arrivals.recv_timeout(QUIET) {
                Ok(first) => self.send([first].into_iter().chain(arrivals.try_iter()).collect(), back, progress)?,
                Err(_) if self.connection.queue_declare_passive(queue)?.message_count == 0 => return Ok(()),
                Err(_) => {}
            }
        }
    }

    /// Publishes messages to their new partitions and acks them. A message goes out when those of its key before it are confirmed.
    fn send(&mut self, mut messages: Vec<Unsettled>, back: &mut Vec<Unsettled>, progress: &Progress) -> Result<()> {
        let exchange = self.new.exchange();
        while !messages.is_empty() {
            let mut keys = HashSet::new();
            let (wave, rest): (Vec<_>, Vec<_>) = messages
                .into_iter()
                .partition(|unsettled| keys.insert(self.old.key_of(unsettled.routing_key()).to_owned()));
            let outgoing = wave.iter().map(|unsettled| {
                let routing_key = self.new.routing_key(self.old.key_of(unsettled.routing_key()));
                (exchange.as_str(), routing_key, lines::as_published_by(self.user, unsettled.message()))
            });
            let sent = self.connection.publish_batch(outgoing);
            let mut failure = None;
            for (position, unsettled) in wave.into_iter().enumerate() {
                match error_at(&sent, position) {
                    None => {
                        unsettled.ack()?;
                        self.moved += 1;
                        progress.step();
                    }
                    Some(error) => {
                        failure.get_or_insert_with(|| explain(error));
                        back.push(unsettled);
                    }
                }
            }
            if let Some(why) = failure {
                back.extend(rest);
                let moved = output::count(self.moved, "message");
                return Err(Failure::failed(format!("{moved} moved, and then: {why}; run it again to go on")));
            }
            messages = rest;
        }
        Ok(())
    }

    /// Deletes a queue that has no messages and no consumers. A quorum queue takes no such condition from a client.
    fn delete_if_idle(&self, name: &str) -> Result<()> {
        let Some(queue) = unless_missing(self.connection.queue_declare_passive(name))? else { return Ok(()) };
        let (messages, consumers) = (queue.message_count, queue.consumer_count);
        if messages > 0 || consumers > 0 {
            let (messages, consumers) =
                (output::count(messages.into(), "message"), output::count(consumers.into(), "consumer"));
            complain(format_args!("queue {name:?} is kept: it has {messages} and {consumers}"));
            return Ok(());
        }
        self.connection.queue_delete(name)?;
        Ok(())
    }
}

/// What is not there is no failure.
fn unless_missing<T>(result: coney::Result<T>) -> Result<Option<T>> {
    match result {
        Ok(done) => Ok(Some(done)),
        Err(error) if error.code() == Some(404) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
