//! A program's own hooks: before publishing, and around handlers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use coney::rpc::{RpcClient, RpcWorker};
use coney::worker::QueueWorker;
use coney::{Error, Message, Outcome, RetryPolicy};

use crate::contract;
use crate::support::{Broker, PATIENCE, bodies, drain, queue, unique, wait_until};

contract! {
    what_a_hook_publishes_goes_past_the_hooks,
    hooks_change_every_message_that_is_published_in_the_order_they_were_added,
    what_a_hook_refuses_is_not_sent_and_its_publisher_is_told,
    copies_of_failed_messages_pass_no_hook,
    what_is_put_around_a_handler_sees_it_and_has_the_last_word,
    all_routes_of_an_app_are_within_what_it_has_put_around_them,
}

fn hooks_change_every_message_that_is_published_in_the_order_they_were_added(broker: Broker) {
    let app = broker.app("[pools.audit]\nsize = 1");
    app.before_publish(|to, message| {
        let way = format!("{}/{}/{}", to.pool(), to.exchange(), message.text().unwrap());
        Ok(message.with_app_id(way).with_kind("first"))
    });
    app.publish_pool().before_publish(|_, message| {
        let kind = format!("{} second", message.kind().unwrap());
        Ok(message.with_kind(kind))
    });
    let connection = app.publish_pool().connection().unwrap();
    let (from, to) = (queue(&connection, "hooked"), queue(&connection, "hooked-on"));
    connection.publish("", &to, "sync").unwrap();
    connection.publish_async("", &to, "async", |outcome| outcome.unwrap());
    connection.publish_batch([("", &*to, "batch")]).unwrap();
    connection.flush(PATIENCE).unwrap();
    app.publish_pool().publish("", &to, "pool").unwrap();
    let onward = to.clone();
    let listener = app.spawn_listener(&from, move |context, _| context.publish("", &onward, "context")).unwrap();
    app.pool("audit").unwrap().publish("", &from, "audit").unwrap();
    wait_until("it is handled", || listener.stats().acked == 1);
    listener.stop().unwrap();
    let all: Vec<(String, String)> = drain(&connection, &to)
        .iter()
        .map(|received| {
            let message = received.message();
            (message.app_id().unwrap().to_owned(), message.kind().unwrap().to_owned())
        })
        .collect();
    let expected =
        ["sync", "async", "batch", "pool"].map(|body| (format!("publish//{body}"), "first second".to_owned()));
    assert_eq!(all[..4], expected);
    assert_eq!(all[4..], [("listen//context".to_owned(), "first".to_owned())], "the second is one pool's own");
}

fn what_a_hook_refuses_is_not_sent_and_its_publisher_is_told(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let to = queue(&connection, "refused");
    app.before_publish(|to, message| match message.text() {
        Some("no") => Err(Error::refused(format!("not to {:?}", to.routing_key()))),
        _ => Ok(message),
    });
    let is_refusal = |error: &Error| {
        assert!(matches!(error, Error::Refused { .. }) && !error.is_transient(), "{error}");
        assert_eq!(error.to_string(), format!("the message was refused before it was published: not to {to:?}"));
    };
    is_refusal(&connection.publish("", &to, "no").unwrap_err());
    is_refusal(&app.publish_pool().publish("", &to, "no").unwrap_err());
    let (told, outcome) = mpsc::channel();
    connection.publish_async("", &to, "no", move |result| told.send(result).unwrap());
    is_refusal(&outcome.recv_timeout(PATIENCE).unwrap().unwrap_err());
    match connection.publish_batch(["yes", "no", "yes"].map(|body| ("", &*to, body))).unwrap_err() {
        Error::Batch(batch) => {
            assert_eq!((batch.confirmed, batch.failed.len(), batch.failed[0].0), (2, 1, 1));
            is_refusal(&batch.failed[0].1);
        }
        other => panic!("unexpected: {other}"),
    }
    let called = RpcClient::new(&app).unwrap();
    let worker = RpcWorker::new(&app).route(&to, |_: String| Ok::<_, String>(1));
    app.before_publish(|to, message| match to.routing_key().contains("reply-to") {
        true => Err(Error::refused("no answers")),
        false => Ok(message),
    });
    assert_eq!(drain(&connection, &to).len(), 2, "of all these two have been sent");
    let worker = worker.run().unwrap();
    let unanswered = called.with_timeout(Duration::from_millis(500)).call::<_, u64>(&to, "what").unwrap_err();
    assert!(matches!(unanswered, Error::Timeout { .. }), "{unanswered}");
    assert_eq!(worker.stats().delivered, 1, "a refused answer does not bring the request back");
    worker.stop().unwrap();
}

