//! The broker everything is measured against, and its queues: fresh for each run, filled before it and counted after it.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::rpc::RpcWorker;
use coney::testing::RabbitMq;
use coney::{App, Encoding, Queue, Settings};

use crate::cases::{PATIENCE, PREFETCH};
use crate::measure::Result;

enum Running {
    RabbitMq(RabbitMq),
    Embedded(EmbeddedBroker),
    Elsewhere(String),
}

pub struct Broker {
    app: App,
    runs: usize,
    worker: Option<Worker>,
    // Last, so that it ends last.
    running: Running,
}

impl Broker {
    /// The one at `url`, or else one of our own.
    pub fn start(url: Option<&str>, embedded: bool) -> Result<Broker> {
        let running = match url {
            Some(url) => Running::Elsewhere(url.to_owned()),
            None if embedded => Running::Embedded(EmbeddedBroker::start()?),
            None => Running::RabbitMq(RabbitMq::start()?),
        };
        let app = App::from_settings(Settings::from_url(&running.url())?)?;
        Ok(Broker { app, runs: 0, worker: None, running })
    }

    pub fn name(&self) -> &'static str {
        match self.running {
            Running::RabbitMq(_) => "rabbitmq",
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

    /// The queue that an RPC worker listens on: one for all clients, in a process of its own, begun when first needed.
    pub fn called_queue(&mut self) -> Result<String> {
        let worker = match &mut self.worker {
            Some(worker) => worker,
            none => none.insert(Worker::start(&self.running.url())?),
        };
        Ok(worker.queue.clone())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            let queue = worker.queue.clone();
            drop(worker);
            // A broker of our own takes it along.
            let _ = self.app.publish_pool().connection().and_then(|connection| connection.queue_delete(&queue));
        }
    }
}

impl Running {
    fn url(&self) -> String {
        match self {
            Running::RabbitMq(node) => node.url(),
            Running::Embedded(broker) => broker.url(),
            Running::Elsewhere(url) => url.clone(),
        }
    }
}

/// The process that answers calls.
struct Worker {
    queue: String,
    child: Child,
    /// It ends when this does, be that because we were killed.
    input: Option<ChildStdin>,
}

impl Worker {
    fn start(url: &str) -> Result<Worker> {
        let queue = format!("coney-peers.{}.calls", std::process::id());
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["serve", url, &queue]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let worker = Worker { queue, child, input };
        let mut line = String::new();
        BufReader::new(output.ok_or("no output")?).read_line(&mut line)?;
        if line.trim() == "ready" { Ok(worker) } else { Err("the RPC worker has not started".into()) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.input.take());
        // Its exit code was for the cases that needed it.
        let _ = self.child.wait();
    }
}

/// What that process does.
pub fn serve(url: &str, queue: &str) -> Result<()> {
    let text = format!("[broker]\nurl = {url:?}\n[pools.listen]\nsize = 1\nprefetch = {PREFETCH}");
    let app = App::from_settings(Settings::from_toml(&text)?)?;
    let worker =
        RpcWorker::new(&app).encoding(Encoding::Json).route(queue, |text: String| Ok::<_, String>(text)).run()?;
    println!("ready");
    std::io::stdin().read_line(&mut String::new())?;
    worker.stop()?;
    Ok(())
}
