//! Publishes, gets and acks, and listens, with the pools and the topology of a settings file.
//!
//! ```text
//! cargo run --example quickstart               # reads app.toml in the current directory
//! cargo run --example quickstart my.toml
//! CONEY_PROFILE=rabbitmq cargo run --example quickstart     # a RabbitMQ on localhost
//! CONEY_BROKER__URL=amqp://user:password@host:5672/vhost cargo run --example quickstart
//! ```
//!
//! With app.toml as it is shipped it needs nothing installed: the URL in it is that of an embedded broker. The topology in
//! it is an exchange `unit_test_room` with two queues: `listener1` gets what is for `user1`, `listener2` what is for
//! `user2`.

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use coney::{App, Message};

fn main() -> ExitCode {
    env_logger::init();
    let settings = std::env::args().nth(1).unwrap_or_else(|| "app.toml".to_owned());
    match run(&settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quickstart: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: &str) -> coney::Result<()> {
    let app = App::from_file(settings)?;
    app.declare_topology()?;
    println!("declared the topology of {settings}");

    {
        let connection = app.publish_pool().connection()?;
        // Ok means that the broker has the message.
        connection.publish("unit_test_room", "user1", "hello user1")?;
        connection.publish("unit_test_room", "user2", Message::json(&["hello", "user2"])?)?;
        println!("published one message for user1 and one for user2, both confirmed");

        let confirmed = Arc::new(AtomicUsize::new(0));
        for n in 1..=100 {
            let confirmed = Arc::clone(&confirmed);
            connection.publish_async("unit_test_room", "user1", format!("number {n}"), move |outcome| match outcome {
                Ok(()) => {
                    confirmed.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => eprintln!("number {n}: {error}"),
            });
        }
        // Giving the connection back would wait too.
        connection.flush(Duration::from_secs(10))?;
        println!("published {} messages for user1 asynchronously", confirmed.load(Ordering::Relaxed));
    }

    {
        let connection = app.listen_pool().connection()?;
        // A message is the receiver's until it is settled: acked, rejected or requeued.
        if let Some(delivery) = connection.get("listener1")? {
            println!("listener1: {:?} with routing key {}", delivery.message().text(), delivery.routing_key());
            delivery.ack()?;
        }
        let mut rest = 0;
        while connection.get_and_ack("listener1")?.is_some() {
            rest += 1;
        }
        println!("listener1: and {rest} more");
    }

    // A listener calls back on a thread of its own, and comes back by itself when the connection is lost. Returning from
    // the callback acks; an error in it would have the message tried again.
    let (seen, wait) = mpsc::channel();
    let listener = app.spawn_listener("listener2", move |_context, delivery| -> coney::Result<()> {
        println!("listener2: {:?}", delivery.message().decode_json::<Vec<String>>()?);
        // The main thread waits for one message only.
        let _ = seen.send(());
        Ok(())
    })?;
    if wait.recv_timeout(Duration::from_secs(10)).is_err() {
        eprintln!("quickstart: listener2 has got no message in 10 s");
    }
    listener.stop()?;
    app.shutdown(Duration::from_secs(10))?;
    println!("done");
    Ok(())
}
