//! Every kind of mistake, under its key, all of them at once.

use super::*;

/// Key and problem of each mistake in a text.
fn found(text: &str) -> Vec<(String, String)> {
    found_by(Settings::loader().text(text))
}

fn found_by(loader: Loader) -> Vec<(String, String)> {
    mistakes_of(loader).problems.into_iter().map(|problem| (problem.key, problem.problem)).collect()
}

/// One mistake, under `key`, whose text has `part` in it.
#[track_caller]
fn one(text: &str, key: &str, part: &str) {
    let found = found(text);
    assert!(found.len() == 1 && found[0].0 == key && found[0].1.contains(part), "{text}\n{found:#?}");
}

#[test]
fn values_of_the_wrong_type_or_out_of_range() {
    let table = [
        ("broker.user", "1", "expected text in quotes, got a number without quotes"),
        ("broker.password", "true", "expected text in quotes"),
        ("broker.vhost", "''", "expected a virtual host of 1 to 255 bytes, got 0"),
        ("broker.url", "1", "expected text in quotes"),
        ("broker.url", "'http://x'", "begins with amqp://"),
        ("broker.url", "'amqp://h:0'", "expected a port from 1 to 65535"),
        ("broker.url", "'amqp://h?heartbeat=0'", "expected seconds from 1 to 65535"),
        ("broker.url", "'amqp://h?verify=1'", "unknown parameter verify"),
        ("broker.tls", "'false'", "expected true or false, got text"),
        ("broker.tls", "1", "expected true, false or a table, got a number"),
        ("broker.tls.ca_file", "1", "expected text in quotes"),
        (
            "broker.tls.verify",
            "false",
            "expected one of ca_file, certificate_file, key_file, server_name, danger_accept",
        ),
        ("broker.tls.danger_accept_any_certificate", "'yes'", "expected true or false"),
        ("broker.hosts", "[]", "expected at least one host"),
        ("broker.hosts", "'a:1'", "expected a list such as"),
        ("broker.hosts[1]", "['a', 5]", "expected text in quotes"),
        ("broker.hosts[0]", "['a:99999']", "expected a port"),
        ("broker.hosts[0]", "['u:p@a']", "expected host or host:port and nothing else"),
        ("broker.heartbeat", "10", "expected a duration such as \"10s\" or \"1m 30s\", got a number without quotes"),
        ("broker.heartbeat", "'10'", "expected a duration such as \"10s\""),
        ("broker.heartbeat", "'0s'", "expected whole seconds from 1s to 65535s, got 0s"),
        ("broker.heartbeat", "'1500ms'", "expected whole seconds"),
        ("broker.heartbeat", "'65536s'", "expected whole seconds"),
        ("broker.connect_timeout", "'0s'", "expected more than zero and at most 1 day, got 0s"),
        ("broker.connect_timeout", "'24h 1ns'", "at most 1 day, got 1day 1ns"),
        ("broker.connect_timeout", "'5 parsecs'", "expected a duration"),
        ("broker.operation_timeout", "1.5", "got a number with a fraction"),
        ("pools.publish.size", "0", "expected a whole number from 1 to 1000, got 0"),
        ("pools.publish.size", "1001", "from 1 to 1000, got 1001"),
        ("pools.publish.size", "'4'", "expected a whole number from 1 to 1000, got text"),
        ("pools.publish.size", "4.0", "got a number with a fraction"),
        ("pools.publish.max_in_flight", "0", "expected a whole number of at least 1, got 0"),
        ("broker.max_message_size", "536870913", "expected a whole number from 1 to 536870912, got 536870913"),
        ("pools.publish.prefetch", "65536", "expected a whole number from 1 to 65535, got 65536"),
        ("pools.publish.prefetch", "-1", "got -1"),
        ("pools.publish.mandatory", "1", "expected true or false, got a number"),
        ("pools.listen.ack_batch", "'yes'", "expected true or false, got text"),
        ("pools.listen.retry", "'1s'", "expected a list of delays such as"),
        ("pools.listen.retry", "[]", "expected a list of delays such as"),
        ("pools.listen.retry", "['1s', 5]", "expected a list of delays such as"),
        ("pools.listen.retry", "['25h']", "each from 1 ms to a day"),
        ("pools.listen.max_attempts", "3", "expected retry beside it"),
        ("pools.listen.retry_queue_type", "'stream'", "expected \"classic\" or \"quorum\""),
        ("pools.publish.delay_queue_type", "'stream'", "expected \"classic\" or \"quorum\""),
        ("pools.publish.checkout_timeout", "[]", "got a list"),
        ("pools.publish.confirm_timeout", "{}", "got a table"),
        ("pools.audit.vhost", "''", "expected a virtual host"),
        ("pools.publish", "4", "expected a table, got a number"),
        ("broker", "'amqp://'", "expected a table, got text"),
        ("profiles", "1", "expected a table"),
        ("profiles.test", "1", "expected a table"),
        ("profiles.prod.broker.heartbeat", "'0s'", "expected whole seconds"),
        ("profiles.prod.pools.publish.size", "0", "from 1 to 1000"),
        ("topology", "[]", "expected a table, got a list"),
        ("topology.queues", "{}", "expected a list of tables, written [[topology.queues]], got a table"),
        ("topology.queues[0]", "['q']", "expected a table, got text"),
    ];
    for (key, value, part) in table {
        let path = key.split('[').next().unwrap();
        one(&format!("{path} = {value}"), key, part);
    }
    let long = format!("broker.vhost = '{}'", "v".repeat(256));
    one(&long, "broker.vhost", "got 256");
    one("broker.password = \"a\\u0000b\"", "broker.password", "NUL");
}

