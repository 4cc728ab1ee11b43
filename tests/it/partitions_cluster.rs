//! Partitions on a cluster, consumed by several processes. One of the processes is killed, and one of the nodes.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use coney::testing::RabbitMq;
use coney::{App, Error, Partitioned, Settings, Topology};

use crate::support::{PATIENCE, example, unique, wait_until};

const PARTITIONS: u16 = 16;
const KEYS: usize = 1_000;
const EACH: usize = 100;
const PROCESSES: usize = 4;

/// Every partition must be served again so soon after a process or a node has been killed.
const RESUMED: Duration = Duration::from_secs(15);

/// What the processes have printed, in the order in which it came.
#[derive(Default)]
struct Ledger {
    /// By customer: the orders, as they were handled.
    handled: HashMap<String, Vec<usize>>,
    distinct: usize,
    /// By queue: when it was last served, and by which process.
    served: HashMap<String, (Instant, usize)>,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Ledger>>);

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, process: usize, line: &str) {
        let [queue, customer, order] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line:?}") };
        let order = order.strip_prefix("order-").and_then(|order| order.parse().ok()).expect("an order");
        let mut ledger = self.ledger();
        ledger.served.insert(queue.to_owned(), (Instant::now(), process));
        let orders = ledger.handled.entry(customer.to_owned()).or_default();
        let is_new = !orders.contains(&order);
        orders.push(order);
        ledger.distinct += usize::from(is_new);
    }

    /// How many partitions each process was the last to serve.
    fn shares(&self) -> [usize; PROCESSES] {
        let mut shares = [0; PROCESSES];
        self.ledger().served.values().for_each(|&(_, process)| shares[process] += 1);
        shares
    }

    /// How long after `since` every partition has been served again, but for what processes in `gone` have printed.
    fn all_served_after(&self, since: Instant, gone: &[usize]) -> Option<Duration> {
        let ledger = self.ledger();
        let again = ledger.served.values().filter(|(at, process)| *at > since && !gone.contains(process));
        let again: Vec<Duration> = again.map(|(at, _)| *at - since).collect();
        if again.len() < usize::from(PARTITIONS) { None } else { again.into_iter().max() }
    }
}

/// A process that consumes: the example of that name. What it prints goes to the ledger.
struct Consumer(Child);

