//! `coney publish`: one message from the arguments, or one for each line of stdin, all confirmed.

use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{fs, io, thread};

use coney::{FieldTable, FieldValue, Message, Pool, PooledConnection};
use crossbeam_channel::{Receiver, Sender, at, bounded, never, select, unbounded};

use crate::exit::{CODES, Exit, Failure, Result, complain, explain};
use crate::failures::Failures;
use crate::interrupt;
use crate::lines::{FORMAT, Line};
use crate::output;
use crate::progress::Progress;
use crate::source::{SETTINGS, Source};
use crate::unconfirmed::{Addressed, Left, Unconfirmed};
use crate::values;

/// How many lines are read ahead.
const READ_AHEAD: usize = 1024;

/// Publishes messages and waits until the broker has confirmed them.
///
/// Without BODY and --file each line of stdin is a message. Lines are sent without waiting for each other; every line that
/// is not confirmed is told on stderr with its number and the reason, once for all lines with the same reason, and the exit
/// code is then 1. After a lost connection the lines that follow go by another one; those whose fate is unknown are told, and
/// not sent again. Where the broker closes the channel for a line, it has dropped the lines behind it: those are sent again,
/// one after another.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Examples:
  coney publish room user1 hello
  coney publish '' orders --file order.json --content-type application/json --header source=web --header n:=3
  seq 1000 | coney publish '' numbers --transient
  coney publish '' orders --crlf < from-windows.txt
  coney publish --json-lines < orders.jsonl             # as `coney get --json-lines` has printed them
  coney publish '' orders --json-lines < orders.jsonl   # to this queue, wherever they came from

{FORMAT}

{SETTINGS}

{CODES}"))]
pub struct Arguments {
    /// The exchange; '' is the default exchange, which leads to the queue that KEY names.
    #[arg(required_unless_present = "json_lines")]
    exchange: Option<String>,
    /// The routing key.
    #[arg(value_name = "KEY", required_unless_present = "json_lines")]
    routing_key: Option<String>,
    /// The body. Without it, and without --file, each line of stdin is one.
    body: Option<String>,
    /// Takes the body from a file; - is the whole of stdin.
    #[arg(long, value_name = "FILE", conflicts_with = "body")]
    file: Option<PathBuf>,
    /// Lines end in CR LF. Without it the CR is part of the message.
    #[arg(long, conflicts_with_all = ["body", "file"])]
    crlf: bool,
    /// Each line of stdin is a message in JSON. EXCHANGE and KEY, and the options below, count for more than it says.
    #[arg(long, conflicts_with_all = ["body", "file"])]
    json_lines: bool,
    #[command(flatten)]
    properties: Properties,
    /// A message that matches no queue is a failure. This is the default, unless the settings say otherwise.
    #[arg(long, overrides_with = "no_mandatory")]
    mandatory: bool,
    /// A message that matches no queue is dropped, and counts as done.
    #[arg(long)]
    no_mandatory: bool,
    #[command(flatten)]
    pub source: Source,
}

#[derive(Debug, clap::Args)]
struct Properties {
    /// The MIME type of the body.
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,
    /// The encoding of the body, such as gzip; the body is sent as it is.
    #[arg(long, value_name = "ENCODING")]
    content_encoding: Option<String>,
    /// A header, as text, or with := as JSON; may be given several times.
    #[arg(long, value_name = "NAME=TEXT|NAME:=JSON", value_parser = values::named)]
    header: Vec<(String, FieldValue)>,
    /// A restart of the broker loses the message.
    #[arg(long, conflicts_with = "persistent")]
    transient: bool,
    /// A durable queue keeps the message over a restart of the broker. This is the default.
    #[arg(long)]
    persistent: bool,
    /// 0 to 255, for queues with x-max-priority.
    #[arg(long, value_name = "NUMBER")]
    priority: Option<u8>,
    /// How long the message may wait in a queue: 250ms, 10s, 1h.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    expiration: Option<Duration>,
    /// The name of the message.
    #[arg(long, value_name = "ID")]
    message_id: Option<String>,
    /// Which request this answers, or how an answer is to name this request.
    #[arg(long, value_name = "ID")]
    correlation_id: Option<String>,
    /// The queue an answer is wanted in.
    #[arg(long, value_name = "QUEUE")]
    reply_to: Option<String>,
    /// The application's name for the kind of message.
    #[arg(long = "type", value_name = "NAME")]
    kind: Option<String>,
    /// The application that sends it.
    #[arg(long, value_name = "NAME")]
    app_id: Option<String>,
}

impl Properties {
    fn set_on(&self, mut message: Message) -> Message {
        macro_rules! set {
            ($($field:ident => $with:ident),*) => {$(
                if let Some(value) = &self.$field {
                    message = message.$with(value.clone());
                }
            )*};
        }
        set!(content_type => with_content_type, content_encoding => with_content_encoding, priority => with_priority,
            expiration => with_expiration, message_id => with_message_id, correlation_id => with_correlation_id,
            reply_to => with_reply_to, kind => with_kind, app_id => with_app_id);
        if !self.header.is_empty() {
            let mut headers: FieldTable = message.headers().clone();
            headers.extend(self.header.iter().cloned());
            message = message.with_headers(headers);
        }
        if self.transient { message.transient() } else { message }
    }
}