#[test]
fn an_outbox() {
    for (keys, key, part) in [
        ("", "store", "missing; expected \"sqlite:\" and the path of a file"),
        ("store = 'outbox.db'", "store", "expected \"sqlite:\""),
        ("store = 'sqlite:'", "store", "expected \"sqlite:\""),
        ("store = 'sqlite:x'\nmax_rows = 0", "max_rows", "expected a whole number of at least 1, got 0"),
        ("store = 'sqlite:x'\nmax_age = '0s'", "max_age", "expected more than zero"),
        ("store = 'sqlite:x'\nkeep = '1s'", "keep", "unknown key"),
    ] {
        one(&format!("[outbox]\n{keys}"), &format!("outbox.{key}"), part);
    }
    let environment = |name: &str, value: &str| Settings::loader().environment([(name.to_owned(), value.to_owned())]);
    let settings = environment("CONEY_OUTBOX__STORE", "sqlite:there.db").load().unwrap();
    assert_eq!(settings.outbox, Some(crate::OutboxSettings::new("sqlite:there.db")));
    let found = found_by(environment("CONEY_OUTBOX_STORE", "sqlite:there.db"));
    assert!(found[0].1.contains("did you mean CONEY_OUTBOX__STORE"), "{found:?}");
    assert_eq!(Settings::loader().load().unwrap().outbox, None);
}

#[test]
fn partitioned_queues() {
    let with = |keys: &str| format!("[[topology.partitioned]]\nname = 'orders'\n{keys}");
    for (keys, key, part) in [
        ("", "partitions", "missing; expected how many partitions there are"),
        ("partitions = 0", "partitions", "expected a whole number from 1 to 1024, got 0"),
        ("partitions = 1025", "partitions", "from 1 to 1024, got 1025"),
        ("partitions = 2\nhashed_by = 'me'", "hashed_by", "expected \"publisher\" or \"broker\""),
        ("partitions = 2\narguments = { x-queue-type = 'classic' }", "arguments", "x-queue-type cannot be another"),
        ("partitions = 2\non_conflict = 'no'", "on_conflict", "expected \"fail\""),
        ("partitions = 2\nsize = 2", "size", "unknown key"),
    ] {
        one(&with(keys), &format!("topology.partitioned[0].{key}"), part);
    }
    one("[[topology.partitioned]]\npartitions = 2", "topology.partitioned[0].name", "missing; expected the name");
    let twice = with("partitions = 2\n") + &with("partitions = 3");
    one(&twice, "topology.partitioned[1].name", "\"orders\" is declared above already");
    // What it is made of is told under its key.
    let taken = with("partitions = 2\n") + "[[topology.exchanges]]\nname = 'orders'\nkind = 'direct'";
    one(&taken, "topology.partitioned[0].name", "\"orders\" is declared above already");
}

