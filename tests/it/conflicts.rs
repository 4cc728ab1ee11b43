//! Topologies that the broker refuses in part: what is there with other properties, and what it would not declare.

use std::sync::mpsc::{self, Receiver};

use coney::{App, Binding, Connection, Error, Event, Exchange, ListenerState, OnConflict, Queue, Topology};

use crate::contract;
use crate::support::{Broker, PATIENCE, unique, wait_until};

contract! {
    a_conflict_is_an_error_unless_something_else_is_said,
    with_warn_what_is_there_is_used_as_it_is,
    with_passive_nothing_is_declared,
    one_entry_may_say_otherwise_than_the_rest,
    what_is_refused_is_left_out_and_told,
    a_listener_declares_by_the_rules_of_the_settings,
    a_lost_connection_is_never_left_out,
}

/// A queue that is there and not durable, with a message in it; and the same as it is wanted, durable.
fn other_queue(connection: &Connection, what: &str) -> Queue {
    let name = unique(what);
    connection.queue_declare(&Queue::new(&name).max_length(10)).unwrap();
    connection.publish("", &name, "it was there before").unwrap();
    Queue::new(name)
}

fn other_exchange(connection: &Connection, what: &str) -> Exchange {
    let name = unique(what);
    connection.exchange_declare(&Exchange::fanout(&name)).unwrap();
    Exchange::topic(name)
}

fn events(app: &App) -> Receiver<Event> {
    let (tell, told) = mpsc::channel();
    app.on_event(move |event| drop(tell.send(event.clone()))).unwrap();
    told
}

/// What conflicts or is left out, of what was told.
fn next(told: &Receiver<Event>) -> (String, u16) {
    loop {
        match told.recv_timeout(PATIENCE).unwrap() {
            Event::DeclareConflict { entity, error, .. } => return (entity, error.code().unwrap()),
            Event::DeclareFailed { entity, error, .. } => return (format!("no {entity}"), error.code().unwrap()),
            _ => {}
        }
    }
}

fn not_declared(app: &App) -> Vec<String> {
    app.health().pools[0].not_declared.iter().map(|(entity, _)| entity.clone()).collect()
}

fn a_conflict_is_an_error_unless_something_else_is_said(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (queue, exchange) = (other_queue(&connection, "fails"), other_exchange(&connection, "fails"));
    for topology in [
        Topology::new().queue(queue.clone()),
        Topology::new().exchange(exchange.clone()),
        Topology::new().queue(queue.on_conflict(OnConflict::Fail)).on_conflict(OnConflict::Warn),
        Topology::new().exchange(exchange.on_conflict(OnConflict::Fail)).on_conflict(OnConflict::Warn),
    ] {
        assert_eq!(connection.declare(&topology).unwrap_err().code(), Some(406));
    }
    assert!(connection.is_alive());
}

fn with_warn_what_is_there_is_used_as_it_is(broker: Broker) {
    let app = broker.app("");
    let told = events(&app);
    let connection = app.publish_pool().connection().unwrap();
    let (queue, exchange) = (other_queue(&connection, "kept"), other_exchange(&connection, "kept"));
    let new = unique("new");
    let topology = Topology::new()
        .exchange(exchange.clone())
        .queue(queue.clone())
        .queue(Queue::new(&new))
        .bind(Binding::queue(&queue.name).to(&exchange.name))
        .on_conflict(OnConflict::Warn);
    let declared = connection.declare(&topology).unwrap();
    assert_eq!((declared[0].name.as_str(), declared[0].message_count), (queue.name.as_str(), 1));
    assert_eq!(next(&told), (format!("exchange {:?}", exchange.name), 406));
    assert_eq!(next(&told), (format!("queue {:?}", queue.name), 406));
    connection.publish(&exchange.name, "", "through the binding").unwrap();
    assert_eq!(connection.queue_declare_passive(&queue.name).unwrap().message_count, 2);
    assert_eq!(connection.queue_declare_passive(&new).unwrap().message_count, 0);
}

fn with_passive_nothing_is_declared(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (queue, exchange) = (other_queue(&connection, "passive"), other_exchange(&connection, "passive"));
    let there = Topology::new().exchange(exchange).queue(queue).on_conflict(OnConflict::Passive);
    assert_eq!(connection.declare(&there).unwrap()[0].message_count, 1);
    let missing = unique("missing");
    for topology in [
        Topology::new().queue(Queue::new(&missing).on_conflict(OnConflict::Passive)),
        Topology::new().exchange(Exchange::direct(&missing)).on_conflict(OnConflict::Passive),
    ] {
        assert_eq!(connection.declare(&topology).unwrap_err().code(), Some(404));
    }
    assert_eq!(connection.queue_declare_passive(&missing).unwrap_err().code(), Some(404));
    // One that the broker names is always a new one.
    let named = Topology::new().queue(Queue::server_named()).on_conflict(OnConflict::Passive);
    assert!(!connection.declare(&named).unwrap()[0].name.is_empty());
}

