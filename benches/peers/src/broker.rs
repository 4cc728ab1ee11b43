//! The broker everything is measured against, and its queues: fresh for each run, filled before it and counted after it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::testing::RabbitMq;
use coney::{App, Queue, Settings};

use crate::calls::Callee;
use crate::cases::PATIENCE;
use crate::measure::Result;

enum Running {
    RabbitMq(RabbitMq),
    Program(Program),
    Embedded(EmbeddedBroker),
    Elsewhere(String),
}

/// Which broker everything is measured against.
#[derive(Debug, Clone, Copy)]
pub enum Which<'a> {
    /// A node of its own.
    RabbitMq,
    /// `coney broker` in a process of its own.
    Program,
    /// In this process.
    Embedded,
    At(&'a str),
}

/// `coney broker`, as it was built beside this program.
struct Program {
    child: Child,
    url: String,
}

impl Program {
    fn start() -> Result<Program> {
        let program = std::env::current_exe()?.with_file_name("coney");
        let mut child = Command::new(&program)
            .args(["broker", "--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}; scripts/bench builds it", program.display()))?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line)?;
        let address = line.trim().strip_prefix("coney: broker ready on ").ok_or("coney broker did not begin")?;
        Ok(Program { url: format!("amqp://guest:guest@{address}/%2f"), child })
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It keeps nothing, so there is nothing to end in order.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub struct Broker {
    app: App,
    runs: usize,
    // Before the broker: fields are dropped in order.
    callee: Option<Callee>,
    running: Running,
}

impl Broker {
    pub fn start(which: Which<'_>) -> Result<Broker> {
        let running = match which {
            Which::At(url) => Running::Elsewhere(url.to_owned()),
            Which::Program => Running::Program(Program::start()?),
            Which::Embedded => Running::Embedded(EmbeddedBroker::start()?),
            Which::RabbitMq => Running::RabbitMq(RabbitMq::start()?),
        };
        let app = App::from_settings(Settings::from_url(&running.url())?)?;
        // Whether it is there is better known before the first round.
        drop(app.publish_pool().connection()?);
        Ok(Broker { app, runs: 0, callee: None, running })
    }

    pub fn name(&self) -> &'static str {
        match self.running {
            Running::RabbitMq(_) => "rabbitmq",
            Running::Program(_) => "coney broker",
            Running::Embedded(_) => "embedded",
            Running::Elsewhere(_) => "url",
        }
    }

    pub fn url(&self) -> String {
        self.running.url()
    }

    /// A durable queue that nobody has used, with so many persistent messages in it.
    pub fn fresh_queue(&mut self, messages: usize, size: usize) -> Result<String> {
        self.runs += 1;
        let queue = format!("coney-peers.{}.{}", std::process::id(), self.runs);
        let connection = self.app.publish_pool().connection()?;
        connection.queue_declare(&Queue::new(&*queue))?;
        let body = vec![b'x'; size];
        connection.publish_batch((0..messages).map(|_| ("", &queue, body.as_slice())))?;
        Ok(queue)
    }

    /// Fails unless so many messages are in the queue; deletes it.
    pub fn finish_queue(&self, queue: &str, messages: usize) -> Result<()> {
        let connection = self.app.publish_pool().connection()?;
        let deadline = Instant::now() + PATIENCE;
        // What had been sent ahead to a consumer comes back a moment after it has gone.
        let found = loop {
            let found = connection.queue_declare_passive(queue)?.message_count as usize;
            if found == messages || Instant::now() > deadline {
                break found;
            }
            thread::sleep(Duration::from_millis(10));
        };
        connection.queue_delete(queue)?;
        if found == messages { Ok(()) } else { Err(format!("{found} messages in the queue, not {messages}").into()) }
    }

    /// The queue whose messages are answered: one for all clients, by a process that begins when first needed.
    pub fn called_queue(&mut self) -> Result<String> {
        let callee = match &mut self.callee {
            Some(callee) => callee,
            none => none.insert(Callee::start(&self.running.url())?),
        };
        Ok(callee.queue.clone())
    }
}

impl Running {
    fn url(&self) -> String {
        match self {
            Running::RabbitMq(node) => node.url(),
            Running::Program(program) => program.url.clone(),
            Running::Embedded(broker) => broker.url(),
            Running::Elsewhere(url) => url.clone(),
        }
    }
}