#[test]
fn unknown_keys() {
    one(
        "[brokre]",
        "brokre",
        "unknown key; expected one of app, broker, pools, topology, outbox, profiles; did you mean broker?",
    );
    one("[broker]\nURL = ''", "broker.URL", "did you mean url?");
    one(
        "[broker]\nsize = 4",
        "broker.size",
        "expected one of url, hosts, user, password, password_file, auth, vhost, tls, heartbeat",
    );
    one("[pools.publish]\npre-fetch = 4", "pools.publish.pre-fetch", "did you mean prefetch?");
    one("[profiles.a.profiles.b]", "profiles.a.profiles", "expected one of app, broker, pools, topology");
    one("[[topology.queues]]\nname = 'q'\nttl = 1", "topology.queues[0].ttl", "unknown key");
    assert!(!found("[broker]\nzzz = 1")[0].1.contains("did you mean"));
}

#[test]
fn a_password_and_a_file_with_one_together() {
    let text = "password = 'x'\npassword_file = 'f'";
    one(&format!("[broker]\n{text}"), "broker.password_file", "expected password or password_file, not both");
    one("[broker]\npassword_file = ''", "broker.password_file", "expected the path of a file");
}

#[test]
fn url_and_hosts_together() {
    let text = "url = 'amqp://a'\nhosts = ['b']";
    one(&format!("[broker]\n{text}"), "broker.hosts", "expected url or hosts, not both");
    one(&format!("[pools.x]\n{text}"), "pools.x.hosts", "expected url or hosts, not both");
    one(&format!("[profiles.p.broker]\n{text}"), "profiles.p.broker.hosts", "expected url or hosts, not both");
    let variables = [("CONEY_BROKER__URL", "amqp://a"), ("CONEY_BROKER__HOSTS", "b")];
    let error = mistakes_of(Settings::loader().environment(variables));
    assert!(error.to_string().contains("broker.hosts (from CONEY_BROKER__HOSTS): url names a host"), "{error}");
}

#[test]
fn a_topology_that_does_not_hold_together() {
    let q = "[[topology.queues]]\nname = 'q'\n";
    let e = "[[topology.exchanges]]\nname = 'e'\nkind = 'fanout'\n";
    let b = "[[topology.bindings]]\n";
    let long = "n".repeat(256);
    let table = [
        (format!("{q}{q}"), "topology.queues[1].name", "\"q\" is declared above already"),
        (format!("{e}{e}"), "topology.exchanges[1].name", "\"e\" is declared above already"),
        (q.replace("'q'", "'amq.q'"), "topology.queues[0].name", "cannot be declared"),
        (q.replace("'q'", "''"), "topology.queues[0].name", "must not be empty"),
        (q.replace("name = 'q'", ""), "topology.queues[0].name", "missing; expected the name of the queue"),
        (q.replace("'q'", &format!("'{long}'")), "topology.queues[0].name", "expected at most 255 bytes, got 256"),
        (e.replace("'e'", &format!("'{long}'")), "topology.exchanges[0].name", "expected at most 255 bytes"),
        (e.replace("'e'", "'amq.direct'"), "topology.exchanges[0].name", "cannot be declared"),
        (e.replace("'e'", "''"), "topology.exchanges[0].name", "must not be empty"),
        (e.replace("fanout", "fan"), "topology.exchanges[0].kind", "expected \"direct\", \"fanout\""),
        (e.replace("fanout", "x-"), "topology.exchanges[0].kind", "begins with \"x-\""),
        (e.replace("kind = 'fanout'", ""), "topology.exchanges[0].kind", "missing; expected \"direct\""),
        (format!("{e}durable = 'yes'"), "topology.exchanges[0].durable", "expected true or false"),
        (format!("{q}arguments = 5"), "topology.queues[0].arguments", "expected a table"),
        (format!("{q}arguments = {{ '' = 5 }}"), "topology.queues[0].arguments", "names of 1 to 255 bytes"),
        (format!("{b}queue = 'q'\n{q}"), "topology.bindings[0].exchange", "missing"),
        (format!("{b}exchange = ''\nqueue = 'q'\n{q}"), "topology.bindings[0].exchange", "the default exchange"),
        (
            format!("{b}exchange = 'e'\ndestination_exchange = ''\n{e}"),
            "topology.bindings[0].destination_exchange",
            "default",
        ),
        (
            format!("{b}exchange = 'x'\nqueue = 'q'\n{q}"),
            "topology.bindings[0].exchange",
            "exchange \"x\" is not declared",
        ),
        (format!("{b}exchange = 'e'\nqueue = 'x'\n{e}"), "topology.bindings[0].queue", "queue \"x\" is not declared"),
        (format!("{b}exchange = 'e'\nqueue = ''\n{e}"), "topology.bindings[0].queue", "must not be empty"),
        (
            format!("{b}exchange = 'e'\ndestination_exchange = 'x'\n{e}"),
            "topology.bindings[0].destination_exchange",
            "exchange \"x\" is not declared",
        ),
        (format!("{b}exchange = 'e'\n{e}"), "topology.bindings[0]", "neither is"),
        (
            format!("{b}exchange = 'e'\nqueue = 'q'\ndestination_exchange = 'e'\n{e}{q}"),
            "topology.bindings[0]",
            "both are there",
        ),
        (
            format!("{b}exchange = 'e'\nqueue = 'q'\nrouting_key = '{long}'\n{e}{q}"),
            "topology.bindings[0].routing_key",
            "at most 255 bytes",
        ),
    ];
    for (text, key, part) in table {
        one(&text, key, part);
    }
}