impl Arguments {
    fn address(
        &self,
        exchange: Option<String>,
        routing_key: Option<String>,
    ) -> std::result::Result<(String, String), String> {
        let chosen = |own: &Option<String>, said: Option<String>, what: &str| {
            own.clone().or(said).ok_or_else(|| format!("expected {what}, here or as an argument"))
        };
        Ok((chosen(&self.exchange, exchange, "an exchange")?, chosen(&self.routing_key, routing_key, "a routing_key")?))
    }

    fn without_cr<'l>(&self, line: &'l [u8]) -> &'l [u8] {
        if self.crlf { line.strip_suffix(b"\r").unwrap_or(line) } else { line }
    }

    /// The message of one line of stdin.
    fn read(&self, line: &[u8]) -> std::result::Result<Addressed, String> {
        let (exchange, routing_key, message) = if self.json_lines {
            let mut line = Line::parse(line)?;
            (line.exchange.take(), line.routing_key.take(), line.message()?)
        } else {
            (None, None, Message::new(self.without_cr(line)))
        };
        let (exchange, routing_key) = self.address(exchange, routing_key)?;
        Ok((exchange, routing_key, self.properties.set_on(message)))
    }

    fn single_body(&self) -> Result<Option<Vec<u8>>> {
        let Some(path) = &self.file else { return Ok(self.body.clone().map(String::into_bytes)) };
        let read = if path.as_os_str() == "-" {
            let mut body = Vec::new();
            io::Read::read_to_end(&mut io::stdin(), &mut body).map(|_| body)
        } else {
            fs::read(path)
        };
        read.map(Some).map_err(|error| Failure::failed(format!("{}: {error}", path.display())))
    }
}

pub fn run(arguments: &Arguments) -> Result {
    let app = arguments.source.app(|pool| {
        pool.mandatory = (pool.mandatory || arguments.mandatory) && !arguments.no_mandatory;
    })?;
    let pool = arguments.source.pool(&app, app.publish_pool())?;
    match arguments.single_body()? {
        Some(body) => {
            let (exchange, routing_key) = arguments.address(None, None).map_err(Failure::usage)?;
            let message = arguments.properties.set_on(Message::new(body));
            pool.connection_or_cause()?.publish(&exchange, &routing_key, message)?;
            Ok(Exit::Done)
        }
        None => Lines::new(arguments, pool).publish(),
    }
}

/// Publishing of many lines.
struct Lines<'a> {
    arguments: &'a Arguments,
    pool: &'a Pool,
    confirmed: Arc<AtomicU64>,
    tells: Sender<Unconfirmed>,
    told: Receiver<Unconfirmed>,
    failures: Failures,
    progress: Progress,
}

