//! `coney doctor`: healthy where all is well, and to the point where it is not.

use coney::Queue;

use crate::contract;
use crate::program::{Ran, run, run_in, settings};
use crate::support::{Broker, unique};

contract!(
    all_is_well,
    a_user_without_rights_is_told_which,
    a_refused_login_is_a_problem,
    a_topology_in_conflict_is_a_problem,
    what_rabbitmq_4_has_given_up_is_hinted_at,
);

/// Each finding of that verdict: what it is about, and its text.
fn findings(ran: &Ran, verdict: &str) -> Vec<(String, String)> {
    let text = |one: &serde_json::Value, name: &str| one[name].as_str().expect("text").to_owned();
    let all = ran.json().into_iter().filter(|one| one["verdict"] == verdict);
    all.map(|one| (text(&one, "about"), text(&one, "text"))).collect()
}

fn all_is_well(broker: Broker) {
    let ran = run(&["doctor", "--url", &broker.url()]).well();
    assert!(ran.lines().iter().all(|line| line.starts_with("ok ")), "{ran:?}");
    for part in ["pool publish: ", "pool listen: ", "a round trip takes ", "guest:***@"] {
        assert!(ran.text().contains(part), "{part:?} is not in {}", ran.text());
    }
}

fn a_user_without_rights_is_told_which(broker: Broker) {
    let ran = run(&["doctor", "--json", "--url", &broker.reader_url(), "--pool", "listen"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(1), ""));
    let problems = findings(&ran, "problem");
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].0 == "pool listen" && problems[0].1.contains("403 ACCESS_REFUSED"), "{problems:?}");
}

fn a_refused_login_is_a_problem(broker: Broker) {
    let ran = run(&["doctor", "--json", "--url", &broker.url_with("guest:s3cret", "%2f")]);
    assert_eq!(ran.code, Some(1));
    assert!(!ran.text().contains("s3cret"));
    let problems = findings(&ran, "problem");
    assert_eq!(problems.len(), 2, "one for each pool: {problems:?}");
    assert!(problems[0].1.contains("refused user \"guest\""), "{problems:?}");
    assert!(findings(&ran, "hint")[0].1.contains("check user and password"), "{ran:?}");
    let ran = run(&["doctor", "--json", "--url", &broker.url_with("guest:guest", "nowhere")]);
    assert!(findings(&ran, "hint")[0].1.contains("check the virtual host"), "{ran:?}");
}

fn a_topology_in_conflict_is_a_problem(broker: Broker) {
    let name = unique("doctor");
    let text = format!("[broker]\nurl = {:?}\n[[topology.queues]]\nname = \"{name}\"\n", broker.url());
    let directory = settings(&text);
    let ran = run_in(directory.path(), &["doctor"]).well();
    assert!(ran.text().contains(&format!("hint     topology: queue {name}: is not there")), "{ran:?}");
    let connection = broker.app("").publish_pool().connection().unwrap();
    connection.queue_declare(&Queue::new(&name).durable(false)).unwrap();
    let ran = run_in(directory.path(), &["doctor", "--json"]);
    assert_eq!(ran.code, Some(1));
    let problems = findings(&ran, "problem");
    assert!(problems.len() == 1 && problems[0].1.contains("inequivalent arg 'durable'"), "{problems:?}");
}

fn what_rabbitmq_4_has_given_up_is_hinted_at(broker: Broker) {
    let (transient, mirrored, quorum) = (unique("transient"), unique("mirrored"), unique("quorum"));
    let text = format!(
        "[broker]\nurl = {:?}\n\
         [[topology.queues]]\nname = \"{transient}\"\ndurable = false\n\
         [[topology.queues]]\nname = \"{mirrored}\"\narguments = {{ x-queue-master-locator = \"random\" }}\n\
         [[topology.queues]]\nname = \"{quorum}\"\narguments = {{ x-queue-type = \"quorum\" }}\n",
        broker.url()
    );
    let directory = settings(&text);
    let ran = run_in(directory.path(), &["doctor", "--json"]).well();
    let hints: Vec<String> = findings(&ran, "hint").into_iter().map(|(_, text)| text).collect();
    let about = |name: &str, what: &str| hints.iter().filter(|hint| hint.contains(name) && hint.contains(what)).count();
    assert_eq!(about(&transient, "neither durable nor exclusive"), 1, "{hints:?}");
    assert_eq!(about(&mirrored, "x-queue-master-locator means nothing to RabbitMQ 4"), 1, "{hints:?}");
    assert_eq!(about("1 queue is classic, on one node", "policies ha-…"), 1, "{hints:?}");
    assert_eq!(about(&quorum, "RabbitMQ 4"), 0, "{hints:?}");
    assert!(findings(&ran, "ok").iter().any(|(_, text)| text.contains("says that it is version ")), "{ran:?}");
}

#[test]
fn hosts_that_cannot_be_reached_are_problems() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = format!(
        "[broker]\nhosts = [\"{free}\", \"{}\"]\n[pools.other]\nhosts = [\"no.such.invalid\"]\n",
        Broker::Embedded.addr()
    );
    let directory = settings(&text);
    let ran = run_in(directory.path(), &["doctor", "--json"]);
    assert_eq!(ran.code, Some(1));
    let problems = findings(&ran, "problem");
    let about: Vec<&str> = problems.iter().map(|(about, _)| about.as_str()).collect();
    assert_eq!(about, ["pool publish", "pool listen", "pool other"], "{problems:?}");
    assert!(problems[0].1.contains(&format!("cannot reach {free}")), "{problems:?}");
    assert!(problems[2].1.contains("cannot resolve \"no.such.invalid\""), "{problems:?}");
    let well = findings(&ran, "ok");
    assert_eq!(well.iter().filter(|(_, text)| text.contains("a round trip takes")).count(), 2, "by the other host");
}

#[test]
fn mistakes_in_the_settings_are_problems_one_by_one() {
    let directory = settings("[broker]\nurl = \"amqp://u:s3cret@\"\nheartbeat = \"0s\"\n[pools.publish]\nsise = 3\n");
    let ran = run_in(directory.path(), &["doctor", "--json"]);
    assert_eq!(ran.code, Some(1));
    assert_eq!(findings(&ran, "problem").len(), 2, "{ran:?}");
    assert!(!ran.text().contains("s3cret"), "{ran:?}");
}

#[test]
fn a_broker_in_the_process_is_told_for_what_it_is() {
    let ran = run(&["doctor", "--url", "memory://doctor"]).well();
    assert!(ran.text().contains("hint     pool publish: memory:// is a broker inside each program"), "{ran:?}");
}