/// Entries that cannot be read shift the positions of those behind them; the keys must not shift with them.
#[test]
fn positions_are_those_of_the_file() {
    let text = r#"
        [[topology.queues]]
        name = 5
        [[topology.queues]]
        name = "amq.x"
        [[topology.bindings]]
        exchange = "e"
        [[topology.bindings]]
        exchange = "amq.direct"
        queue = "gone"
    "#;
    let keys: Vec<String> = found(text).into_iter().map(|(key, _)| key).collect();
    let expected =
        ["topology.queues[0].name", "topology.bindings[0]", "topology.queues[1].name", "topology.bindings[1].queue"];
    assert_eq!(keys, expected);
}

#[test]
fn a_binding_of_a_profile_is_named_as_such() {
    let text = "[[profiles.p.topology.bindings]]\nexchange = 'amq.direct'\nqueue = 'gone'";
    toml(text);
    let found = found_by(Settings::loader().text(text).profile("p"));
    assert_eq!(found[0].0, "profiles.p.topology.bindings[0].queue");
}

#[test]
fn profiles_that_are_not_there() {
    let error = mistakes_of(Settings::loader().text("[profiles.b]\n[profiles.a]").profile("c"));
    assert_eq!(error.to_string(), "the settings have 1 mistake:\n  profile: no profile is named c; there are: a, b");
    let error = mistakes_of(Settings::loader().environment([("CONEY_PROFILE", "c")]));
    assert_eq!(
        error.to_string(),
        "the settings have 1 mistake:\n  profile (from CONEY_PROFILE): no profile is named c; there are none"
    );
}