impl<'a> Lines<'a> {
    fn new(arguments: &'a Arguments, pool: &'a Pool) -> Lines<'a> {
        let (tells, told) = unbounded();
        let failures = Failures::new(io::stdin().is_terminal());
        Lines { arguments, pool, confirmed: Arc::default(), tells, told, failures, progress: Progress::new(None) }
    }

    fn publish(mut self) -> Result {
        let interrupted = interrupt::watch()?;
        let mut connection = Some(self.pool.connection_or_cause()?);
        let (lines, told) = (read_lines(), self.told.clone());
        let mut number = 0;
        let stopped: Option<Failure> = loop {
            let due = self.failures.due().map_or_else(never, at);
            select! {
                recv(lines) -> line => match line {
                    Ok(Ok(line)) => {
                        number += 1;
                        if let Err(failure) = self.send(&mut connection, number, line) {
                            break Some(failure);
                        }
                    }
                    Ok(Err(error)) => break Some(Failure::failed(format!("cannot read stdin: {error}"))),
                    Err(_) => break None,
                },
                recv(told) -> unconfirmed => if let Ok(unconfirmed) = unconfirmed
                    && let Err(failure) = self.told(&mut connection, unconfirmed)
                {
                    break Some(failure);
                },
                recv(due) -> _ => {}
                recv(interrupted) -> _ => {
                    let line = match number {
                        1 => "interrupted; the one line that had been read was sent".to_owned(),
                        _ => format!("interrupted; the {number} lines that had been read were sent"),
                    };
                    break Some(Failure::failed(line));
                },
            }
            self.failures.tell_due(&self.progress);
        };
        // What is still to be confirmed may have to be sent again.
        let stopped = self.settle(&mut connection).err().or(stopped);
        drop(connection);
        while let Ok(Unconfirmed { number, error, .. }) = self.told.try_recv() {
            self.failures.add(number, explain(&error));
        }
        self.progress.done("confirmed");
        let exit = self.outcome(number);
        stopped.map_or(Ok(exit), Err)
    }

    /// Publishes one line, on another connection if this one has died.
    fn send(&mut self, connection: &mut Option<PooledConnection>, number: u64, line: Vec<u8>) -> Result<()> {
        if self.arguments.json_lines && line.iter().all(u8::is_ascii_whitespace) {
            self.confirmed.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        let (exchange, routing_key, message) = match self.arguments.read(&line) {
            Ok(addressed) => addressed,
            Err(problem) => {
                self.failures.add(number, problem);
                return Ok(());
            }
        };
        let alive = self.alive(connection, number)?;
        let (confirmed, tells, progress) = (Arc::clone(&self.confirmed), self.tells.clone(), self.progress.clone());
        alive.publish_async(&exchange, &routing_key, message, move |outcome| match outcome {
            Ok(()) => {
                confirmed.fetch_add(1, Ordering::Relaxed);
                progress.step();
            }
            // The receiver lives longer than the connection.
            Err(error) => drop(tells.send(Unconfirmed { number, line, error })),
        });
        Ok(())
    }

    /// The connection, or another one if it has died.
    fn alive<'c>(
        &mut self,
        connection: &'c mut Option<PooledConnection>,
        number: u64,
    ) -> Result<&'c mut PooledConnection> {
        let alive = match connection.take().filter(|connection| connection.is_alive()) {
            Some(alive) => alive,
            None => self.pool.connection().map_err(|error| {
                self.failures.add(number, "not sent: no connection".to_owned());
                let Failure { exit, line } = Failure::from(error);
                Failure::new(exit, format!("stopped at line {number}, the rest was not read: {line}"))
            })?,
        };
        Ok(connection.insert(alive))
    }

    /// A line was not confirmed.
    fn told(&mut self, connection: &mut Option<PooledConnection>, unconfirmed: Unconfirmed) -> Result<()> {
        if !unconfirmed.is_of_closed_channel() {
            self.failures.add(unconfirmed.number, explain(&unconfirmed.error));
            return Ok(());
        }
        // All that were under way get the same error.
        let _ = self.tells.send(unconfirmed);
        self.settle(connection)
    }

    /// Waits for the confirms that are due, and sends again what a closed channel has dropped.
    fn settle(&mut self, connection: &mut Option<PooledConnection>) -> Result<()> {
        if let Some(connection) = connection {
            // Each line that has no confirm tells so itself.
            let _ = connection.flush(2 * self.pool.settings().confirm_timeout);
        }
        let (closed, others): (Vec<_>, Vec<_>) = self.told.try_iter().partition(Unconfirmed::is_of_closed_channel);
        for Unconfirmed { number, error, .. } in others {
            self.failures.add(number, explain(&error));
        }
        let mut dropped = Vec::new();
        for left in Left::of(closed, |line| self.arguments.read(line).ok()) {
            match left {
                Left::Told(number, reason) => self.failures.add(number, reason),
                Left::Dropped(number, addressed) => dropped.push((number, addressed)),
            }
        }
        let mut dropped = dropped.into_iter();
        while let Some((number, (exchange, routing_key, message))) = dropped.next() {
            let sent = match self.alive(connection, number) {
                Ok(alive) => alive.publish(&exchange, &routing_key, message),
                Err(failure) => {
                    dropped.for_each(|(number, _)| self.failures.add(number, "not sent: no connection".to_owned()));
                    return Err(failure);
                }
            };
            match sent {
                Ok(()) => {
                    self.confirmed.fetch_add(1, Ordering::Relaxed);
                    self.progress.step();
                }
                Err(error) => self.failures.add(number, explain(&error)),
            }
        }
        Ok(())
    }

    /// Every line is confirmed or has been told of.
    fn outcome(&mut self, lines: u64) -> Exit {
        let confirmed = self.confirmed.load(Ordering::Relaxed);
        if confirmed == lines {
            return Exit::Done;
        }
        let missing = lines - confirmed;
        let were = if missing == 1 { "was" } else { "were" };
        let of = output::count(lines, "line");
        let unknown = missing - self.failures.total();
        let why = match unknown {
            0 => self.failures.take_only().map_or(String::new(), |only| format!("; {only}")),
            unknown => format!("; {unknown} of them had no answer"),
        };
        self.failures.tell(&self.progress);
        complain(format_args!("{missing} of {of} {were} not confirmed{why}"));
        Exit::Failed
    }
}

/// Lines of stdin, without their ends, read on a thread of their own so that a wait for one holds nothing else up.
fn read_lines() -> Receiver<io::Result<Vec<u8>>> {
    let (lines, read) = bounded(READ_AHEAD);
    // It ends with stdin, or with the process.
    thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        loop {
            let mut line = Vec::new();
            let line = match stdin.read_until(b'\n', &mut line) {
                Ok(0) => return,
                Ok(_) => {
                    if line.last() == Some(&b'\n') {
                        line.pop();
                    }
                    Ok(line)
                }
                Err(error) => Err(error),
            };
            let is_last = line.is_err();
            if lines.send(line).is_err() || is_last {
                return;
            }
        }
    });
    read
}
