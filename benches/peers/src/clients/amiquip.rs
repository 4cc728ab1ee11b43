//! Bare amiquip, as it comes and with TCP_NODELAY.
//!
//! amiquip leaves Nagle's algorithm on. A message that is not followed by another then waits for the broker's delayed
//! TCP acknowledgement, some 40 ms, before its last part leaves: whoever waits for each answer has 25 of them a second.

use std::net::TcpStream;

use ::amiquip::{
    AmqpProperties, Auth, Channel, Confirm, ConfirmSmoother, Connection, ConnectionOptions, ConnectionTuning,
    ConsumerMessage, ConsumerOptions, Publish,
};
use coney::AmqpUrl;
use coney::settings::BrokerSettings;
use crossbeam_channel::{Receiver, bounded};

use super::{OpenCalls, Work, on_threads};
use crate::cases::{IN_FLIGHT, Job, PATIENCE, POOL, PREFETCH, SHARERS, WINDOW, WINDOW_LOW};
use crate::measure::{Measure, Meter, Pace, Result};

const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";
const PERSISTENT: u8 = 2;
const TRANSIENT: u8 = 1;

pub fn run(work: &Work, nodelay: bool) -> Result<Measure> {
    match work.job {
        Job::PublishAsync => publish_pipelined(work, nodelay),
        Job::PublishSync => publish_sync(work, nodelay),
        Job::PublishPool => publish_pool(work, nodelay),
        Job::Consume => consume(work, nodelay),
        Job::Get => get(work, nodelay),
        Job::RpcSequential => rpc(work, nodelay, 1),
        Job::RpcAsync => rpc(work, nodelay, IN_FLIGHT),
        Job::PublishBatch | Job::RpcThreads | Job::Checkout => Err("amiquip has no such thing".into()),
    }
}

fn connect(url: &str, nodelay: bool) -> Result<Connection> {
    if nodelay { nodelay_connection(url) } else { Ok(Connection::insecure_open(url)?) }
}

/// amiquip takes any stream, so also one that is set up as it should be.
pub fn nodelay_connection(url: &str) -> Result<Connection> {
    let broker = BrokerSettings::from(AmqpUrl::parse(url)?);
    let endpoint = broker.endpoints.first().ok_or("no host")?;
    let socket = TcpStream::connect((endpoint.host.as_str(), endpoint.port))?;
    socket.set_nodelay(true)?;
    let auth = Auth::Plain { username: broker.user.clone(), password: broker.password.expose().to_owned() };
    let options = ConnectionOptions::default().auth(auth).virtual_host(broker.vhost.as_str());
    let stream = mio::net::TcpStream::from_stream(socket)?;
    Ok(Connection::insecure_open_stream(stream, options, ConnectionTuning::default())?)
}

/// A channel in confirm mode.
struct Publisher {
    channel: Channel,
    confirms: Receiver<Confirm>,
    smoother: ConfirmSmoother,
    open: usize,
    // After its channel: fields are dropped in order.
    _connection: Connection,
}

impl Publisher {
    fn new(work: &Work, nodelay: bool) -> Result<Publisher> {
        let mut connection = connect(&work.url, nodelay)?;
        let channel = connection.open_channel(None)?;
        channel.enable_publisher_confirms()?;
        let confirms = channel.listen_for_publisher_confirms()?;
        Ok(Publisher { channel, confirms, smoother: ConfirmSmoother::new(), open: 0, _connection: connection })
    }

    fn publish(&mut self, work: &Work, body: &[u8]) -> Result<()> {
        let properties = AmqpProperties::default().with_delivery_mode(PERSISTENT);
        let publish = Publish { mandatory: true, ..Publish::with_properties(body, work.queue.as_str(), properties) };
        self.channel.basic_publish("", publish)?;
        self.open += 1;
        Ok(())
    }

    /// Waits until at most so many messages are unconfirmed.
    fn wait(&mut self, open: usize) -> Result<()> {
        while self.open > open {
            let confirm = self.confirms.recv_timeout(PATIENCE)?;
            for confirm in self.smoother.process(confirm) {
                match confirm {
                    Confirm::Ack(_) => self.open -= 1,
                    Confirm::Nack(_) => return Err("a nack".into()),
                }
            }
        }
        Ok(())
    }
}

fn publish_pipelined(work: &Work, nodelay: bool) -> Result<Measure> {
    let (mut publisher, body) = (Publisher::new(work, nodelay)?, work.body());
    let meter = Meter::start();
    for _ in 0..work.count {
        if publisher.open == WINDOW {
            publisher.wait(WINDOW_LOW)?;
        }
        publisher.publish(work, &body)?;
    }
    publisher.wait(0)?;
    meter.stop(work.count, Vec::new())
}