impl Consumer {
    fn start(number: usize, settings: &Path, name: &str, shared: &Shared) -> Consumer {
        let mut child = example("partitions")
            .args(["--role", "consume", "--name", name, "--partitions", &PARTITIONS.to_string(), "--config"])
            .arg(settings)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdout, shared) = (child.stdout.take().unwrap(), shared.clone());
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                shared.note(number, &line.unwrap());
            }
        });
        Consumer(child)
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Publishes an order with each of the keys, until all are confirmed.
fn publish_one_each(app: &App, exchange: &str, keys: &[String], order: usize) {
    let deadline = Instant::now() + PATIENCE;
    let mut left: Vec<&String> = keys.iter().collect();
    while !left.is_empty() {
        let messages = left.iter().map(|key| (exchange, key.as_str(), format!("order-{order}")));
        let sent = app.publish_pool().connection().and_then(|connection| connection.publish_batch(messages));
        let Err(error) = sent else { return };
        assert!(Instant::now() < deadline, "{error}");
        if let Error::Batch(batch) = &error {
            let is_left = |position: &usize| *position >= batch.taken || batch.error_at(*position).is_some();
            left = (0..left.len()).filter(is_left).map(|position| left[position]).collect();
        }
        thread::park_timeout(Duration::from_millis(50));
    }
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn four_processes_and_three_nodes_lose_nothing_and_no_order() {
    let start = Instant::now();
    let cluster = RabbitMq::builder().boot_timeout(Duration::from_secs(180)).start_cluster(3).expect("a cluster");
    eprintln!("the cluster is up after {:.1?}", start.elapsed());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("app.toml");
    let text = format!(
        "[broker]\nhosts = {:?}\nheartbeat = \"2s\"\nconnect_timeout = \"3s\"\noperation_timeout = \"5s\"\n\
         [pools.publish]\nconfirm_timeout = \"5s\"\ncheckout_timeout = \"5s\"\n[pools.listen]\nprefetch = 16",
        cluster.hosts()
    );
    std::fs::write(&file, &text).unwrap();
    let name = unique("orders");
    let mut settings = Settings::from_file(&file).unwrap();
    settings.topology = Topology::new().partitioned(Partitioned::new(&name, PARTITIONS));
    let app = App::from_settings(settings).unwrap();
    app.declare_topology().unwrap();
    let partitioned = app.partitioned(&name).unwrap();
    let leaders: HashSet<usize> = partitioned.queue_names().map(|queue| cluster.leader(&queue).unwrap()).collect();
    assert_eq!(leaders.len(), 3, "the leaders are spread over the nodes");
    cluster.wait_until_in_sync(&partitioned.queue_name(0)).unwrap();

    let shared = Shared::default();
    let mut consumers: Vec<Consumer> =
        (0..PROCESSES).map(|number| Consumer::start(number, &file, &name, &shared)).collect();

    // Each publisher has its own customers, so that the orders of each are published in order.
    thread::scope(|scope| {
        for publisher in 0..4 {
            let app = &app;
            scope.spawn(move || {
                let customers = (publisher..KEYS).step_by(4).map(|customer| format!("customer-{customer}"));
                let keys: Vec<String> = customers.map(|customer| partitioned.routing_key(&customer)).collect();
                (0..EACH).for_each(|order| publish_one_each(app, &partitioned.exchange(), &keys, order));
            });
        }
        wait_until("the processes share the partitions", || shared.shares().iter().all(|share| *share > 0));
        eprintln!("{:.1?}: shares {:?}", start.elapsed(), shared.shares());
        wait_until("some are handled", || shared.ledger().distinct >= KEYS * EACH / 5);
        eprintln!("{:.1?}: shares {:?}", start.elapsed(), shared.shares());

        consumers[1].kill();
        let killed = Instant::now();
        wait_until("all partitions are served", || shared.all_served_after(killed, &[1]).is_some());
        let resumed = shared.all_served_after(killed, &[1]).unwrap();
        eprintln!(
            "a process is killed: {resumed:.1?} until every partition is served again, shares {:?}",
            shared.shares()
        );
        assert!(resumed < RESUMED, "{resumed:?}");

        wait_until("more are handled", || shared.ledger().distinct >= KEYS * EACH * 2 / 5);
        cluster.node(1).kill().unwrap();
        let killed = Instant::now();
        wait_until("all partitions are served", || shared.all_served_after(killed, &[1]).is_some());
        let resumed = shared.all_served_after(killed, &[1]).unwrap();
        eprintln!(
            "a node is killed: {resumed:.1?} until every partition is served again, shares {:?}",
            shared.shares()
        );
        assert!(resumed < RESUMED, "{resumed:?}");
        cluster.node(1).start_again().unwrap();
    });
    wait_until("all are handled", || shared.ledger().distinct >= KEYS * EACH);
    drop(consumers);

    let ledger = shared.ledger();
    let handled: usize = ledger.handled.values().map(Vec::len).sum();
    eprintln!(
        "{} messages of {} customers handled {handled} times, {:.1?} in all",
        ledger.distinct,
        ledger.handled.len(),
        start.elapsed()
    );
    assert_eq!((ledger.distinct, ledger.handled.len()), (KEYS * EACH, KEYS));
    for (customer, orders) in &ledger.handled {
        let mut next = 0;
        for &order in orders {
            assert!(order <= next, "{customer}: {order} before {next}: {orders:?}");
            next = next.max(order + 1);
        }
    }
}