fn copies_of_failed_messages_pass_no_hook(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "unhooked-copies");
    connection.publish("", &name, "fails").unwrap();
    app.before_publish(|_, _| Err(Error::refused("nothing more is to be published")));
    let policy = RetryPolicy::new([Duration::from_millis(20)]).unwrap();
    let listener = app.listener(&name).retry(policy).spawn(|_, _| Err::<(), _>("no")).unwrap();
    let dead = connection.get_timeout(&format!("{name}.dead"), PATIENCE).unwrap().expect("the dead one").ack().unwrap();
    assert_eq!(dead.body(), b"fails");
    listener.stop().unwrap();
}

fn what_is_put_around_a_handler_sees_it_and_has_the_last_word(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "around");
    let said = Arc::new(Mutex::new(Vec::new()));
    let note = |who: &'static str| {
        let said = Arc::clone(&said);
        move |body: &str| said.lock().unwrap().push(format!("{who} {body}"))
    };
    let (outer, inner, handled) = (note("outer"), note("inner"), note("handler"));
    app.around_handlers(move |context, delivery, handler| {
        let body = delivery.message().text().unwrap();
        outer(body);
        assert_eq!(context.queue(), context.listener());
        match handler() {
            // What has failed is good enough for this one.
            Outcome::Failed(reason) => {
                outer(&reason);
                Outcome::Ack
            }
            outcome => outcome,
        }
    });
    let listener = app
        .listener(&name)
        .around(move |_, delivery, handler| {
            let body = delivery.message().text().unwrap();
            inner(body);
            if body == "turned away" { Outcome::Ack } else { handler() }
        })
        .spawn(move |_, delivery| {
            handled(delivery.message().text().unwrap());
            match delivery.message().text() {
                Some("panics") if !delivery.redelivered() => panic!("this panic is part of the test"),
                Some("fails") => Err("failed"),
                _ => Ok(()),
            }
        })
        .unwrap();
    for body in ["fine", "turned away", "fails", "panics"] {
        connection.publish("", &name, body).unwrap();
    }
    wait_until("all are acked", || listener.stats().acked == 4);
    let stats = listener.stats();
    assert_eq!((stats.panicked, stats.requeued, stats.rejected), (1, 1, 0), "a panic goes past what is around it");
    listener.stop().unwrap();
    let expected = [
        ["outer fine", "inner fine", "handler fine"].as_slice(),
        &["outer turned away", "inner turned away"],
        &["outer fails", "inner fails", "handler fails", "outer failed"],
        &["outer panics", "inner panics", "handler panics"],
        &["outer panics", "inner panics", "handler panics"],
    ];
    assert_eq!(*said.lock().unwrap(), expected.concat());
}

fn all_routes_of_an_app_are_within_what_it_has_put_around_them(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (seen, queues) = mpsc::channel();
    app.around_handlers(move |context, _, handler| {
        seen.send(context.queue().to_owned()).unwrap();
        handler()
    });
    let (work, calls) = (unique("around-work"), unique("around-calls"));
    let worker = QueueWorker::new(&app).route(&work, |_: u64| ()).run().unwrap();
    let rpc = RpcWorker::new(&app).route(&calls, |n: u64| Ok::<_, String>(n)).run().unwrap();
    connection.publish("", &work, Message::json(&1).unwrap()).unwrap();
    assert_eq!(queues.recv_timeout(PATIENCE).unwrap(), work);
    assert_eq!(RpcClient::new(&app).unwrap().call::<_, u64>(&calls, &2).unwrap(), 2);
    assert_eq!(queues.recv_timeout(PATIENCE).unwrap(), calls);
    worker.stop().unwrap();
    rpc.stop().unwrap();
}

fn what_a_hook_publishes_goes_past_the_hooks(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (name, audit) = (queue(&connection, "hooked"), queue(&connection, "audit"));
    let (in_hook, to) = (app.clone(), audit.clone());
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    app.before_publish(move |outgoing, message| {
        counted.fetch_add(1, Ordering::Relaxed);
        in_hook.publish_pool().publish("", &to, outgoing.routing_key())?;
        // One more: the hooks are still passed over.
        in_hook.publish_pool().publish("", &to, "again")?;
        Ok(message)
    });
    connection.publish("", &name, "one").unwrap();
    connection.publish("", &name, "two").unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 2);
    assert_eq!(bodies(&drain(&connection, &audit)), [name.as_str(), "again", name.as_str(), "again"]);
    assert_eq!(bodies(&drain(&connection, &name)), ["one", "two"]);
}
