//! Calls per second through `RpcClient` and `RpcWorker`, beside the same by hand on bare amiquip.
//!
//! ```text
//! cargo bench --bench rpc --features testing
//! ```
//!
//! On a private RabbitMQ node, plain JSON on both sides, one worker thread each, five rounds of each case in turn. Prints
//! medians, and the ratio coney : amiquip of each round as min, median and max.

use std::collections::HashMap;
use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{AmqpProperties, Channel, Connection, ConsumerMessage, ConsumerOptions, Publish, QueueDeclareOptions};
use coney::rpc::{RpcClient, RpcWorker};
use coney::testing::RabbitMq;
use coney::{App, Encoding, Settings};
use crossbeam_channel::Receiver;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const ROUNDS: usize = 5;
const CALLS: usize = 2_000;
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

fn main() -> Result<()> {
    let node = RabbitMq::start()?;
    let app = App::from_settings(Settings::from_url(&node.url())?)?;
    let worker =
        RpcWorker::new(&app).encoding(Encoding::Json).route("coney", |n: u64| Ok::<u64, String>(n + 1)).run()?;
    let client = RpcClient::new(&app)?.with_encoding(Encoding::Json);

    let mut serving = Connection::insecure_open(&node.url())?;
    let channel = serving.open_channel(None)?;
    thread::spawn(move || serve(&channel));
    let mut calling = Connection::insecure_open(&node.url())?;
    let channel = calling.open_channel(None)?;
    let consumer =
        channel.basic_consume(DIRECT_REPLY_TO, ConsumerOptions { no_ack: true, ..ConsumerOptions::default() })?;
    let answers = consumer.receiver();

    println!("{:24}{:>10}{:>10}   ratio min / median / max", "calls per second, medians", "coney", "amiquip");
    for (name, in_flight) in [("sequential", 1), ("32 in flight", 32)] {
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        for round in 1..=ROUNDS {
            eprintln!("{name}: round {round} of {ROUNDS}");
            ours.push(call_with_coney(&client, in_flight)?);
            bare.push(call_by_hand(&channel, answers, in_flight)?);
        }
        let mut ratios: Vec<f64> = ours.iter().zip(&bare).map(|(ours, bare)| ours / bare).collect();
        for values in [&mut ours, &mut bare, &mut ratios] {
            values.sort_by(f64::total_cmp);
        }
        let middle = ROUNDS / 2;
        println!(
            "{name:24}{:>10.0}{:>10.0}   {:.2} / {:.2} / {:.2}",
            ours[middle],
            bare[middle],
            ratios[0],
            ratios[middle],
            ratios[ROUNDS - 1]
        );
    }
    client.close();
    worker.stop()?;
    Ok(())
}

/// As many threads as calls are to be in flight, one client.
fn call_with_coney(client: &RpcClient, in_flight: usize) -> Result<f64> {
    let start = Instant::now();
    thread::scope(|scope| {
        let callers: Vec<_> = (0..in_flight)
            .map(|_| {
                scope.spawn(|| (0..CALLS / in_flight).try_for_each(|_| client.call::<_, u64>("coney", &1).map(drop)))
            })
            .collect();
        callers.into_iter().try_for_each(|caller| caller.join().unwrap_or(Ok(())))
    })?;
    Ok((CALLS / in_flight * in_flight) as f64 / start.elapsed().as_secs_f64())
}

/// Answers with the request's number plus one.
fn serve(channel: &Channel) -> amiquip::Result<()> {
    channel.queue_declare("amiquip", QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() })?;
    channel.qos(0, 64, false)?;
    let consumer = channel.basic_consume("amiquip", ConsumerOptions::default())?;
    for message in consumer.receiver() {
        let ConsumerMessage::Delivery(delivery) = message else { break };
        let (Some(to), Some(id)) = (delivery.properties.reply_to(), delivery.properties.correlation_id()) else {
            continue;
        };
        let number = serde_json::from_slice::<serde_json::Value>(&delivery.body).ok();
        let number = number.and_then(|request| request["data"].as_u64()).unwrap_or_default();
        let body = serde_json::json!({ "success": true, "data": number + 1 }).to_string();
        let properties = AmqpProperties::default().with_correlation_id(id.clone());
        channel.basic_publish("", Publish::with_properties(body.as_bytes(), to.as_str(), properties))?;
        delivery.ack(channel)?;
    }
    Ok(())
}

/// One thread that keeps as many calls in flight.
fn call_by_hand(channel: &Channel, answers: &Receiver<ConsumerMessage>, in_flight: usize) -> Result<f64> {
    let start = Instant::now();
    let mut open = HashMap::new();
    let (mut sent, mut answered) = (0, 0);
    while answered < CALLS {
        while sent < CALLS && open.len() < in_flight {
            let id = format!("{sent}");
            let properties =
                AmqpProperties::default().with_correlation_id(id.clone()).with_reply_to(DIRECT_REPLY_TO.to_owned());
            let body = serde_json::json!({ "data": 1 }).to_string();
            channel.basic_publish("", Publish::with_properties(body.as_bytes(), "amiquip", properties))?;
            open.insert(id, sent);
            sent += 1;
        }
        let ConsumerMessage::Delivery(delivery) = answers.recv_timeout(Duration::from_secs(30))? else {
            return Err("the consumer has ended".into());
        };
        let id = delivery.properties.correlation_id().as_deref().unwrap_or_default();
        let answer: serde_json::Value = serde_json::from_slice(&delivery.body)?;
        if open.remove(id).is_some() && answer["data"] == 2 {
            answered += 1;
        }
    }
    Ok(CALLS as f64 / start.elapsed().as_secs_f64())
}
