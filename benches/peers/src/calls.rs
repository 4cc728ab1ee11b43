//! Who answers the calls: one process for all clients, so that none of its CPU time is theirs.
//!
//! A plain echo on bare amiquip, not a coney worker: that has each answer confirmed, and would be much of what is measured.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;

use amiquip::{
    AmqpProperties, Connection, ConsumerMessage, ConsumerOptions, Publish, QueueDeclareOptions, QueueDeleteOptions,
};

use crate::cases::PREFETCH;
use crate::clients::nodelay_connection;
use crate::measure::Result;

/// What a request begins with.
const REQUEST: &[u8] = b"{\"data\":";

/// The process, as the benchmark sees it.
pub struct Callee {
    pub queue: String,
    child: Child,
    /// The process ends when this does, be that because we were killed.
    input: Option<ChildStdin>,
}

impl Callee {
    /// It takes calls when this returns.
    pub fn start(url: &str) -> Result<Callee> {
        let queue = format!("coney-peers.{}.calls", std::process::id());
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["serve", url, &queue]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let callee = Callee { queue, child, input };
        let mut line = String::new();
        BufReader::new(output.ok_or("no output")?).read_line(&mut line)?;
        if line.trim() == "ready" { Ok(callee) } else { Err("nobody answers calls".into()) }
    }
}

impl Drop for Callee {
    fn drop(&mut self) {
        drop(self.input.take());
        // How it ends has been of no interest since the last answer.
        let _ = self.child.wait();
    }
}

/// What the process does.
pub fn serve(url: &str, queue: &str) -> Result<()> {
    let mut connection = nodelay_connection(url)?;
    thread::scope(|scope| {
        let server =
            scope.spawn(|| answer_all(&mut connection, queue).inspect_err(|error| eprintln!("calls: {error}")));
        std::io::stdin().read_to_end(&mut Vec::new())?;
        // Its queue goes with this connection, and so it ends.
        let mut ending = nodelay_connection(url)?;
        ending.open_channel(None)?.queue_delete(queue, QueueDeleteOptions::default())?;
        server.join().map_err(|_| "the server panicked")?
    })
}

fn answer_all(connection: &mut Connection, queue: &str) -> Result<()> {
    let channel = connection.open_channel(None)?;
    channel.queue_declare(queue, QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() })?;
    channel.qos(0, PREFETCH, false)?;
    let consumer = channel.basic_consume(queue, ConsumerOptions::default())?;
    println!("ready");
    for message in consumer.receiver() {
        let ConsumerMessage::Delivery(delivery) = message else { break };
        let (Some(to), Some(id)) = (delivery.properties.reply_to(), delivery.properties.correlation_id()) else {
            return Err("a request that wants no answer".into());
        };
        // As a coney worker answers.
        let data = delivery.body.strip_prefix(REQUEST).ok_or("not a request")?;
        let body = [b"{\"success\":true,\"data\":", data].concat();
        let properties = AmqpProperties::default().with_correlation_id(id.clone());
        channel.basic_publish("", Publish::with_properties(&body, to.as_str(), properties))?;
        delivery.ack(&channel)?;
    }
    Ok(())
}
