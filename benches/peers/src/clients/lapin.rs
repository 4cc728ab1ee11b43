//! lapin on tokio with two workers, and deadpool-lapin.

use std::collections::VecDeque;

use ::lapin::message::Delivery;
use ::lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
};
use ::lapin::types::{FieldTable, ShortString};
use ::lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer};
use async_rs::Runtime;
use deadpool::managed::{Manager, Metrics, Pool, RecycleResult};
use futures_lite::StreamExt;
use tokio::runtime::Builder;

use super::{OpenCalls, Work};
use crate::cases::{IN_FLIGHT, Job, POOL, PREFETCH, SHARERS, WINDOW, WINDOW_LOW};
use crate::measure::{Measure, Meter, Pace, Result};

const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";
const PERSISTENT: u8 = 2;
const TRANSIENT: u8 = 1;
const MANDATORY: BasicPublishOptions = BasicPublishOptions { mandatory: true, immediate: false };

pub fn run(work: &Work) -> Result<Measure> {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // Spawned, so that it runs on a worker and is not woken across threads.
    let task = runtime.spawn(run_task(work.clone()));
    runtime.block_on(task)?
}

async fn run_task(work: Work) -> Result<Measure> {
    match work.job {
        Job::PublishAsync => publish_pipelined(&work).await,
        Job::PublishSync => publish_sync(&work).await,
        Job::PublishPool => publish_pool(work).await,
        Job::Consume => consume(&work).await,
        Job::Get => get(&work).await,
        Job::RpcSequential => rpc(&work, 1).await,
        Job::RpcAsync => rpc(&work, IN_FLIGHT).await,
        Job::Checkout => checkout(&work).await,
        Job::PublishBatch | Job::RpcThreads => Err("lapin has no such thing".into()),
    }
}

