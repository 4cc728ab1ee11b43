//! `coney topology`: what it finds, what it says to CI, and that looking changes nothing.

use std::time::Duration;

use coney::{Exchange, Queue};
use tempfile::TempDir;

use crate::contract;
use crate::program::{run, run_in, settings};
use crate::support::{Broker, unique};

contract!(
    a_plan_is_carried_out_once,
    conflicts_are_told_and_nothing_is_declared,
    what_is_kept_as_it_is_is_told_and_in_nobodys_way,
    looking_declares_nothing,
    who_may_not_configure_is_told_so,
);

/// Settings with an exchange, a queue and a binding, all of one name.
fn topology(url: &str, name: &str) -> TempDir {
    settings(&format!(
        "[broker]\nurl = {url:?}\n\
         [[topology.exchanges]]\nname = \"{name}\"\nkind = \"topic\"\n\
         [[topology.queues]]\nname = \"{name}\"\narguments = {{ x-message-ttl = 60000 }}\n\
         [[topology.bindings]]\nexchange = \"{name}\"\nqueue = \"{name}\"\nrouting_key = \"a.#\"\n"
    ))
}

fn a_plan_is_carried_out_once(broker: Broker) {
    let name = unique("plan");
    let directory = topology(&broker.url(), &name);
    let plan = || run_in(directory.path(), &["topology", "plan"]);
    let before = plan();
    assert_eq!((before.code, before.stderr.as_str()), (Some(3), ""), "{before:?}");
    assert!(before.text().contains(&format!("create    queue    {name}")), "{before:?}");
    assert!(before.text().ends_with("3 to create, 0 equal, 0 in conflict, 0 that cannot be told\n"), "{before:?}");

    let applied = run_in(directory.path(), &["topology", "apply"]).well();
    assert!(applied.text().contains(&format!("created   exchange {name}")), "{applied:?}");
    assert!(applied.text().ends_with("3 created, 0 equal\n"), "{applied:?}");
    let connection = broker.app("").publish_pool().connection().unwrap();
    connection.publish(&name, "a.b", "bound").unwrap();

    let after = plan().well();
    assert!(after.text().contains(&format!("equal     queue    {name}  (1 message, 0 consumers)")), "{after:?}");
    assert!(after.text().contains("cannot be told over AMQP"), "{after:?}");
    assert!(after.text().ends_with("0 to create, 2 equal, 0 in conflict, 1 that cannot be told\n"), "{after:?}");
    let again = run_in(directory.path(), &["topology", "apply"]).well();
    assert!(again.text().ends_with("0 created, 2 equal, 1 declared (new or not)\n"), "{again:?}");

    // And to machines.
    connection.queue_delete(&name).unwrap();
    let ran = run_in(directory.path(), &["topology", "apply", "--json"]).well();
    let states: Vec<String> = ran.json()[0]["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["state"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(states, ["equal", "created", "created"]);
}

fn what_is_kept_as_it_is_is_told_and_in_nobodys_way(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (name, missing) = (unique("kept"), unique("missing"));
    connection.queue_declare(&Queue::new(&name).message_ttl(Duration::from_secs(1))).unwrap();
    let with = |on_conflict: &str, more: &str| {
        settings(&format!(
            "[broker]\nurl = {:?}\n[topology]\non_conflict = \"{on_conflict}\"\n[[topology.queues]]\nname = \"{name}\"\n{more}",
            broker.url()
        ))
    };
    let directory = with("warn", "");
    let plan = run_in(directory.path(), &["topology", "plan"]).well();
    assert!(plan.text().contains(&format!("kept      queue    {name}  (")), "{plan:?}");
    assert!(plan.text().contains("inequivalent arg 'x-message-ttl'"), "{plan:?}");
    assert!(
        plan.text().ends_with("0 to create, 0 equal, 1 kept as they are, 0 in conflict, 0 that cannot be told\n"),
        "{plan:?}"
    );
    let applied = run_in(directory.path(), &["topology", "apply"]);
    assert_eq!(applied.code, Some(0), "{applied:?}");
    assert!(applied.stderr.contains("is used as it is"), "{applied:?}");
    assert!(applied.text().ends_with("0 created, 0 equal, 1 kept as they are\n"), "{applied:?}");

    let directory = with("passive", "");
    assert!(run_in(directory.path(), &["topology", "apply"]).well().text().contains("kept      queue"));
    // What is to be there and is not, is in conflict.
    let directory = with("passive", &format!("[[topology.queues]]\nname = \"{missing}\"\n"));
    let plan = run_in(directory.path(), &["topology", "plan"]);
    assert_eq!(plan.code, Some(4), "{plan:?}");
    assert!(plan.text().contains(&format!("conflict  queue    {missing}")), "{plan:?}");
    assert_eq!(connection.queue_declare_passive(&missing).unwrap_err().code(), Some(404));
}

fn conflicts_are_told_and_nothing_is_declared(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let name = unique("conflict");
    let directory = topology(&broker.url(), &name);
    connection.queue_declare(&Queue::new(&name).message_ttl(Duration::from_secs(1))).unwrap();
    let ran = run_in(directory.path(), &["topology", "plan", "--json"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(4), ""));
    let items = &ran.json()[0]["items"];
    assert_eq!((&items[0]["state"], &items[1]["state"]), (&"create".into(), &"conflict".into()), "{items}");
    let detail = items[1]["detail"].as_str().unwrap();
    assert!(detail.contains("inequivalent arg 'x-message-ttl'") && detail.contains("60000"), "{detail}");

    let ran = run_in(directory.path(), &["topology", "apply"]).failed(4, &["nothing was declared", "1 in conflict"]);
    assert!(ran.text().contains("conflict  queue"), "{ran:?}");
    assert_eq!(connection.exchange_declare_passive(&name).unwrap_err().code(), Some(404));

    // The kind of an exchange, and whether it is durable.
    connection.queue_delete(&name).unwrap();
    connection.exchange_declare(&Exchange::direct(&name)).unwrap();
    let ran = run_in(directory.path(), &["topology", "plan"]);
    assert!(ran.code == Some(4) && ran.text().contains("inequivalent arg 'type'"), "{ran:?}");
    connection.exchange_delete(&name, false).unwrap();
    connection.exchange_declare(&Exchange::topic(&name).durable(false)).unwrap();
    let ran = run_in(directory.path(), &["topology", "plan"]);
    assert!(ran.code == Some(4) && ran.text().contains("inequivalent arg 'durable'"), "{ran:?}");
}

fn looking_declares_nothing(broker: Broker) {
    let name = unique("look");
    let directory = topology(&broker.url(), &name);
    for _ in 0..2 {
        assert_eq!(run_in(directory.path(), &["topology", "plan"]).code, Some(3));
    }
    let connection = broker.app("").publish_pool().connection().unwrap();
    assert_eq!(connection.queue_declare_passive(&name).unwrap_err().code(), Some(404));
    assert_eq!(connection.exchange_declare_passive(&name).unwrap_err().code(), Some(404));
}

fn who_may_not_configure_is_told_so(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let name = unique("reader");
    let directory = topology(&broker.reader_url(), &name);
    run_in(directory.path(), &["topology", "apply"]).failed(1, &["403 ACCESS_REFUSED", "permission"]);
    connection.exchange_declare(&Exchange::topic(&name)).unwrap();
    connection.queue_declare(&Queue::new(&name).message_ttl(Duration::from_secs(60))).unwrap();
    let ran = run_in(directory.path(), &["topology", "plan"]).well();
    assert!(ran.text().contains(&format!("unknown   queue    {name}  (ACCESS_REFUSED")), "{ran:?}");
}

#[test]
fn what_has_no_topology_is_told() {
    run(&["topology", "plan", "--url", "memory://"]).failed(2, &["--url has no topology"]);
    run(&["topology", "plan", "--config", "/no/such/file"]).failed(1, &["/no/such/file", "No such file"]);
    let directory = settings("[broker]\nurl = \"memory://\"");
    run_in(directory.path(), &["topology", "apply"]).failed(1, &["no topology", "app.toml"]);
    let directory = settings("[broker]\nurl = \"amqp://u:s3cret@\"\nheartbeat = 0\n[[topology.queues]]\nnome = \"q\"");
    let ran = run_in(directory.path(), &["topology", "plan"]).failed(1, &["heartbeat", "nome"]);
    assert!(!ran.stderr.contains("s3cret"));
}

#[test]
fn queues_of_one_connection_are_told_to_go_again() {
    let name = unique("own");
    let text = format!(
        "[broker]\nurl = {:?}\n[[topology.queues]]\nname = {name:?}\ndurable = false\nexclusive = true\n",
        Broker::Embedded.url()
    );
    let directory = settings(&text);
    let ran = run_in(directory.path(), &["topology", "apply"]).well();
    let words = format!("created   queue    {name}  (exclusive: it goes again with the connection");
    assert!(ran.text().contains(&words), "{ran:?}");
}

#[test]
fn a_profile_and_the_environment_count() {
    let name = unique("profile");
    let directory = topology(&Broker::Embedded.url(), &name);
    let path = directory.path().join("app.toml");
    let text = std::fs::read_to_string(&path).unwrap() + "[profiles.elsewhere.broker]\nurl = \"amqp://localhost:1\"\n";
    std::fs::write(&path, text).unwrap();
    let file = path.to_str().unwrap();
    assert_eq!(run(&["topology", "plan", "--config", file]).code, Some(3));
    run(&["topology", "plan", "--config", file, "--profile", "elsewhere"]).failed(5, &["localhost:1/"]);
    let mut command = crate::program::coney();
    command.current_dir(directory.path()).args(["topology", "plan"]).env("CONEY_PROFILE", "elsewhere");
    crate::program::run_with(&mut command, b"").failed(5, &["localhost:1/"]);
    command.env("CONEY_BROKER__URL", Broker::Embedded.url());
    assert_eq!(crate::program::run_with(&mut command, b"").code, Some(3));
}