#[test]
fn variables_are_named() {
    let error = mistakes_of(Settings::loader().text("[pools.a-b]\n[pools.A_B]").environment([
        ("CONEY_BROKER__HEARTBEAT", "10"),
        ("CONEY_BROKER__HOSTS", ""),
        ("CONEY_BROKER__TLS", "yes"),
        ("CONEY_BROKER__SIZE", "1"),
        ("CONEY_BROKER__URL__HOST", "1"),
        ("CONEY_POOLS__A_B__SIZE", "1"),
        ("CONEY_POOLS__LISTEN__PREFETCH", "99999999999999999999"),
        ("CONEY_POOLS__PUBLISH__SIZE", "0"),
        ("CONEY_POOLS__publish__SIZE", "1"),
        ("CONEY_PROFILES__TEST__BROKER__URL", "amqp://"),
        ("CONEY_POOLS__X__HOSTS", "a,b:0"),
        ("CONEY_BROKER_URL", "amqp://a"),
        ("Coney_Broker_Tls_Ca_File", "x"),
        ("CONEY_POOLS_MY_OWN_CHECKOUT_TIMEOUT", "1s"),
        ("CONEY_POOLS_PUBLISH__SIZE", "1"),
        ("CONEY_APP_SHUTDOWN_TIMEOUT", "1s"),
        // Not ours.
        ("CONEY_BROKER_KIND", "x"),
        ("CONEY_ISLAND", "x"),
    ]));
    let form = "expected a name of the form CONEY_APP__KEY, CONEY_BROKER__KEY, CONEY_OUTBOX__KEY or CONEY_POOLS__NAME__KEY, with two underscores";
    let expected = "the settings have 16 mistakes:\n  \
        CONEY_APP_SHUTDOWN_TIMEOUT: FORM; did you mean CONEY_APP__SHUTDOWN_TIMEOUT?\n  \
        CONEY_BROKER_URL: FORM; did you mean CONEY_BROKER__URL?\n  \
        CONEY_BROKER__URL__HOST: FORM\n  \
        CONEY_POOLS_MY_OWN_CHECKOUT_TIMEOUT: FORM; did you mean CONEY_POOLS__MY_OWN__CHECKOUT_TIMEOUT?\n  \
        CONEY_POOLS_PUBLISH__SIZE: FORM; did you mean CONEY_POOLS__PUBLISH__SIZE?\n  \
        CONEY_POOLS__A_B__SIZE: may mean any of the pools A_B, a-b\n  \
        CONEY_POOLS__publish__SIZE: sets the same key as CONEY_POOLS__PUBLISH__SIZE\n  \
        CONEY_PROFILES__TEST__BROKER__URL: FORM\n  \
        Coney_Broker_Tls_Ca_File: FORM; did you mean CONEY_BROKER__TLS__CA_FILE?\n  \
        broker.size (from CONEY_BROKER__SIZE): unknown key; expected one of url, hosts, user, password, password_file, auth, vhost, tls, \
        heartbeat, connect_timeout, operation_timeout, max_message_size\n  \
        broker.hosts (from CONEY_BROKER__HOSTS): expected at least one host\n  \
        broker.tls (from CONEY_BROKER__TLS): expected true or false\n  \
        broker.heartbeat (from CONEY_BROKER__HEARTBEAT): expected a duration such as \"10s\" or \"1m 30s\"\n  \
        pools.listen.prefetch (from CONEY_POOLS__LISTEN__PREFETCH): expected a whole number from 1 to 65535\n  \
        pools.publish.size (from CONEY_POOLS__PUBLISH__SIZE): expected a whole number from 1 to 1000, got 0\n  \
        pools.x.hosts[1] (from CONEY_POOLS__X__HOSTS): expected a port from 1 to 65535 behind the host";
    assert_eq!(error.to_string(), expected.replace("FORM", form));
}

/// A mistake that a later layer hides is still one.
#[test]
fn every_layer_is_checked() {
    let text = "[pools.publish]\nsize = 0\n[profiles.p.pools.publish]\nsize = 2000";
    let loader = Settings::loader().text(text).profile("p").environment([("CONEY_POOLS__PUBLISH__SIZE", "x")]);
    let found: Vec<String> = mistakes_of(loader).problems.into_iter().map(|problem| problem.to_string()).collect();
    assert_eq!(
        found,
        [
            "pools.publish.size: expected a whole number from 1 to 1000, got 0",
            "profiles.p.pools.publish.size: expected a whole number from 1 to 1000, got 2000",
            "pools.publish.size (from CONEY_POOLS__PUBLISH__SIZE): expected a whole number from 1 to 1000",
        ]
    );
}

