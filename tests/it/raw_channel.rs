//! amiquip by way of coney: a channel of one's own with a deadline, and its types in and out.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use coney::amiquip::{AmqpProperties, ConsumerOptions, QueueDeclareOptions};
use coney::{Error, Message, Received};

use crate::contract;
use crate::support::{Broker, PATIENCE, drain, queue};

contract! {
    a_raw_channel_does_what_is_not_wrapped_and_a_refusal_costs_only_itself,
    a_raw_step_that_waits_for_ever_ends_at_its_deadline,
    messages_go_in_and_out_as_they_are,
}

fn a_raw_channel_does_what_is_not_wrapped_and_a_refusal_costs_only_itself(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "raw");
    connection.publish("", &name, "one").unwrap();
    let count =
        connection.raw(PATIENCE, |channel| Ok(channel.queue_declare_passive(name.as_str())?.declared_message_count()));
    assert_eq!(count.unwrap(), Some(1));
    let refused = connection.raw(PATIENCE, |channel| channel.queue_declare_passive("not there").map(drop)).unwrap_err();
    assert_eq!(refused.code(), Some(404), "{refused}");
    assert!(matches!(refused, Error::ChannelClosed { .. }) && refused.to_string().contains("work on a raw channel"));

    let panic = catch_unwind(AssertUnwindSafe(|| {
        connection.raw(PATIENCE, |_| -> coney::amiquip::Result<()> { panic!("mine") })
    }));
    assert_eq!(*panic.unwrap_err().downcast::<&str>().unwrap(), "mine");
    connection.publish("", &name, "two").unwrap();
    assert!(connection.is_alive());
    assert_eq!(drain(&connection, &name).len(), 2);
}

fn a_raw_step_that_waits_for_ever_ends_at_its_deadline(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "raw-wait");
    let start = Instant::now();
    let waited = connection.raw(Duration::from_millis(300), |channel| {
        let consumer = channel.basic_consume(name.as_str(), ConsumerOptions::default())?;
        // Ends with the connection, and with nothing else.
        consumer.receiver().iter().for_each(drop);
        consumer.cancel()
    });
    assert!(start.elapsed() >= Duration::from_millis(300) && start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    assert!(matches!(waited, Err(Error::Timeout { after, .. }) if after == Duration::from_millis(300)), "{waited:?}");
    assert!(!connection.is_alive(), "it was cut");
    drop(connection);
    assert!(app.publish_pool().connection().unwrap().is_alive());
}

fn messages_go_in_and_out_as_they_are(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let message = Message::new("hello").with_kind("greeting").with_header("n", 7).with_message_id("id-1");
    let name = queue(&connection, "raw-types");
    let (got, same) = connection
        .raw(PATIENCE, |channel| {
            let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
            let own = channel.queue_declare("", exclusive)?;
            for to in [own.name(), &name] {
                channel.basic_publish("", message.to_amiquip(to).expect("it fits"))?;
            }
            // On the same channel, so it is there.
            let get = own.get(true)?.expect("the message");
            Ok((Received::from(get.clone()), Message::from(get.delivery)))
        })
        .unwrap();
    assert_eq!((got.message(), &same, got.remaining()), (&message, &message, Some(0)));
    let received = connection.get_timeout(&name, PATIENCE).unwrap().expect("the other one").ack().unwrap();
    assert_eq!(received.message(), &message);

    let properties = AmqpProperties::try_from(&message).unwrap();
    assert_eq!(Message::from((b"hello".to_vec(), properties)), message);
    let too_long = Message::new("").with_kind("x".repeat(256));
    assert!(matches!(too_long.to_amiquip("k"), Err(Error::InvalidArgument { .. })));
}
