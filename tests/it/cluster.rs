//! A cluster of which one node after another is killed.

use std::collections::{HashMap, HashSet};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use coney::testing::{NodeError, RabbitMq, RabbitMqCluster};
use coney::{App, Message, Queue, Settings, Topology};

use crate::support::{PATIENCE, unique, wait_until};

/// Both sides must be at work again so soon after a node has been killed.
const RESUMED: Duration = Duration::from_secs(15);

const PUBLISHERS: usize = 2;
const EACH: usize = 2_500;

/// What publishers and handler have noted.
#[derive(Default)]
struct Ledger {
    /// By message id: when it was first sent, and how often.
    attempts: HashMap<String, (Instant, usize)>,
    confirmed: Vec<Confirmed>,
    handled: Vec<Handled>,
    errors: HashMap<String, usize>,
}

struct Confirmed {
    id: String,
    publisher: usize,
    started: Instant,
    at: Instant,
}

struct Handled {
    id: String,
    redelivered: bool,
    at: Instant,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Ledger>>);

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    /// How long after `killed` each publisher had a confirm of something it began to publish since, and the handler a
    /// message like that. `None` while that is not so.
    fn resumed(&self, killed: Instant) -> Option<(Duration, Duration)> {
        let publisher = |number| {
            let since = self.confirmed.iter().filter(|one| one.publisher == number && one.started >= killed);
            since.map(|one| one.at - killed).min()
        };
        let publishers = (0..PUBLISHERS).map(publisher).collect::<Option<Vec<Duration>>>()?.into_iter().max()?;
        let new = self.handled.iter().filter(|one| self.attempts[&one.id].0 >= killed);
        Some((publishers, new.map(|one| one.at - killed).min()?))
    }

    fn distinct(&self) -> HashSet<&str> {
        self.handled.iter().map(|one| one.id.as_str()).collect()
    }
}

/// Publishes until it is confirmed, under the same message id each time.
fn publish(app: &App, queue: &str, id: String, publisher: usize, shared: &Shared) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let started = Instant::now();
        shared.ledger().attempts.entry(id.clone()).or_insert((started, 0)).1 += 1;
        let message = Message::new(id.as_str()).with_message_id(id.as_str());
        let outcome = app.publish_pool().connection().and_then(|connection| connection.publish("", queue, message));
        match outcome {
            Ok(()) => {
                let confirmed = Confirmed { id, publisher, started, at: Instant::now() };
                return shared.ledger().confirmed.push(confirmed);
            }
            Err(error) => {
                assert!(error.is_transient() && Instant::now() < deadline, "{error}");
                let kind = format!("{error:?}").split([' ', '(']).next().unwrap_or_default().to_owned();
                *shared.ledger().errors.entry(kind).or_default() += 1;
                thread::park_timeout(Duration::from_millis(20));
            }
        }
    }
}