fn one_entry_may_say_otherwise_than_the_rest(broker: Broker) {
    let name = unique("settings");
    let settings = format!(
        "[topology]\non_conflict = \"passive\"\n[[topology.queues]]\nname = {name:?}\non_conflict = \"fail\"\n\
         [[topology.queues]]\nname = \"{name}-missing\""
    );
    let app = broker.app(&settings);
    let error = app.declare_topology().unwrap_err();
    assert!(error.code() == Some(404) && error.to_string().contains("missing"), "{error}");
    // The first one was declared.
    let connection = app.publish_pool().connection().unwrap();
    assert_eq!(connection.queue_declare_passive(&name).unwrap().message_count, 0);
}

fn what_is_refused_is_left_out_and_told(broker: Broker) {
    let app = broker.app("");
    let told = events(&app);
    let connection = app.publish_pool().connection().unwrap();
    let (queue, exchange) = (other_queue(&connection, "refused"), other_exchange(&connection, "refused"));
    let (missing, new) = (unique("missing"), unique("new"));
    let topology = Topology::new()
        .exchange(exchange.clone())
        .queue(queue.clone())
        .queue(Queue::new(&missing).on_conflict(OnConflict::Passive))
        .queue(Queue::new(&new))
        .bind(Binding::queue(&missing).to("amq.direct"))
        .bind(Binding::queue(&new).to("amq.direct").routing_key(&new))
        .skip_failed(true);
    let declared = connection.declare(&topology).unwrap();
    let names: Vec<&str> = declared.iter().map(|info| info.name.as_str()).collect();
    assert_eq!(names, [&queue.name, &missing, &new]);
    assert_eq!(next(&told), (format!("no exchange {:?}", exchange.name), 406));
    assert_eq!(next(&told), (format!("no queue {:?}", queue.name), 406));
    assert_eq!(next(&told), (format!("no queue {missing:?}"), 404));
    let (binding, code) = next(&told);
    assert!(binding.contains("binding of queue") && binding.contains(&missing) && code == 404, "{binding}");
    connection.publish("amq.direct", &new, "through the binding").unwrap();

    let health = app.health();
    assert!(health.is_ready(), "{health}");
    assert_eq!(not_declared(&app).len(), 4, "{health}");
    assert!(health.to_string().contains(&format!("queue {missing:?} is not declared")), "{health}");
    // What is put right is told of no more.
    connection.queue_declare(&Queue::new(&missing)).unwrap();
    connection.queue_delete(&queue.name).unwrap();
    connection.exchange_delete(&exchange.name, false).unwrap();
    connection.declare(&topology).unwrap();
    assert_eq!(not_declared(&app), [""; 0]);
}

fn a_listener_declares_by_the_rules_of_the_settings(broker: Broker) {
    let app = broker.app("[topology]\non_conflict = \"warn\"\nskip_failed = true");
    let queue = other_queue(&app.publish_pool().connection().unwrap(), "listener");
    let missing = Queue::new(unique("missing")).on_conflict(OnConflict::Passive);
    let topology = Topology::new().queue(queue.clone()).queue(missing.clone());
    let (seen, got) = mpsc::channel();
    let listener = app.listener(&queue.name).topology(topology.clone()).spawn(move |_, _| seen.send(()).unwrap());
    got.recv_timeout(PATIENCE).unwrap();
    listener.unwrap().stop().unwrap();
    // What a listener says itself counts.
    let strict = topology.on_conflict(OnConflict::Fail).skip_failed(false);
    let error = app.listener(&queue.name).topology(strict).spawn(|_, _| {}).unwrap_err();
    assert_eq!(error.code(), Some(406), "{error}");
    // Its own queue is not there, so it goes on trying.
    let alone = app.listener(&missing.name).topology(Topology::new().queue(missing.clone())).in_background();
    let listener = alone.spawn(|_, _| {}).unwrap();
    wait_until("it tries", || matches!(listener.state(), ListenerState::Recovering { attempt: 1.., .. }));
    app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&missing.name)).unwrap();
    wait_until("it consumes", || matches!(listener.state(), ListenerState::Consuming));
    listener.stop().unwrap();
}

fn a_lost_connection_is_never_left_out(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let connection = app.publish_pool().connection().unwrap();
    let topology = Topology::new().queue(Queue::new(unique("behind"))).skip_failed(true);
    connection.declare(&topology).unwrap();
    node.close_all_connections("for the test");
    wait_until("it has noticed", || !connection.is_alive());
    let error = connection.declare(&topology).unwrap_err();
    assert!(matches!(error, Error::ConnectionClosed { .. }), "{error}");
}
