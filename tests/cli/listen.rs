//! `coney listen`: until enough, until Ctrl-C, and through lost connections.

use std::process::Stdio;

use coney::{Error, Exchange, Queue};
use rustix::process::Signal;

use crate::contract;
use crate::program::{Program, coney, next, run, run_read, run_redirected, run_unread};
use crate::support::{Broker, bodies, drain, queue, unique, wait_until};

contract!(
    it_ends_after_enough_and_gives_the_rest_back,
    it_ends_in_order_when_it_is_interrupted,
    an_exchange_alone_will_do,
    it_goes_on_after_a_lost_connection,
    a_reader_that_has_gone_loses_nothing,
    what_a_reader_has_not_read_goes_back,
    a_reader_that_goes_while_nothing_comes_is_missed,
    a_reader_that_does_not_read_on_keeps_no_end_waiting,
    a_stdout_that_takes_nothing_loses_nothing,
    a_queue_that_is_not_there_is_told,
);

fn it_ends_after_enough_and_gives_the_rest_back(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "enough"), broker.url());
    let all: Vec<String> = (0..50).map(|number| number.to_string()).collect();
    connection.publish_batch(all.iter().map(|body| ("", &queue, body.as_str()))).unwrap();
    // Not a multiple of the acks that go out together, so that the next message is at hand when it is to end.
    for begin in [0, 15, 30] {
        let ran = run(&["listen", &queue, "--count", "15", "--json-lines", "--url", &url]).well();
        let printed: Vec<String> =
            ran.json().iter().map(|one| one["body"].as_str().expect("text").to_owned()).collect();
        assert_eq!(printed, all[begin..begin + 15]);
        wait_until("the rest is back", || broker.queue_len(&queue) == 35 - begin as u64);
    }
    assert_eq!(bodies(&drain(&connection, &queue)), all[45..]);
}

fn it_ends_in_order_when_it_is_interrupted(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "interrupt"), broker.url());
    for signal in [Signal::INT, Signal::TERM] {
        let (mut program, _stdin, says) = Program::talk(&["listen", &queue, "--url", &url]);
        for body in ["one", "two"] {
            connection.publish("", &queue, body).unwrap();
            assert_eq!(next(&says), body);
        }
        program.signal(signal);
        assert_eq!(program.wait().code(), Some(0));
        assert_eq!((broker.queue_len(&queue), broker.queue_unacked(&queue)), (0, 0));
    }
}

fn an_exchange_alone_will_do(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let exchange = unique("exchange");
    connection.exchange_declare(&Exchange::topic(&exchange)).unwrap();
    let url = broker.url();
    let (mut program, _stdin, says) =
        Program::talk(&["listen", "--exchange", &exchange, "--key", "a.#", "--url", &url]);
    wait_until("its queue is bound", || connection.publish(&exchange, "a.b", "hello").is_ok());
    assert_eq!(next(&says), "hello");
    program.signal(Signal::INT);
    assert_eq!(program.wait().code(), Some(0));
    let error = connection.publish(&exchange, "a.b", "nobody").unwrap_err();
    assert!(matches!(error, Error::Returned { .. }), "its queue has gone: {error}");
}

fn it_goes_on_after_a_lost_connection(broker: Broker) {
    let hurt = broker.hurt();
    let app = hurt.app("");
    let exchange = unique("exchange");
    app.publish_pool().connection().unwrap().exchange_declare(&Exchange::fanout(&exchange)).unwrap();
    let url = hurt.url();
    // With a queue of its own, which is there again too.
    let (mut program, _stdin, says) =
        Program::talk(&["listen", "--exchange", &exchange, "--url", &url, "--log", "off"]);
    let publish = |body: &str| {
        wait_until("it is bound", || {
            app.publish_pool().connection().is_ok_and(|connection| connection.publish(&exchange, "", body).is_ok())
        });
    };
    publish("before");
    assert_eq!(next(&says), "before");
    hurt.close_all_connections("test");
    publish("after");
    // What has been printed comes again if its ack was lost with the connection.
    let again = std::iter::from_fn(|| Some(next(&says))).find(|line| line != "before");
    assert_eq!(again.as_deref(), Some("after"));
    program.signal(Signal::INT);
    assert_eq!(program.wait().code(), Some(0));
}

fn a_reader_that_has_gone_loses_nothing(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (unique("unread"), broker.url());
    // A message that is given up would be gone.
    connection.queue_declare(&Queue::new(&queue)).unwrap();
    for body in ["one", "two", "three"] {
        connection.publish("", &queue, body).unwrap();
    }
    for _ in 0..3 {
        run_unread(&["listen", &queue, "--url", &url]).failed(7, &["the reader of stdout has gone", "is back"]);
        wait_until("all are back", || broker.queue_len(&queue) == 3);
    }
    assert_eq!(bodies(&drain(&connection, &queue)), ["one", "two", "three"]);
}

fn what_a_reader_has_not_read_goes_back(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (unique("half-read"), broker.url());
    connection.queue_declare(&Queue::new(&queue)).unwrap();
    connection.publish_batch((10..74).map(|number| ("", queue.as_str(), number.to_string()))).unwrap();
    // What `| head -1` does.
    for taken in 1..4 {
        let (ran, read) = run_read(&["listen", &queue, "--url", &url], 3);
        ran.failed(7, &["the reader of stdout has gone"]);
        assert_eq!(read, format!("{}\n", 9 + taken).as_bytes());
        wait_until("the others are back", || broker.queue_len(&queue) == 64 - taken);
    }
}

fn a_reader_that_goes_while_nothing_comes_is_missed(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "idle"), broker.url());
    connection.publish("", &queue, "one").unwrap();
    let (ran, _) = run_read(&["listen", &queue, "--url", &url], 4);
    ran.failed(7, &["the reader of stdout has gone"]);
    assert_eq!((broker.queue_len(&queue), broker.queue_unacked(&queue)), (0, 0), "it was read");
}

fn a_reader_that_does_not_read_on_keeps_no_end_waiting(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (unique("stuck"), broker.url());
    connection.queue_declare(&Queue::new(&queue)).unwrap();
    for body in ["one", "two"] {
        connection.publish("", &queue, body).unwrap();
    }
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = coney();
    let mut program =
        Program::spawn(command.args(["listen", &queue, "--url", &url]).stdout(writer).stderr(Stdio::null()));
    wait_until("both are out", || broker.queue_unacked(&queue) == 2);
    program.signal(Signal::INT);
    assert_eq!(program.wait().code(), Some(0));
    wait_until("both are back", || broker.queue_len(&queue) == 2);
    drop(reader);
}

fn a_stdout_that_takes_nothing_loses_nothing(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (unique("nowhere"), broker.url());
    connection.queue_declare(&Queue::new(&queue)).unwrap();
    for body in ["one", "two"] {
        connection.publish("", &queue, body).unwrap();
    }
    let arguments = ["listen", &queue, "--url", &url];
    run_redirected(&arguments, ">&-").failed(1, &["stdout is closed"]);
    run_redirected(&arguments, "> /dev/full").failed(1, &["cannot write to stdout: No space left", "is back"]);
    wait_until("all are back", || broker.queue_len(&queue) == 2);
}

fn a_queue_that_is_not_there_is_told(broker: Broker) {
    let queue = unique("no-queue");
    run(&["listen", &queue, "--url", &broker.url()]).failed(1, &["404 NOT_FOUND", &queue]);
    run(&["listen", "--exchange", &queue, "--url", &broker.url()]).failed(1, &["404 NOT_FOUND - no exchange"]);
}