#[test]
fn files_that_cannot_be_read() {
    let directory = std::env::temp_dir().join(format!("coney-settings-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let file = directory.join("app.toml");
    let shown = |loader: Loader| mistakes_of(loader).to_string();

    let missing = shown(Settings::loader().file(&file));
    assert!(missing.starts_with(&format!("{} has 1 mistake:\n  it cannot be read: ", file.display())), "{missing}");

    std::fs::write(&file, b"[broker]\nuser = '\xff'").unwrap();
    assert!(shown(Settings::loader().file(&file)).ends_with("app.toml has 1 mistake:\n  line 2: expected UTF-8"));

    std::fs::write(&file, b"\xef\xbb\xbf[pools.publish]\nsize = 0").unwrap();
    let error = mistakes_of(Settings::loader().file(&file));
    assert_eq!((error.file.as_deref(), &*error.problems[0].key), (Some(&*file), "pools.publish.size"));
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn texts_that_are_not_toml() {
    assert_eq!(found("[broker]\nuser = oops")[0].0, "line 2, column 8");
    assert!(found("[broker]\nuser = oops")[0].1.starts_with("string values must be quoted"));
    assert_eq!(found("[broker]\nuser = 'a'\n  user = 'b'"), [("line 3, column 3".into(), "duplicate key".into())]);
    let large = "[broker]\nuser = 'a'\n[pools.publish]\nsize = 99999999999999999999\nprefetch = 1";
    assert_eq!(found(large), [("line 4".into(), "expected a number of at most 64 bits".into())]);
    let mut deep = "a = ".to_owned();
    deep.push_str(&"[".repeat(10_000));
    assert_eq!(found(&deep).len(), 1);
}

#[test]
fn settings_and_topologies_made_in_code_are_checked_alike() {
    let mut settings = Settings::default();
    let pool = settings.pools.get_mut("publish").unwrap();
    pool.size = 0;
    pool.broker.endpoints.clear();
    pool.broker.heartbeat = Duration::from_millis(500);
    pool.broker.vhost.clear();
    settings.topology = Topology::new()
        .exchange(Exchange::new("e", ExchangeKind::Custom("fan".into())))
        .queue(Queue::server_named())
        .queue(Queue::new("q").argument("a".repeat(256), 1_i64))
        .bind(Binding::queue("").to("e"))
        .bind(Binding::queue("q"))
        .bind(Binding::exchange("f").to("e"));
    let error = settings.check().unwrap_err();
    let keys: Vec<&str> = error.problems.iter().map(|problem| problem.key.as_str()).collect();
    let expected = [
        "pools.publish.hosts",
        "pools.publish.vhost",
        "pools.publish.heartbeat",
        "pools.publish.size",
        "topology.exchanges[0].kind",
        "topology.queues[1].arguments",
        "topology.bindings[1].exchange",
        "topology.bindings[2].destination_exchange",
    ];
    assert_eq!(keys, expected);
    assert_eq!(settings.topology.check().unwrap_err().problems, error.problems[4..]);
    // Which of two nameless queues a binding means cannot be told.
    let two = Topology::new().queue(Queue::server_named()).queue(Queue::server_named());
    assert!(two.check().is_ok());
    assert!(two.bind(Binding::queue("").to("amq.fanout")).check().is_err());
}

#[cfg(feature = "tls")]
#[test]
fn tls_and_what_stands_beside_it_must_agree() {
    let opposite = "the url says the opposite";
    one("[broker]\nurl = 'amqp://h'\ntls = true", "broker.tls", opposite);
    one("[broker]\nurl = 'amqp://h'\ntls = { ca_file = 'x' }", "broker.tls", "expected amqps:// in it");
    one("[broker]\nurl = 'amqps://h'\ntls = false", "broker.tls", opposite);
    one("[broker]\nurl = 'amqps://h'\ntls = { key_file = 'x' }", "broker.tls.certificate_file", "beside key_file");
    one(
        "[broker]\nurl = 'amqps://h'\ntls = { certificate_file = 'x' }",
        "broker.tls.key_file",
        "the private key of it",
    );
    let variables = [("CONEY_BROKER__TLS", "true"), ("CONEY_BROKER__TLS__CA_FILE", "x")];
    let found = found_by(Settings::loader().environment(variables));
    assert!(found.len() == 1 && found[0].1.contains("as a whole by another variable"), "{found:?}");
    #[cfg(feature = "embedded")]
    one("[broker]\nurl = 'memory://'\ntls = true", "broker.tls", opposite);
}
