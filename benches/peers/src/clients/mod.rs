//! The clients, and how one of them is given its work. What they do is the same, written as each one's users would.

mod amiquip;
mod coney;
mod external;
mod lapin;

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use clap::{Args, ValueEnum};

pub use self::amiquip::nodelay_connection;

use crate::cases::{Case, Job};
use crate::measure::{Measure, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Client {
    Coney,
    Amiquip,
    /// amiquip with TCP_NODELAY on its socket, which it does not set itself.
    #[value(name = "amiquip+nodelay")]
    AmiquipNodelay,
    Lapin,
    #[value(name = "rabbitmq-c")]
    RabbitmqC,
    Pika,
}

impl Client {
    pub const PEERS: [Client; 5] =
        [Client::Amiquip, Client::AmiquipNodelay, Client::Lapin, Client::RabbitmqC, Client::Pika];

    pub fn name(self) -> &'static str {
        match self {
            Client::Coney => "coney",
            Client::Amiquip => "amiquip",
            Client::AmiquipNodelay => "amiquip+nodelay",
            Client::Lapin => "lapin",
            Client::RabbitmqC => "rabbitmq-c",
            Client::Pika => "pika",
        }
    }

    pub fn is_installed(self) -> bool {
        match self {
            Client::RabbitmqC => external::rabbitmq_c().is_some(),
            Client::Pika => external::has_pika(),
            _ => true,
        }
    }

    /// Whether it has what the job is about.
    pub fn does(self, job: Job) -> bool {
        match job {
            Job::Checkout => matches!(self, Client::Coney | Client::Lapin),
            Job::PublishBatch | Job::RpcThreads => self == Client::Coney,
            _ => true,
        }
    }

    /// The program that measures it: this one, for what is written in Rust, but in a process of its own.
    pub fn program(self, work: &Work) -> Result<Command> {
        let mut command = match self {
            Client::RabbitmqC => Command::new(external::rabbitmq_c().ok_or("rabbitmq-c was not there at build time")?),
            Client::Pika => external::pika(),
            _ => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["client", self.name()]);
                command
            }
        };
        command.args([work.job.name(), work.url.clone(), work.queue.clone(), work.size.to_string()]);
        command.args([work.count.to_string(), work.limit_ms.to_string()]);
        Ok(command)
    }

    /// Does it in this process.
    pub fn run(self, work: &Work) -> Result<Measure> {
        match self {
            Client::Coney => coney::run(work),
            Client::Amiquip => amiquip::run(work, false),
            Client::AmiquipNodelay => amiquip::run(work, true),
            Client::Lapin => lapin::run(work),
            Client::RabbitmqC | Client::Pika => Err("it is not written in Rust".into()),
        }
    }
}

/// What a measured process is to do. Those in other languages take the same arguments in the same order.
#[derive(Debug, Clone, Args)]
pub struct Work {
    pub job: Job,
    pub url: String,
    pub queue: String,
    pub size: usize,
    pub count: usize,
    /// Of calls, in milliseconds.
    pub limit_ms: u64,
}

impl Work {
    pub fn new(case: &Case, job: Job, url: &str, queue: &str) -> Work {
        let (url, queue) = (url.to_owned(), queue.to_owned());
        let limit_ms = u64::try_from(case.limit.as_millis()).unwrap_or(u64::MAX);
        Work { job, url, queue, size: case.size, count: case.count, limit_ms }
    }

    fn limit(&self) -> Duration {
        Duration::from_millis(self.limit_ms)
    }

    /// What is published. A request is `{"data":"xxx…"}`, which is what a coney worker reads.
    fn body(&self) -> Vec<u8> {
        if !self.job.calls() {
            return vec![b'x'; self.size];
        }
        format!("{{\"data\":\"{}\"}}", self.text()).into_bytes()
    }

    /// The text in a request.
    fn text(&self) -> String {
        "x".repeat(self.size.saturating_sub("{\"data\":\"\"}".len()))
    }
}

/// Calls in flight by their correlation ids, as the clients without RPC of their own keep them.
#[derive(Debug, Default)]
struct OpenCalls {
    ids: HashSet<String>,
    sent: usize,
}

impl OpenCalls {
    fn next_id(&mut self) -> String {
        self.sent += 1;
        let id = self.sent.to_string();
        self.ids.insert(id.clone());
        id
    }

    /// Takes note of an answer, which has to be one.
    fn answered(&mut self, id: &str, body: &[u8]) -> Result<()> {
        if !self.ids.remove(id) {
            return Err(format!("an answer to {id:?}, which was not asked").into());
        }
        if !body.starts_with(b"{") {
            return Err("an answer that is none".into());
        }
        Ok(())
    }
}

/// What `run` returns on each of so many threads.
fn on_threads(threads: usize, run: impl Fn() -> Result<Vec<Duration>> + Sync) -> Result<Vec<Duration>> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(&run)).collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().map_err(|_| "a thread panicked")??);
        }
        Ok(all)
    })
}

/// Whether a file is there to be run.
fn exists(program: &str) -> bool {
    Path::new(program).is_file()
}