async fn connect(work: &Work) -> Result<(Connection, Channel)> {
    let connection = Connection::connect(&work.url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}

async fn publisher(work: &Work) -> Result<(Connection, Channel)> {
    let (connection, channel) = connect(work).await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok((connection, channel))
}

fn properties() -> BasicProperties {
    BasicProperties::default().with_delivery_mode(PERSISTENT)
}

fn check(confirmation: Confirmation) -> Result<()> {
    if confirmation == Confirmation::Ack(None) { Ok(()) } else { Err(format!("{confirmation:?}").into()) }
}

async fn publish_pipelined(work: &Work) -> Result<Measure> {
    let (_connection, channel) = publisher(work).await?;
    let (queue, body) = (ShortString::from(work.queue.as_str()), work.body());
    let mut open = VecDeque::with_capacity(WINDOW);
    let meter = Meter::start();
    for _ in 0..work.count {
        if open.len() == WINDOW {
            for confirm in open.drain(..WINDOW - WINDOW_LOW) {
                check(confirm.await?)?;
            }
        }
        open.push_back(channel.basic_publish("".into(), queue.clone(), MANDATORY, &body, properties()).await?);
    }
    for confirm in open {
        check(confirm.await?)?;
    }
    meter.stop(work.count, Vec::new())
}

async fn publish_one(channel: &Channel, queue: &ShortString, body: &[u8]) -> Result<()> {
    let confirm = channel.basic_publish("".into(), queue.clone(), MANDATORY, body, properties()).await?;
    check(confirm.await?)
}

async fn publish_sync(work: &Work) -> Result<Measure> {
    let (_connection, channel) = publisher(work).await?;
    let (queue, body) = (ShortString::from(work.queue.as_str()), work.body());
    let meter = Meter::start();
    let mut pace = Pace::new(work.count, work.limit());
    while let Some(begin) = pace.next() {
        publish_one(&channel, &queue, &body).await?;
        pace.took(begin);
    }
    meter.stop(pace.latencies.len(), pace.latencies)
}

/// Connections of deadpool-lapin, each with a channel in confirm mode: its own pool lends bare connections, and a channel
/// for each message would cost two round trips more.
struct Channels(deadpool_lapin::Manager);

impl Manager for Channels {
    type Type = (Connection, Channel);
    type Error = ::lapin::Error;

    async fn create(&self) -> ::lapin::Result<(Connection, Channel)> {
        let connection = self.0.create().await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok((connection, channel))
    }

    async fn recycle(&self, lent: &mut (Connection, Channel), metrics: &Metrics) -> RecycleResult<::lapin::Error> {
        self.0.recycle(&mut lent.0, metrics).await
    }
}

fn manager(work: &Work) -> deadpool_lapin::Manager {
    deadpool_lapin::Manager::new(work.url.as_str(), ConnectionProperties::default, Runtime::tokio_current())
}

async fn publish_pool(work: Work) -> Result<Measure> {
    let pool: Pool<Channels> = Pool::builder(Channels(manager(&work))).max_size(POOL).build()?;
    let mut lent = Vec::new();
    for _ in 0..POOL {
        lent.push(pool.get().await.map_err(|error| error.to_string())?);
    }
    drop(lent);
    let meter = Meter::start();
    let sharers: Vec<_> = (0..SHARERS)
        .map(|_| {
            let (pool, work) = (pool.clone(), work.clone());
            tokio::spawn(async move {
                let (queue, body) = (ShortString::from(work.queue.as_str()), work.body());
                let mut pace = Pace::new(work.count / SHARERS, work.limit());
                while let Some(begin) = pace.next() {
                    let lent = pool.get().await.map_err(|error| error.to_string())?;
                    publish_one(&lent.1, &queue, &body).await?;
                    drop(lent);
                    pace.took(begin);
                }
                Result::Ok(pace.latencies)
            })
        })
        .collect();
    let mut latencies = Vec::new();
    for sharer in sharers {
        latencies.extend(sharer.await??);
    }
    meter.stop(latencies.len(), latencies)
}

async fn consume(work: &Work) -> Result<Measure> {
    let (_connection, channel) = connect(work).await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let meter = Meter::start();
    let (queue, options) = (ShortString::from(work.queue.as_str()), BasicConsumeOptions::default());
    let mut consumer = channel.basic_consume(queue, "peer".into(), options, FieldTable::default()).await?;
    for _ in 0..work.count {
        let delivery = next(&mut consumer).await?;
        if delivery.data.len() != work.size {
            return Err("not what was published".into());
        }
        delivery.ack(BasicAckOptions::default()).await?;
    }
    channel.close(200, "done".into()).await?;
    meter.stop(work.count, Vec::new())
}

async fn next(consumer: &mut Consumer) -> Result<Delivery> {
    Ok(consumer.next().await.ok_or("the consumer has ended")??)
}

async fn get(work: &Work) -> Result<Measure> {
    let (_connection, channel) = connect(work).await?;
    let queue = ShortString::from(work.queue.as_str());
    let meter = Meter::start();
    let mut pace = Pace::new(work.count, work.limit());
    while let Some(begin) = pace.next() {
        let got = channel.basic_get(queue.clone(), BasicGetOptions::default()).await?.ok_or("the queue is empty")?;
        got.delivery.ack(BasicAckOptions::default()).await?;
        pace.took(begin);
    }
    let measure = meter.stop(pace.latencies.len(), pace.latencies)?;
    channel.close(200, "done".into()).await?;
    Ok(measure)
}

/// One task that keeps so many calls in flight.
async fn rpc(work: &Work, in_flight: usize) -> Result<Measure> {
    let (_connection, channel) = connect(work).await?;
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut consumer =
        channel.basic_consume(DIRECT_REPLY_TO.into(), "peer".into(), options, FieldTable::default()).await?;
    let (queue, body) = (ShortString::from(work.queue.as_str()), work.body());
    let mut calls = OpenCalls::default();
    let meter = Meter::start();
    let mut pace = Pace::new(work.count, work.limit());
    while let Some(begin) = pace.next() {
        let properties = BasicProperties::default()
            .with_correlation_id(calls.next_id().into())
            .with_reply_to(DIRECT_REPLY_TO.into())
            .with_expiration("30000".into())
            .with_delivery_mode(TRANSIENT);
        channel.basic_publish("".into(), queue.clone(), MANDATORY, &body, properties).await?;
        if calls.ids.len() == in_flight {
            answer(&mut consumer, &mut calls).await?;
        }
        if in_flight == 1 {
            pace.took(begin);
        }
    }
    while !calls.ids.is_empty() {
        answer(&mut consumer, &mut calls).await?;
    }
    meter.stop(calls.sent, pace.latencies)
}

async fn answer(consumer: &mut Consumer, calls: &mut OpenCalls) -> Result<()> {
    let delivery = next(consumer).await?;
    let id = delivery.properties.correlation_id().as_ref().map(ShortString::as_str).unwrap_or_default();
    calls.answered(id, &delivery.data)
}

async fn checkout(work: &Work) -> Result<Measure> {
    let pool = deadpool_lapin::Pool::builder(manager(work)).max_size(POOL).build()?;
    let lend = || async { pool.get().await.map_err(|error| error.to_string()) };
    drop(lend().await?);
    let meter = Meter::start();
    for _ in 0..work.count {
        drop(lend().await?);
    }
    meter.stop(work.count, Vec::new())
}
