//! The broker everything is measured against, and its queues: fresh for each run, filled before it and counted after it.

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
    Embedded(EmbeddedBroker),
    Elsewhere(String),
}

pub struct Broker {
    app: App,
    runs: usize,
    // Before the broker: fields are dropped in order.
    callee: Option<Callee>,
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
        // Whether it is there is better known before the first round.
        drop(app.publish_pool().connection()?);
        Ok(Broker { app, runs: 0, callee: None, running })
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
            Running::Embedded(broker) => broker.url(),
            Running::Elsewhere(url) => url.clone(),
        }
    }
}