/// The node that a connection of this pool goes to.
fn node_of(cluster: &RabbitMqCluster, pool: &str) -> usize {
    let is_its = |name: &Option<String>| name.as_ref().is_some_and(|name| name.starts_with(&format!("coney {pool} ")));
    let has_one = |index: &usize| {
        let connections = cluster.node(*index).connections().expect("the connections");
        connections.iter().any(|connection| is_its(&connection.connection_name))
    };
    (0..cluster.nodes().len()).find(has_one).expect("a connection")
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_quorum_queue_outlives_the_nodes_it_is_used_on_one_after_another() {
    let start = Instant::now();
    // Three nodes that boot at the same time take theirs on a busy machine.
    let cluster = RabbitMq::builder().boot_timeout(Duration::from_secs(180)).start_cluster(3).expect("a cluster");
    eprintln!("the cluster is up after {:.1?}", start.elapsed());
    let settings = format!(
        r#"
        [broker]
        hosts = {:?}
        heartbeat = "2s"
        connect_timeout = "3s"
        operation_timeout = "5s"
        [pools.publish]
        checkout_timeout = "5s"
        confirm_timeout = "5s"
        "#,
        cluster.hosts()
    );
    let app = App::from_settings(Settings::from_toml(&settings).expect("settings")).expect("an app");
    let name = unique("replicated");
    let queue = Queue::new(&name).quorum();
    app.publish_pool().connection().unwrap().queue_declare(&queue).unwrap();
    cluster.wait_until_in_sync(&name).unwrap();

    let shared = Shared::default();
    let noted = shared.clone();
    let listener = app
        .listener(&name)
        .topology(Topology::new().queue(queue))
        .spawn(move |_, delivery| {
            let id = delivery.message().message_id().expect("an id").to_owned();
            let handled = Handled { id, redelivered: delivery.redelivered(), at: Instant::now() };
            noted.ledger().handled.push(handled);
        })
        .unwrap();

    // How far each publisher may go, so that there is something left to publish when the second node is killed.
    let allowed = AtomicUsize::new(EACH / 2);
    thread::scope(|scope| {
        for publisher in 0..PUBLISHERS {
            let (app, name, shared, allowed) = (&app, &name, &shared, &allowed);
            scope.spawn(move || {
                for n in 0..EACH {
                    wait_until("it may go on", || n < allowed.load(Ordering::Relaxed));
                    publish(app, name, format!("{publisher}/{n}"), publisher, shared);
                }
            });
        }
        // The first to go is the one the listener is connected to, the second whoever leads the queue by then.
        let which: [(&str, &dyn Fn() -> usize); 2] =
            [("in use", &|| node_of(&cluster, "listen")), ("leading", &|| cluster.leader(&name).unwrap())];
        let mut gone = Vec::new();
        for (round, (why, victim)) in which.into_iter().enumerate() {
            let so_far = (2 * round + 1) * PUBLISHERS * EACH / 5;
            wait_until("some are confirmed", || shared.ledger().confirmed.len() >= so_far);
            let leader = cluster.leader(&name).unwrap();
            let victim = Some(victim()).filter(|victim| !gone.contains(victim));
            let victim = victim.unwrap_or_else(|| (0..3).find(|other| !gone.contains(other)).unwrap());
            cluster.node(victim).kill().unwrap();
            let killed = Instant::now();
            wait_until("both sides are at work", || shared.ledger().resumed(killed).is_some());
            let (publishers, handler) = shared.ledger().resumed(killed).unwrap();
            eprintln!(
                "node {victim}, {why}, is killed (node {leader} led): {publishers:.1?} until both publishers are confirmed again, {handler:.1?} until the handler is called again"
            );
            assert!(publishers < RESUMED && handler < RESUMED);
            cluster.node(victim).start_again().unwrap();
            cluster.wait_until_in_sync(&name).unwrap();
            eprintln!("it is back {:.1?} after it was killed", killed.elapsed());
            gone.push(victim);
            allowed.store(EACH, Ordering::Relaxed);
        }
    });

    let all = PUBLISHERS * EACH;
    wait_until("all are handled", || shared.ledger().distinct().len() >= all);
    wait_until("and acked", || {
        let leader = cluster.leader(&name).unwrap();
        let queue = cluster.node(leader).queue_in("/", &name).unwrap().expect("the queue");
        queue.ready + queue.unacked == 0
    });
    listener.stop().unwrap();
    let ledger = shared.ledger();
    let arrived = ledger.distinct();
    let lost = ledger.confirmed.iter().filter(|one| !arrived.contains(one.id.as_str())).count();
    assert_eq!((ledger.confirmed.len(), lost), (all, 0));
    let mut calls: HashMap<&str, (usize, usize)> = HashMap::new();
    for one in &ledger.handled {
        let calls = calls.entry(&one.id).or_default();
        calls.0 += 1;
        calls.1 += usize::from(!one.redelivered);
    }
    for (id, (calls, first)) in &calls {
        let (_, attempts) = ledger.attempts.get(*id).expect("nothing that was not sent");
        // What is not redelivered is there for having been published.
        assert!(first <= attempts, "{id}: handled {calls} times, {first} of them new, published {attempts} times");
    }
    eprintln!(
        "{} handler calls for {all} messages, {} of them redeliveries; {} publishes, with {:?}; {:.1?} in all",
        ledger.handled.len(),
        ledger.handled.iter().filter(|one| one.redelivered).count(),
        ledger.attempts.values().map(|(_, attempts)| attempts).sum::<usize>(),
        ledger.errors,
        start.elapsed()
    );
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_cluster_knows_its_nodes_and_leaves_none_behind() {
    let cluster = RabbitMqCluster::start(2).expect("a cluster");
    let hosts = cluster.hosts();
    let app = App::from_settings(Settings::from_url(&cluster.urls()[1]).unwrap()).unwrap();
    let name = unique("known");
    app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&name).quorum()).unwrap();
    assert_eq!(cluster.leader(&name).unwrap(), 1, "where it was declared");
    let connections = |index: usize| cluster.node(index).connections().unwrap().len();
    assert_eq!((connections(0), connections(1)), (0, 1), "each knows its own");
    cluster.wait_until_in_sync(&name).unwrap();
    let missing = cluster.wait_until_in_sync("missing").unwrap_err();
    assert!(matches!(missing, NodeError::NoSuchQueue { .. }), "{missing}");
    drop((app, cluster));
    for host in hosts {
        TcpStream::connect(&host).map(drop).unwrap_err();
    }
}
