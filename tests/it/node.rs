//! `testing::RabbitMq` does what it says, on each release it is run with: what every method tells of a node is held against
//! what the test has done to it.

use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{env, fs};

use coney::testing::{NodeError, RabbitMq, RabbitMqCluster, Version};
use coney::{ConnectError, Error, Queue};

use crate::support::{PATIENCE, app, hurt_node, node, unique, wait_until};

/// What `publish` of a message that is kept gives.
fn publish_one(node: &RabbitMq, queue: &str) {
    let app = app(&node.url(), "");
    let connection = app.publish_pool().connection().expect("a connection");
    connection.queue_declare(&Queue::new(queue)).expect("declare");
    connection.publish("", queue, "kept").expect("publish");
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_node_says_which_version_it_is() {
    let version = node().version();
    // The node's own log, in which nobody has edited it.
    assert!(node().log().contains(&format!("Starting RabbitMQ {version} on Erlang")), "{version}: {}", node().log());
    assert!((Version::new(3, 10, 0)..Version::new(5, 0, 0)).contains(&version), "{version}");
    assert_eq!(node().eval("rabbit_misc:version()").unwrap(), format!("\"{version}\""));
    // Which one is run is for CONEY_RABBITMQ to say, and 4.0 is what scripts/rabbitmq4 makes.
    if env::var("CONEY_RABBITMQ").is_ok_and(|path| path.ends_with("rabbitmq4")) {
        assert_eq!((version.major, version.minor), (4, 0));
    }
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_server_that_is_named_is_the_one_that_runs() {
    // Debian has a wrapper in PATH, which would run it as another user.
    let known = ["/usr/sbin/rabbitmq-server", "/usr/lib/rabbitmq/bin/rabbitmq-server"].map(PathBuf::from);
    let installed = known.into_iter().find(|path| path.exists());
    let root = env::var_os("CONEY_RABBITMQ").map(PathBuf::from).filter(|path| path.is_dir());
    let named = root.clone().or(installed).expect("a RabbitMQ");
    let node = RabbitMq::builder().server(&named).start().expect("a RabbitMQ node");
    let version = node.version();
    let ours = format!("rabbitmq_server-{version}");
    let lib = root.unwrap_or_else(|| "/".into()).join("usr/lib/rabbitmq/lib");
    assert!(lib.join(&ours).is_dir(), "{ours} is not in {}", lib.display());
    publish_one(&node, "named");
    assert_eq!(node.queue_len("named").unwrap(), 1);
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_node_tells_of_connections_channels_consumers_and_queues() {
    let node = RabbitMq::start().expect("a RabbitMQ node");
    assert!(node.connections().unwrap().is_empty() && node.channels().unwrap().is_empty());
    assert!(node.consumers().unwrap().is_empty());
    assert_eq!(node.queue_in("/", "told").unwrap(), None);
    let missing = node.queue_len("told").unwrap_err();
    assert!(matches!(&missing, NodeError::NoSuchQueue { queue, .. } if queue == "told"), "{missing}");

    let app = app(&node.url(), "heartbeat = \"17s\"\n[pools.listen]\nprefetch = 3");
    let publisher = app.publish_pool().connection().unwrap();
    publisher.queue_declare(&Queue::new("told")).unwrap();
    for n in 0..5 {
        publisher.publish("", "told", n.to_string()).unwrap();
    }
    assert_eq!((node.queue_len("told").unwrap(), node.queue_unacked("told").unwrap()), (5, 0));

    let (hold, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    let listener = app
        .spawn_listener("told", move |_, _| {
            let _ = held.lock().unwrap().recv_timeout(PATIENCE);
        })
        .unwrap();
    wait_until("three are held", || node.queue_unacked("told").unwrap() == 3);
    let queue = node.queue_in("/", "told").unwrap().expect("the queue");
    assert_eq!((queue.ready, queue.unacked, queue.consumers, queue.durable), (2, 3, 1, true));

    let consumers = node.consumers().unwrap();
    assert_eq!(consumers.len(), 1);
    let consumer = &consumers[0];
    assert_eq!((consumer.vhost.as_str(), consumer.queue.as_str()), ("/", "told"));
    assert_eq!((consumer.prefetch, consumer.ack_required), (3, true));
    assert!(!consumer.tag.is_empty());

    let connections = node.connections().unwrap();
    assert_eq!(connections.len(), 2);
    for connection in &connections {
        assert_eq!((connection.user.as_str(), connection.vhost.as_str()), ("guest", "/"));
        assert_eq!((connection.state.as_str(), connection.heartbeat), ("running", 17));
        assert!(connection.connection_name.as_ref().is_some_and(|name| name.starts_with("coney ")), "{connection:?}");
        assert!(connection.information.as_ref().is_some_and(|text| text.contains("RabbitMQ")), "{connection:?}");
        let ends = format!("127.0.0.1:{} -> 127.0.0.1:{}", connection.port, node.port());
        assert_eq!(connection.name, ends);
        let channels = node.channels().unwrap();
        let its = channels.iter().filter(|channel| channel.connection == connection.name).count();
        assert_eq!(its, connection.channels as usize);
    }
    let channels = node.channels().unwrap();
    let consuming = channels.iter().find(|channel| channel.consumers == 1).expect("the listener's channel");
    assert_eq!((consuming.unacked, consuming.user.as_str(), consuming.transactional), (3, "guest", false));
    let publishing = channels.iter().find(|channel| channel.confirm).expect("the publisher's channel");
    assert_eq!((publishing.unconfirmed, publishing.consumers), (0, 0));
    drop(hold);
    listener.stop().unwrap();

    let closed = node.close_all_connections("for \"the\" test").unwrap();
    assert!((1..=2).contains(&closed), "{closed}");
    wait_until("they are gone", || node.connections().unwrap().is_empty());
    let error = publisher.publish("", "told", "late").unwrap_err();
    assert!(error.code() == Some(320) && error.to_string().contains("for \"the\" test"), "{error}");
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn users_permissions_and_virtual_hosts_are_as_they_were_set() {
    let node = node();
    let (user, vhost) = (unique("user"), unique("vhost"));
    node.add_user(&user, "p\u{e4}ss").unwrap();
    node.add_vhost(&vhost).unwrap();
    node.add_vhost(&vhost).expect("one that is there stays");
    let at = |who: &str| app(&format!("amqp://{who}@127.0.0.1:{}/{vhost}", node.port()), "");
    let refused = at(&format!("{user}:p%C3%A4ss")).publish_pool().connection().map(drop).unwrap_err();
    assert!(matches!(refused, Error::Connect { .. }), "{refused}");
    node.set_permissions(&vhost, &user, "^mine$", ".*", "").unwrap();
    let app = at(&format!("{user}:p%C3%A4ss"));
    let connection = app.publish_pool().connection().unwrap();
    connection.queue_declare(&Queue::new("mine")).unwrap();
    assert_eq!(connection.queue_declare(&Queue::new("others")).unwrap_err().code(), Some(403));
    assert_eq!(connection.get("mine").map(drop).unwrap_err().code(), Some(403));
    assert!(node.queue_in(&vhost, "mine").unwrap().is_some());
    assert!(node.queue_in("/", "mine").unwrap().is_none());
    at("guest:guest").publish_pool().connection().expect("guest may do everything there");
    let taken = node.add_user(&user, "again").unwrap_err();
    assert!(matches!(taken, NodeError::Eval { .. }), "{taken}");
    let nowhere = node.set_permissions("nowhere", &user, "", "", "").unwrap_err();
    assert!(nowhere.to_string().contains("nowhere"), "{nowhere}");
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_node_lives_and_dies_as_it_is_told() {
    let node = hurt_node();
    let name = unique("survivor");
    publish_one(&node, &name);
    let refused = || TcpStream::connect(("127.0.0.1", node.port())).map(drop).unwrap_err();
    let (url, version) = (node.url(), node.version());
    let is_there = |after: &str| assert_eq!(node.queue_len(&name).unwrap(), 1, "after {after}");

    node.stop_app().unwrap();
    refused();
    node.start_app().unwrap();
    is_there("stop_app");

    node.restart().unwrap();
    is_there("restart");

    node.kill().unwrap();
    refused();
    for (answer, what) in [
        (node.kill().unwrap_err(), "cannot kill the node: the RabbitMQ node is killed"),
        (node.pause().unwrap_err(), "cannot pause the node: the RabbitMQ node is killed"),
        (node.resume().unwrap_err(), "cannot resume the node: the RabbitMQ node is killed"),
        (node.restart().unwrap_err(), "cannot restart the node: the RabbitMQ node is killed"),
    ] {
        assert_eq!(answer.to_string(), what);
    }
    assert!(matches!(node.queue_len(&name).unwrap_err(), NodeError::Eval { .. }));
    node.start_again().unwrap();
    is_there("kill");
    assert!(matches!(node.start_again().unwrap_err(), NodeError::State { state: "running", .. }));

    node.pause().unwrap();
    node.pause().expect("again");
    assert!(matches!(node.queue_len(&name).unwrap_err(), NodeError::State { state: "paused", .. }));
    let start = Instant::now();
    let error = app(&url, "connect_timeout = \"500ms\"").publish_pool().connection().map(drop).unwrap_err();
    assert!(matches!(error, Error::Connect { cause: ConnectError::Timeout { .. }, .. }), "{error:?}");
    assert!(start.elapsed() < PATIENCE);
    node.resume().unwrap();
    is_there("pause");

    // A paused node can be killed, too.
    node.pause().unwrap();
    node.kill().unwrap();
    node.start_again().unwrap();
    assert_eq!((node.url(), node.version()), (url, version));
    assert!(node.log().matches("Starting RabbitMQ").count() >= 4, "all lives are in the log");
}

/// RabbitMQ is not done with its boot when it says that it runs.
#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_node_may_be_stopped_as_soon_as_it_runs() {
    for _ in 0..3 {
        let node = RabbitMq::start().expect("a RabbitMQ node");
        for _ in 0..2 {
            node.stop_app().unwrap();
            node.start_app().unwrap();
        }
        assert_eq!(node.eval("rabbit:is_running()").unwrap(), "true", "{}", node.log());
    }
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn publishers_are_blocked_and_unblocked_by_the_time_it_is_said() {
    let node = hurt_node();
    let name = unique("blocked");
    publish_one(&node, &name);
    for _ in 0..3 {
        node.block_publishers().unwrap();
        assert_eq!(node.eval("rabbit_alarm:get_alarms() =/= []").unwrap(), "true");
        let app = app(&node.url(), "[pools.publish]\nconfirm_timeout = \"300ms\"");
        let connection = app.publish_pool().connection().unwrap();
        let error = connection.publish("", &name, "waits").unwrap_err();
        assert!(error.to_string().contains("blocks publishing"), "{error}");
        drop(connection);
        node.unblock_publishers().unwrap();
        assert_eq!(node.eval("rabbit_alarm:get_alarms()").unwrap(), "[]");
        publish_one(&node, &name);
    }
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_node_has_the_settings_it_was_given() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "# a file\n").unwrap();
    let node = RabbitMq::builder()
        .conf("heartbeat = 77")
        .conf_file("ssl_options.cacertfile", file.path())
        .advanced("rabbit", "channel_tick_interval", 1234)
        .advanced("rabbit", "cluster_name", "<<\"of the test\">>")
        .boot_timeout(Duration::from_secs(200))
        .timeout(Duration::from_secs(2))
        .start()
        .expect("a RabbitMQ node");
    let setting = |key: &str| node.eval(&format!("application:get_env(rabbit, {key})")).unwrap();
    assert_eq!(setting("heartbeat"), "{ok,77}");
    assert_eq!(setting("channel_tick_interval"), "{ok,1234}");
    assert_eq!(setting("cluster_name"), "{ok,<<\"of the test\">>}");
    // The node reads its copy where it sees it, and the file itself is not needed any more.
    drop(file);
    let read = "{ok, Options} = application:get_env(rabbit, ssl_options), \
                {ok, Text} = file:read_file(proplists:get_value(cacertfile, Options)), Text";
    assert_eq!(node.eval(read).unwrap(), "<<\"# a file\\n\">>");

    let start = Instant::now();
    let late = node.eval("timer:sleep(60000)").unwrap_err();
    assert!(matches!(late, NodeError::Timeout { .. }) && start.elapsed() < Duration::from_secs(30), "{late}");
    for (expression, says) in
        [("1 +", "syntax error"), ("exit(\"for the test\")", "for the test"), ("nothing:here()", "undef")]
    {
        let error = node.eval(expression).unwrap_err();
        assert!(matches!(&error, NodeError::Eval { .. }) && error.to_string().contains(says), "{error}");
    }
    assert_eq!(node.eval("X = \"\u{e4}\", {X, 'atom'}.").unwrap(), "{\"\u{e4}\",atom}");

    let error = RabbitMq::builder().conf("no_such_key = 1").start().map(drop).unwrap_err();
    assert!(matches!(&error, NodeError::Boot { .. }) && error.to_string().contains("no_such_key"), "{error}");
    let error = RabbitMq::builder().conf_file("ssl_options.certfile", "/no/such/file").start().map(drop).unwrap_err();
    assert!(error.to_string().starts_with("copy /no/such/file, for ssl_options.certfile: No such file"), "{error}");
}

/// Nodes that run at the same time have nothing in common, in whichever directory their server is.
#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn nodes_beside_each_other_share_nothing_and_leave_nothing() {
    let nodes: Vec<RabbitMq> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..2).map(|_| scope.spawn(|| RabbitMq::start().expect("a RabbitMQ node"))).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    publish_one(&nodes[0], "own");
    assert_eq!(nodes[0].queue_len("own").unwrap(), 1);
    assert_eq!(nodes[1].queue_in("/", "own").unwrap(), None);
    let base = |node: &RabbitMq| node.eval("os:getenv(\"HOME\")").unwrap().trim_matches('"').to_owned();
    let (first, second) = (base(&nodes[0]), base(&nodes[1]));
    assert_ne!(first, second);
    let root = env::var_os("CONEY_RABBITMQ").map(PathBuf::from).filter(|path| path.is_dir()).unwrap_or_default();
    let outside = |home: &str| if root.as_os_str().is_empty() { home.into() } else { root.join(&home[1..]) };
    let carry = |home: &str| {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let environments = entries.filter_map(|entry| fs::read(entry.path().join("environ")).ok());
        environments.filter(|env| env.windows(home.len()).any(|window| window == home.as_bytes())).count()
    };
    assert!(outside(&first).is_dir() && outside(&second).is_dir());
    assert!(carry(&first) >= 2 && carry(&second) >= 2, "the node and its name server");
    let ports: Vec<u16> = nodes.iter().map(RabbitMq::port).collect();
    drop(nodes);
    for (home, port) in [first, second].iter().zip(ports) {
        assert!(!outside(home).exists(), "{home}");
        assert_eq!(carry(home), 0, "{home}");
        TcpStream::connect(("127.0.0.1", port)).map(drop).unwrap_err();
    }
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_cluster_is_whole_again_after_a_node_of_it_was_down() {
    let cluster = RabbitMqCluster::start(3).expect("a cluster");
    assert_eq!((cluster.nodes().len(), cluster.urls().len(), cluster.hosts().len()), (3, 3, 3));
    assert_eq!(cluster.urls()[2], cluster.node(2).url());
    assert_eq!(cluster.hosts()[1], format!("127.0.0.1:{}", cluster.node(1).port()));
    let name = unique("whole");
    let app = app(&cluster.urls()[0], "");
    app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&name).quorum()).unwrap();
    cluster.wait_until_in_sync(&name).unwrap();
    assert_eq!(cluster.leader(&name).unwrap(), 0, "where it was declared");
    assert!(matches!(cluster.leader("missing").unwrap_err(), NodeError::NoSuchQueue { .. }));
    drop(app);
    cluster.node(0).kill().unwrap();
    wait_until("another leads", || cluster.leader(&name).is_ok_and(|leader| leader != 0));
    cluster.node(0).start_again().unwrap();
    cluster.wait_until_whole().unwrap();
    cluster.wait_until_in_sync(&name).unwrap();
    for node in cluster.nodes() {
        let queue = node.queue_in("/", &name).unwrap().expect("each knows it");
        assert!(queue.durable);
        assert_eq!(node.version(), cluster.node(0).version());
    }
}
