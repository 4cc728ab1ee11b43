//! What a settings file gives, layer by layer. Mistakes and secrets have files of their own.

use std::time::Duration;

use super::*;
use crate::error::Error;
use crate::field::FieldValue;
use crate::topology::{Binding, Exchange, ExchangeKind, Queue, QueueType};

mod merging;
mod mistakes;
mod reference;
mod secrets;

fn toml(text: &str) -> Settings {
    Settings::from_toml(text).unwrap_or_else(|error| panic!("{error}"))
}

fn load(loader: Loader) -> Settings {
    loader.load().unwrap_or_else(|error| panic!("{error}"))
}

fn mistakes_of(loader: Loader) -> SettingsError {
    match loader.load() {
        Err(Error::Settings(error)) => error,
        other => panic!("expected mistakes, got {other:?}"),
    }
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn nothing_written_is_the_default() {
    let settings = Settings::default();
    assert_eq!(toml(""), settings);
    assert_eq!(load(Settings::loader()), settings);
    assert_eq!(Settings::from_url("amqp://").unwrap(), settings);
    assert_eq!(settings.pools.keys().collect::<Vec<_>>(), ["listen", "publish"]);
    let pool = &settings.pools["publish"];
    assert_eq!(pool.broker.masked_url(), "amqp://guest:***@localhost:5672/%2f");
    assert_eq!(pool.broker.password.expose(), "guest");
    assert_eq!((pool.broker.heartbeat, pool.broker.connect_timeout), (secs(10), secs(5)));
    assert_eq!((pool.size, pool.mandatory, pool.max_in_flight, pool.prefetch), (4, true, 1000, 64));
    assert_eq!(settings.check(), Ok(()));
}

#[test]
fn the_shipped_file_loads_and_shows_the_defaults() {
    let text = include_str!("../../../app.toml");
    let settings = toml(text);
    // All but the broker is as it is without a file.
    let mut pools = Settings::default().pools;
    for pool in pools.values_mut() {
        pool.broker.endpoints = vec![Endpoint::memory("default")];
    }
    assert_eq!(settings.pools, pools);
    let rabbitmq = load(Settings::loader().text(text).profile("rabbitmq"));
    assert_eq!(rabbitmq.pools, Settings::default().pools);
    let topology = Topology::new()
        .exchange(Exchange::direct("unit_test_room"))
        .queue(Queue::new("listener1"))
        .queue(Queue::new("listener2"))
        .bind(Binding::queue("listener1").to("unit_test_room").routing_key("user1"))
        .bind(Binding::queue("listener2").to("unit_test_room").routing_key("user2"));
    assert_eq!(settings.topology, topology);
    let test = load(Settings::loader().text(text).profile("test"));
    assert_eq!((test.pools["publish"].size, test.pools["listen"].size), (1, 4));
    // As a program does it: by path.
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/app.toml");
    assert_eq!(load(Settings::loader().file(path)), settings);
}

#[test]
fn every_key_is_read() {
    let settings = toml(
        r#"
        [broker]
        hosts = ["a:1", "[::1]"]
        user = "u"
        password = "p"
        vhost = "v/w"
        tls = false
        heartbeat = "1m 5s"
        connect_timeout = "250ms"
        operation_timeout = "1day"
        max_message_size = 4096
        [pools.publish]
        size = 1000
        checkout_timeout = "1s"
        confirm_timeout = "2s"
        publish_timeout = "3s"
        mandatory = false
        max_in_flight = 0x1
        prefetch = +65_535
        retry = ["1ms", "1s 500ms", "1day"]
        max_attempts = 1000
        retry_queue_type = "quorum"
        delay_queue_type = "quorum"
        ack_batch = false
        [pools.listen]
        retry = ["1m"]
        "#,
    );
    let pool = &settings.pools["publish"];
    let broker = &pool.broker;
    assert_eq!(broker.masked_url(), "amqp://u:***@a:1,[::1]:5672/v%2fw");
    assert_eq!(broker.password.expose(), "p");
    assert_eq!((broker.heartbeat, broker.connect_timeout), (secs(65), Duration::from_millis(250)));
    assert_eq!(broker.operation_timeout, secs(86_400));
    assert_eq!(broker.max_message_size, 4096);
    assert_eq!((pool.size, pool.max_in_flight, pool.prefetch, pool.mandatory), (1000, 1, 65_535, false));
    assert_eq!((pool.checkout_timeout, pool.confirm_timeout, pool.publish_timeout), (secs(1), secs(2), secs(3)));
    let retry = pool.retry.as_ref().unwrap();
    assert_eq!(retry.delays(), [Duration::from_millis(1), Duration::from_millis(1500), secs(86_400)]);
    assert_eq!((retry.max_attempts(), pool.ack_batch), (1000, false));
    assert_eq!((pool.retry_queue_type, pool.delay_queue_type), (Some(QueueType::Quorum), QueueType::Quorum));
    let listen = &settings.pools["listen"];
    assert_eq!(listen.broker, *broker);
    assert_eq!((listen.size, listen.ack_batch, listen.retry_queue_type), (4, true, None));
    assert_eq!(listen.delay_queue_type, QueueType::Classic);
    assert_eq!(listen.retry.as_ref().map(RetryPolicy::max_attempts), Some(2));
}

#[test]
fn a_pool_inherits_the_broker_but_for_what_it_says() {
    let settings = toml(
        r#"
        [broker]
        url = "amqp://u:p@a:1/v?heartbeat=20&connection_timeout=700"
        password = "q"
        operation_timeout = "1s"
        [pools.publish]
        user = "w"
        hosts = ["b:2", "c:3"]
        heartbeat = "30s"
        [pools.audit]
        url = "amqp://d?heartbeat=40"
        vhost = "x"
        "#,
    );
    let broker = |pool: &str| settings.pools[pool].broker.clone();
    let shown = |pool| (broker(pool).masked_url(), broker(pool).password.expose().to_owned(), broker(pool).heartbeat);
    assert_eq!(shown("listen"), ("amqp://u:***@a:1/v".into(), "q".into(), secs(20)));
    assert_eq!(shown("publish"), ("amqp://w:***@b:2,c:3/v".into(), "q".into(), secs(30)));
    // No password goes along to another server.
    assert_eq!(shown("audit"), ("amqp://guest:***@d:5672/x".into(), "guest".into(), secs(40)));
    for pool in ["listen", "publish", "audit"] {
        assert_eq!(broker(pool).operation_timeout, secs(1));
        assert_eq!(broker(pool).connect_timeout, Duration::from_millis(700));
    }
}

#[test]
fn file_then_profile_then_environment() {
    let loader = Settings::loader().text(
        r#"
        [pools.publish]
        size = 1
        prefetch = 1
        max_in_flight = 1
        [profiles.test.pools.publish]
        prefetch = 2
        max_in_flight = 2
        [profiles.other.pools.publish]
        prefetch = 9
        "#,
    );
    let seen = |loader: Loader| {
        let pool = load(loader).pools["publish"].clone();
        (pool.size, pool.prefetch, pool.max_in_flight)
    };
    let variables = [("CONEY_PROFILE", "test"), ("CONEY_POOLS__PUBLISH__MAX_IN_FLIGHT", "3")];
    assert_eq!(seen(loader.clone()), (1, 1, 1));
    assert_eq!(seen(loader.clone().profile("test")), (1, 2, 2));
    assert_eq!(seen(loader.clone().environment(variables)), (1, 2, 3));
    assert_eq!(seen(loader.clone().environment(variables).profile("other")), (1, 9, 3));
    assert_eq!(seen(loader.clone().environment(variables).no_profile()), (1, 1, 3));
    assert_eq!(seen(loader.clone().environment([("CONEY_PROFILE", "")])), (1, 1, 1));
}

#[test]
fn url_and_hosts_in_different_layers() {
    let broker = |text: &str, variables: &[(&str, &str)]| {
        let loader = Settings::loader().text(text).profile("p").environment(variables.iter().copied());
        let broker = load(loader).pools["publish"].broker.clone();
        format!("{} {}", broker.masked_url(), broker.password.expose())
    };
    // The later of the two has the say over the host; what the URL says of the rest stays.
    let file_url = "[broker]\nurl = 'amqp://u:p@a/v'\n[profiles.p.broker]\n";
    assert_eq!(broker(&format!("{file_url}hosts = ['b', 'c:1']"), &[]), "amqp://u:***@b:5672,c:1/v p");
    assert_eq!(broker(file_url, &[("CONEY_BROKER__HOSTS", "b, c:1")]), "amqp://u:***@b:5672,c:1/v p");
    let file_hosts = "[broker]\nhosts = ['b']\nuser = 'u'\npassword = 'p'\nvhost = 'v'\n[profiles.p.broker]\n";
    assert_eq!(broker(&format!("{file_hosts}url = 'amqp://x:y@a/z'"), &[]), "amqp://x:***@a:5672/z y");
    assert_eq!(broker(file_hosts, &[("CONEY_BROKER__URL", "amqp://x:y@a/z")]), "amqp://x:***@a:5672/z y");
    // What the later URL leaves out is still said by the keys beside it.
    assert_eq!(broker(file_hosts, &[("CONEY_BROKER__URL", "amqp://a")]), "amqp://u:***@a:5672/v p");
    // A secret that comes alone.
    assert_eq!(broker(file_url, &[("CONEY_BROKER__PASSWORD", "s")]), "amqp://u:***@a:5672/v s");
    // Of keys within one layer, those beside the URL win.
    let both = [("CONEY_BROKER__URL", "amqp://x:y@a?heartbeat=3"), ("CONEY_BROKER__PASSWORD", "s")];
    assert_eq!(broker(file_url, &both), "amqp://x:***@a:5672/%2f s");
}

#[test]
fn an_earlier_heartbeat_gives_way_to_that_of_a_later_url() {
    let loader = Settings::loader().text("[broker]\nheartbeat = '1s'\nconnect_timeout = '1s'");
    let loader = loader.environment([("CONEY_BROKER__URL", "amqp://a?heartbeat=2")]);
    let broker = load(loader).pools["publish"].broker.clone();
    assert_eq!((broker.heartbeat, broker.connect_timeout), (secs(2), secs(1)));
}

#[test]
fn variables_are_read_as_the_type_of_their_key() {
    let settings = load(Settings::loader().environment([
        ("CONEY_BROKER__USER", "42"),
        ("CONEY_BROKER__PASSWORD", "007"),
        ("CONEY_BROKER__VHOST", "true"),
        ("CONEY_BROKER__TLS", "false"),
        ("CONEY_BROKER__HEARTBEAT", "30s"),
        ("CONEY_POOLS__PUBLISH__SIZE", "7"),
        ("CONEY_POOLS__PUBLISH__MANDATORY", "false"),
        ("CONEY_POOLS__NEW_ONE__PREFETCH", "8"),
        ("coney_app__shutdown_timeout", "5s"),
        ("CONEY_APP__WAIT_FOR_BROKER", "1m\n"),
        // None of ours.
        ("CONEY_LOG", "debug"),
        ("CONEY_", "x"),
        ("PATH__X", "x"),
    ]));
    assert_eq!((settings.app.shutdown_timeout, settings.app.wait_for_broker), (secs(5), Some(secs(60))));
    let pool = &settings.pools["publish"];
    assert_eq!((&*pool.broker.user, pool.broker.password.expose(), &*pool.broker.vhost), ("42", "007", "true"));
    assert_eq!((pool.broker.heartbeat, pool.size, pool.mandatory), (secs(30), 7, false));
    assert_eq!(settings.pools["new_one"].prefetch, 8);
}

#[test]
fn case_does_not_count_and_a_line_break_at_the_end_is_left_out() {
    let text = "[profiles.test.broker]\nvhost = 'v'";
    let variables = [
        ("coney_broker__user", "u\n"),
        ("Coney_Broker__Password", "p\r\n"),
        ("coney_profile", "test\n"),
        ("CONEY_BROKER__URL", "amqp://host\n"),
    ];
    let broker = load(Settings::loader().text(text).environment(variables)).pools["publish"].broker.clone();
    assert_eq!((&*broker.user, broker.password.expose(), &*broker.vhost), ("u", "p", "v"));
    assert_eq!(broker.endpoints[0].host, "host");
}

#[test]
fn a_password_is_where_the_last_layer_says() {
    let file_of = |text: &str, variables: &[(&'static str, &'static str)], pool: &str| {
        let loader = Settings::loader().text(text).profile("p").environment(variables.iter().copied());
        let broker = load(loader).pools[pool].broker.clone();
        (broker.password_file, broker.password.expose().to_owned())
    };
    let path = |name: &str| Some(PathBuf::from(name));
    let profile = "\n[profiles.p.broker]\n";
    let file = "[broker]\npassword_file = 'f'\n";
    assert_eq!(file_of(&format!("{file}{profile}"), &[], "listen").0, path("f"), "pools inherit it");
    assert_eq!(file_of(&format!("{file}{profile}password = 'p'"), &[], "publish"), (None, "p".into()));
    assert_eq!(
        file_of(&format!("[broker]\npassword = 'p'\n{profile}password_file = 'f'"), &[], "publish").0,
        path("f")
    );
    assert_eq!(file_of(&format!("{file}{profile}"), &[("CONEY_BROKER__PASSWORD", "v")], "publish"), (None, "v".into()));
    let of_variable = [("CONEY_BROKER__PASSWORD_FILE", "/run/secrets/x\n")];
    assert_eq!(file_of(&format!("{file}{profile}password = 'p'"), &of_variable, "publish").0, path("/run/secrets/x"));
    let url = "url = 'amqp://u:in-url@h'\n";
    assert_eq!(
        file_of(&format!("{file}{url}{profile}"), &[], "publish").0,
        path("f"),
        "a key beside a url counts for more"
    );
    let later = [("CONEY_BROKER__URL", "amqp://u:in-url@h")];
    assert_eq!(file_of(&format!("{file}{profile}"), &later, "publish"), (None, "in-url".into()));
    let other = format!("{file}[pools.other]\nurl = 'amqp://other'{profile}");
    assert_eq!(file_of(&other, &[], "other"), (None, "guest".into()), "it is not sent to another server");
    let own = format!("{file}[pools.other]\npassword = 'own'{profile}");
    assert_eq!(file_of(&own, &[], "other"), (None, "own".into()));
}

#[test]
fn names_keep_their_case_dots_and_hyphens() {
    let text = r#"
        [pools.Audit-Log]
        size = 1
        ["pools"."eu.orders[1]"]
        size = 2
        [pools.""]
        size = 3
    "#;
    let error = mistakes_of(Settings::loader().text(text));
    assert_eq!(error.problems, [Problem::new("pools.\"\"", "expected a pool name that is not empty")]);
    let text = &text[..text.find("[pools.\"\"]").unwrap()];
    let variables = [("CONEY_POOLS__AUDIT_LOG__SIZE", "5"), ("CONEY_POOLS__EU_ORDERS_1___SIZE", "6")];
    let settings = load(Settings::loader().text(text).environment([variables[0]]));
    let sizes: Vec<_> = settings.pools.iter().map(|(name, pool)| (name.as_str(), pool.size)).collect();
    assert_eq!(sizes, [("Audit-Log", 5), ("eu.orders[1]", 2), ("listen", 4), ("publish", 4)]);
    // A key at the top with a dot in it is not two keys.
    let error = mistakes_of(Settings::loader().text("\"broker.user\" = 'x'\n'a[99999999999]' = 1"));
    let keys: Vec<_> = error.problems.iter().map(|problem| problem.key.as_str()).collect();
    assert_eq!(keys, ["\"a[99999999999]\"", "\"broker.user\""]);
}

#[test]
fn topology_is_read_in_full() {
    let settings = toml(
        r#"
        [[topology.exchanges]]
        name = "e"
        kind = "x-consistent-hash"
        durable = false
        auto_delete = true
        internal = true
        arguments = { alternate-exchange = "f", nested = { list = [1, "two", 2.5, false] } }
        [[topology.exchanges]]
        name = "f"
        kind = "headers"
        [[topology.queues]]
        name = "q"
        durable = false
        exclusive = true
        auto_delete = true
        arguments = { x-message-ttl = 1000 }
        [[topology.bindings]]
        exchange = "f"
        destination_exchange = "e"
        arguments = { x-match = "all" }
        [[topology.bindings]]
        exchange = "amq.topic"
        queue = "q"
        routing_key = "a.*"
        "#,
    );
    let list = vec![1_i64.into(), "two".into(), FieldValue::F64(2.5), false.into()];
    let nested = crate::field::FieldTable::from([("list".to_owned(), FieldValue::Array(list))]);
    let hash = Exchange::new("e", ExchangeKind::Custom("x-consistent-hash".into()))
        .durable(false)
        .auto_delete(true)
        .internal(true)
        .alternate_exchange("f")
        .argument("nested", nested);
    let topology = Topology::new()
        .exchange(hash)
        .exchange(Exchange::headers("f"))
        .queue(Queue::new("q").durable(false).exclusive(true).auto_delete(true).message_ttl(secs(1)))
        .bind(Binding::exchange("e").to("f").argument("x-match", "all"))
        .bind(Binding::queue("q").to("amq.topic").routing_key("a.*"));
    assert_eq!(settings.topology, topology);
}

#[test]
fn a_profile_may_refer_to_the_file() {
    let text = r#"
        [[topology.queues]]
        name = "q"
        [[profiles.test.topology.bindings]]
        exchange = "amq.direct"
        queue = "q"
    "#;
    assert_eq!(toml(text).topology.bindings, []);
    let topology = load(Settings::loader().text(text).profile("test")).topology;
    assert_eq!(topology.bindings, [Binding::queue("q").to("amq.direct")]);
    assert_eq!(topology.queues, [Queue::new("q")]);
}

#[test]
fn types_cross_threads() {
    fn is<T: Send + Sync + Clone + std::fmt::Debug + 'static>() {}
    is::<Settings>();
    is::<Loader>();
    is::<SettingsError>();
    is::<Topology>();
    is::<AmqpUrl>();
}

#[cfg(feature = "tls")]
#[test]
fn tls_comes_from_the_url_or_from_a_key_and_brings_its_port() {
    let tls = |settings: &Settings, pool: &str| settings.pools[pool].broker.tls.clone();
    let url = |settings: &Settings, pool: &str| settings.pools[pool].broker.masked_url();

    let settings = toml("[broker]\nurl = 'amqps://u:p@h'");
    assert_eq!(tls(&settings, "publish"), Some(TlsSettings::default()));
    assert_eq!(url(&settings, "publish"), "amqps://u:***@h:5671/%2f");

    let settings = toml("[broker]\nhosts = ['a', 'b:1']\ntls = true");
    assert_eq!(url(&settings, "listen"), "amqps://guest:***@a:5671,b:1/%2f");

    let text = "
        [broker]
        url = 'amqps://h'
        [broker.tls]
        ca_file = 'ca.pem'
        certificate_file = 'c.pem'
        key_file = 'c.key'
        server_name = 'rabbit.example'
        [pools.plain]
        url = 'amqp://elsewhere'
        [pools.other]
        url = 'amqps://elsewhere'
        [pools.same]
        hosts = ['h2']
        [pools.off]
        hosts = ['h3']
        tls = false
    ";
    let settings = toml(text);
    let given = tls(&settings, "same").expect("inherited");
    assert_eq!(given, tls(&settings, "publish").unwrap());
    assert_eq!((given.ca_file, given.server_name.as_deref()), (Some("ca.pem".into()), Some("rabbit.example")));
    assert!(!given.danger_accept_any_certificate);
    assert_eq!(url(&settings, "same"), "amqps://guest:***@h2:5671/%2f");
    assert_eq!((tls(&settings, "plain"), tls(&settings, "off")), (None, None));
    assert_eq!(url(&settings, "off"), "amqp://guest:***@h3:5672/%2f");
    // Its authorities go with it, the name of the other server does not.
    let other = tls(&settings, "other").unwrap();
    assert_eq!((other.ca_file, other.server_name), (Some("ca.pem".into()), None));

    let loader = Settings::loader().text("[broker]\nurl = 'amqps://h'\ntls = { ca_file = 'a', server_name = 's' }");
    let variables = [("CONEY_BROKER__TLS__CA_FILE", "b"), ("CONEY_POOLS__LISTEN__TLS__SERVER_NAME", "t")];
    let settings = load(loader.environment(variables));
    let given = tls(&settings, "publish").unwrap();
    assert_eq!((given.ca_file, given.server_name.as_deref()), (Some("b".into()), Some("s")));
    assert_eq!(tls(&settings, "listen").unwrap().server_name.as_deref(), Some("t"));

    // Who has no TLS at hand says so in a variable.
    let loader = Settings::loader().text(text).environment([("CONEY_BROKER__URL", "amqp://localhost")]);
    assert_eq!(tls(&load(loader), "publish"), None);
}

#[test]
fn how_listeners_are_paced_is_read_in_any_of_its_forms() {
    let pool = |text: &str| load(Settings::loader().text(format!("[pools.listen]\n{text}"))).pools["listen"].clone();
    assert_eq!(pool("").concurrency, Concurrency::from(1));
    assert_eq!(pool("concurrency = 4").concurrency, Concurrency::from(4));
    assert_eq!(pool("concurrency = \"1-8\"").concurrency, Concurrency::from(1..=8));
    assert_eq!(
        (pool("").max_rate, pool("max_rate = 100").max_rate, pool("max_rate = 0.5").max_rate),
        (None, Some(100.0), Some(0.5))
    );
    let default = PauseOnFailures::default();
    assert_eq!(pool("pause_on_failures = true").pause_on_failures, Some(default));
    assert_eq!(pool("pause_on_failures = false").pause_on_failures, None);
    assert_eq!(pool("pause_on_failures = {}").pause_on_failures, Some(default));
    let said = pool("pause_on_failures = { min = 5, ratio = 1, pause = \"1h\" }").pause_on_failures.unwrap();
    let expected = PauseOnFailures::new(5, 1.0, default.within(), Duration::from_secs(3600)).unwrap();
    assert_eq!(said, expected);

    let variables = [
        ("CONEY_POOLS__LISTEN__CONCURRENCY", "2-3"),
        ("CONEY_POOLS__LISTEN__MAX_RATE", "12.5"),
        ("CONEY_POOLS__LISTEN__PAUSE_ON_FAILURES__RATIO", "0.75"),
    ];
    let text = "[pools.listen.pause_on_failures]\nmin = 7";
    let pool = load(Settings::loader().text(text).environment(variables)).pools["listen"].clone();
    assert_eq!((pool.concurrency, pool.max_rate), (Concurrency::from(2..=3), Some(12.5)));
    let said = pool.pause_on_failures.unwrap();
    assert_eq!((said.min(), said.ratio()), (7, 0.75));
}

#[test]
fn what_cannot_be_a_pace_is_a_mistake_at_its_key() {
    let text = |line: &str| format!("[pools.listen]\n{line}");
    for (line, expected) in [
        ("concurrency = 0", "pools.listen.concurrency: expected a number of threads or a range"),
        ("concurrency = \"8-1\"", "pools.listen.concurrency: expected a number of threads or a range"),
        ("concurrency = 1.5", "pools.listen.concurrency: expected a number of threads or a range"),
        ("max_rate = 0", "pools.listen.max_rate: expected messages per second"),
        ("max_rate = \"fast\"", "pools.listen.max_rate: expected a number such as 100 or 0.5"),
        ("pause_on_failures = 5", "pools.listen.pause_on_failures: expected true, false or a table"),
        ("pause_on_failures = { ratio = 2 }", "pools.listen.pause_on_failures.ratio: expected a number above 0"),
        ("pause_on_failures = { min = 0 }", "pools.listen.pause_on_failures.min: expected a whole number from 1"),
        ("pause_on_failures = { pause = \"0s\" }", "pools.listen.pause_on_failures.pause: expected more than zero"),
        ("pause_on_failures = { times = 3 }", "pools.listen.pause_on_failures.times: unknown key"),
    ] {
        let error = Settings::from_toml(&text(line)).unwrap_err().to_string();
        assert!(error.contains(expected), "{line}: {error}");
    }
    let error = Settings::loader().environment([("CONEY_POOLS_LISTEN_PAUSE_ON_FAILURES_MIN", "3")]).load().unwrap_err();
    assert!(error.to_string().contains("did you mean CONEY_POOLS__LISTEN__PAUSE_ON_FAILURES__MIN?"), "{error}");

    let mut settings = Settings::default();
    let pool = settings.pools.get_mut("listen").unwrap();
    pool.concurrency = Concurrency::from(2000);
    pool.max_rate = Some(-1.0);
    let error = settings.check().unwrap_err().to_string();
    assert!(error.contains("pools.listen.concurrency") && error.contains("pools.listen.max_rate"), "{error}");
}