fn publish_sync(work: &Work, nodelay: bool) -> Result<Measure> {
    let (mut publisher, body) = (Publisher::new(work, nodelay)?, work.body());
    let meter = Meter::start();
    let mut pace = Pace::new(work.count, work.limit());
    while let Some(begin) = pace.next() {
        publisher.publish(work, &body)?;
        publisher.wait(0)?;
        pace.took(begin);
    }
    meter.stop(pace.latencies.len(), pace.latencies)
}

fn publish_pool(work: &Work, nodelay: bool) -> Result<Measure> {
    let (give, take) = bounded(POOL);
    for _ in 0..POOL {
        give.send(Publisher::new(work, nodelay)?).map_err(|_| "the pool has gone")?;
    }
    let body = work.body();
    let meter = Meter::start();
    let latencies = on_threads(SHARERS, || {
        let mut pace = Pace::new(work.count / SHARERS, work.limit());
        while let Some(begin) = pace.next() {
            let mut publisher = take.recv_timeout(PATIENCE)?;
            publisher.publish(work, &body)?;
            publisher.wait(0)?;
            give.send(publisher).map_err(|_| "the pool has gone")?;
            pace.took(begin);
        }
        Ok(pace.latencies)
    })?;
    meter.stop(latencies.len(), latencies)
}

fn consume(work: &Work, nodelay: bool) -> Result<Measure> {
    let mut connection = connect(&work.url, nodelay)?;
    let channel = connection.open_channel(None)?;
    channel.qos(0, PREFETCH, false)?;
    let meter = Meter::start();
    let consumer = channel.basic_consume(work.queue.as_str(), ConsumerOptions::default())?;
    for _ in 0..work.count {
        match consumer.receiver().recv_timeout(PATIENCE)? {
            ConsumerMessage::Delivery(delivery) if delivery.body.len() == work.size => delivery.ack(&channel)?,
            other => return Err(format!("not what was published: {other:?}").into()),
        }
    }
    // amiquip ends the connection if the receiver is gone when it passes on that the consumer is.
    let receiver = consumer.receiver().clone();
    drop(consumer);
    channel.close()?;
    drop(receiver);
    meter.stop(work.count, Vec::new())
}

fn get(work: &Work, nodelay: bool) -> Result<Measure> {
    let mut connection = connect(&work.url, nodelay)?;
    let channel = connection.open_channel(None)?;
    let meter = Meter::start();
    let mut pace = Pace::new(work.count, work.limit());
    while let Some(begin) = pace.next() {
        let got = channel.basic_get(work.queue.as_str(), false)?.ok_or("the queue is empty")?;
        got.ack(&channel)?;
        pace.took(begin);
    }
    let measure = meter.stop(pace.latencies.len(), pace.latencies)?;
    channel.close()?;
    Ok(measure)
}

/// One thread that keeps so many calls in flight.
fn rpc(work: &Work, nodelay: bool, in_flight: usize) -> Result<Measure> {
    let mut connection = connect(&work.url, nodelay)?;
    let channel = connection.open_channel(None)?;
    let options = ConsumerOptions { no_ack: true, ..ConsumerOptions::default() };
    let consumer = channel.basic_consume(DIRECT_REPLY_TO, options)?;
    let body = work.body();
    let mut calls = OpenCalls::default();
    let answer = |calls: &mut OpenCalls| match consumer.receiver().recv_timeout(PATIENCE)? {
        ConsumerMessage::Delivery(delivery) => {
            calls.answered(delivery.properties.correlation_id().as_deref().unwrap_or_default(), &delivery.body)
        }
        other => Err(format!("not an answer: {other:?}").into()),
    };
    let meter = Meter::start();
    let mut pace = Pace::new(work.count, work.limit());
    while let Some(begin) = pace.next() {
        let properties = AmqpProperties::default()
            .with_correlation_id(calls.next_id())
            .with_reply_to(DIRECT_REPLY_TO.to_owned())
            .with_expiration("30000".to_owned())
            .with_delivery_mode(TRANSIENT);
        let publish = Publish { mandatory: true, ..Publish::with_properties(&body, work.queue.as_str(), properties) };
        channel.basic_publish("", publish)?;
        if calls.ids.len() == in_flight {
            answer(&mut calls)?;
        }
        if in_flight == 1 {
            pace.took(begin);
        }
    }
    while !calls.ids.is_empty() {
        answer(&mut calls)?;
    }
    meter.stop(calls.sent, pace.latencies)
}
