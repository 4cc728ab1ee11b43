//! `coney listen`: what comes to a queue, as it comes, until Ctrl-C.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use coney::{App, Delivery, Listener, ListenerState, Outcome, Pool, Queue};
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, select, unbounded};

use crate::exit::{CODES, Exit, Failure, Result};
use crate::interrupt;
use crate::output::Format;
use crate::progress::Progress;
use crate::sink::{GIVEN_BACK, Sink};
use crate::source::{SETTINGS, Source, warn_if_alone};

/// How long a queue of our own outlives us, should we end without a chance to delete it.
const EXPIRES: Duration = Duration::from_secs(60);
/// How often the listener is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Prints messages as they come, until Ctrl-C.
///
/// A message is acked once it has been written to stdout; where that is a pipe, once it has been read out of the pipe. When the
/// reader of the pipe goes, this ends. A lost connection is opened again, and the listening goes on; a message whose ack was
/// lost with it comes again. What was sent ahead and not printed goes back to its queue.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Examples:
  coney listen orders
  coney listen --exchange events --key 'order.#'    # a queue of its own, gone afterwards
  coney listen orders --count 10 --json-lines
  coney listen orders --json-lines | jq --unbuffered .body

{SETTINGS}

{CODES}"))]
pub struct Arguments {
    /// The queue. May be left out with --exchange: a queue of its own is then made, and deleted in the end.
    #[arg(required_unless_present = "exchange")]
    queue: Option<String>,
    /// Binds the queue to this exchange first. A binding of QUEUE stays.
    #[arg(long, value_name = "NAME")]
    exchange: Option<String>,
    /// The routing key to bind with, or the pattern for a topic exchange.
    #[arg(long, value_name = "KEY", default_value = "", requires = "exchange")]
    key: String,
    /// Ends after so many messages.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// How many messages the broker sends ahead, 1 to 65535. Defaults to what the settings say, and not more than --count.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..))]
    prefetch: Option<u16>,
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    pub source: Source,
}

/// Why printing has ended.
enum End {
    Enough,
    OutputFailed(io::Error),
}

pub fn run(arguments: &Arguments) -> Result {
    let sink = Arc::new(Sink::open(arguments.format)?);
    // A policy would have its queues declared, and nothing fails here that could be tried again.
    let app = arguments.source.app_listening_on_pool(|pool| pool.retry = None)?;
    let interrupted = interrupt::watch()?;
    let pool = app.listen_pool();
    warn_if_alone(pool);
    let queue = match (&arguments.queue, &arguments.exchange) {
        (Some(queue), _) => queue.clone(),
        (None, Some(_)) => format!("coney.listen.{:016x}", fastrand::u64(..)),
        (None, None) => String::new(),
    };
    bind(arguments, pool, &queue)?;
    let result = listen(arguments, &sink, &app, &queue, &interrupted);
    if arguments.queue.is_none() {
        // It expires by itself, should this not get through.
        let _ = pool.connection_or_cause().and_then(|connection| connection.queue_delete(&queue));
    }
    result
}

/// Makes the queue, if it is ours, and its binding.
fn bind(arguments: &Arguments, pool: &Pool, queue: &str) -> Result<()> {
    let Some(exchange) = &arguments.exchange else { return Ok(()) };
    let connection = pool.connection_or_cause()?;
    if arguments.queue.is_none() {
        // Not exclusive, which would be to one connection: it is to outlive a lost one.
        connection.queue_declare(&Queue::new(queue).expires(EXPIRES))?;
    }
    Ok(connection.queue_bind(queue, exchange, &arguments.key)?)
}

fn listen(arguments: &Arguments, sink: &Arc<Sink>, app: &App, queue: &str, interrupted: &Receiver<()>) -> Result {
    let prefetch = arguments.prefetch.unwrap_or(app.listen_pool().settings().prefetch);
    let enough = arguments.count.unwrap_or(u64::MAX);
    let (ends, ended) = unbounded();
    let (gate, closed) = bounded(0);
    let printer = Printer {
        sink: Arc::clone(sink),
        left: AtomicU64::new(enough),
        progress: Progress::of_printing(arguments.count),
        ends,
        closed,
    };
    let listener = app
        .listener(queue)
        .prefetch(u16::try_from(enough).map_or(prefetch, |enough| prefetch.min(enough)))
        .spawn(move |_context, delivery| printer.print(delivery))?;
    let end = loop {
        select! {
            recv(interrupted) -> _ => break None,
            recv(ended) -> end => break end.ok(),
            default(LOOK) => {}
        }
        // No message may come that would find out.
        if sink.reader_has_gone() {
            break Some(End::OutputFailed(io::ErrorKind::BrokenPipe.into()));
        }
        // A queue of ours may have gone, during an outage that was longer than it lasts or with what the broker knew.
        if let ListenerState::Recovering { error, .. } = listener.state()
            && arguments.queue.is_none()
            && error.code() == Some(404)
        {
            bind(arguments, app.listen_pool(), queue)?;
        }
    };
    stop(listener, gate)?;
    match end {
        None | Some(End::Enough) => Ok(Exit::Done),
        Some(End::OutputFailed(error)) => Err(Failure::from(error).and(GIVEN_BACK)),
    }
}

/// Stops the listener. Once it has been told to, whoever waits at the gate is let go.
fn stop(listener: Listener, gate: Sender<()>) -> Result<()> {
    let stopping = thread::spawn(move || listener.stop());
    drop(gate);
    match stopping.join() {
        Ok(stopped) => Ok(stopped?),
        Err(_) => Err(Failure::failed("the listener could not be stopped")),
    }
}

struct Printer {
    sink: Arc<Sink>,
    /// How many messages are still to be printed.
    left: AtomicU64,
    progress: Progress,
    ends: Sender<End>,
    /// Ends when the listener has been told to stop.
    closed: Receiver<()>,
}

impl Printer {
    fn print(&self, delivery: &Delivery<'_>) -> Outcome {
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            // Sent ahead of the end. Given back before the listener stops, it would only come again.
            let _ = self.closed.recv();
            return Outcome::Requeue;
        }
        // An interrupt does not wait for a reader that may never read on.
        let is_closed = || matches!(self.closed.try_recv(), Err(TryRecvError::Disconnected));
        let end = match self.sink.write(delivery).and_then(|()| self.sink.wait_for_reader(is_closed)) {
            Ok(false) => return Outcome::Requeue,
            Ok(true) => {
                self.left.store(left - 1, Ordering::Relaxed);
                self.progress.step();
                (left == 1).then_some(End::Enough)
            }
            Err(error) => {
                self.left.store(0, Ordering::Relaxed);
                Some(End::OutputFailed(error))
            }
        };
        let failed = matches!(end, Some(End::OutputFailed(_)));
        if let Some(end) = end {
            // The receiver lives until the listener has ended.
            let _ = self.ends.send(end);
        }
        if failed {
            let _ = self.closed.recv();
            return Outcome::Requeue;
        }
        Outcome::Ack
    }
}
