//! URLs that are right, wrong, and not to be shown.

use super::*;

fn parse(text: &str) -> AmqpUrl {
    AmqpUrl::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn parts(text: &str) -> (String, u16, String, String, String) {
    let url = parse(text);
    let own = str::to_owned;
    (own(url.host()), url.port(), own(url.user()), own(url.password().expose()), own(url.vhost()))
}

#[test]
fn defaults() {
    for text in ["amqp://", "amqp:///", "amqp://localhost", "amqp://guest:guest@localhost:5672/%2f", "AMQP:///%2F"] {
        let url = parse(text);
        assert_eq!(url.to_string(), "amqp://guest:***@localhost:5672/%2f", "{text}");
        assert_eq!(parts(text).3, "guest");
        assert_eq!((url.heartbeat(), url.connect_timeout()), (None, None));
    }
}

/// The examples of appendix A of RabbitMQ's URI specification, but for the empty virtual host.
#[test]
fn examples_of_the_specification() {
    let table = [
        ("amqp://user:pass@host:10000/vhost", ("host", 10000, "user", "pass", "vhost")),
        ("amqp://user%61:%61pass@ho%61st:10000/v%2fhost", ("hoast", 10000, "usera", "apass", "v/host")),
        ("amqp://:@/", ("localhost", 5672, "", "", "/")),
        ("amqp://user@", ("localhost", 5672, "user", "guest", "/")),
        ("amqp://user:pass@", ("localhost", 5672, "user", "pass", "/")),
        ("amqp://host", ("host", 5672, "guest", "guest", "/")),
        ("amqp://:10000", ("localhost", 10000, "guest", "guest", "/")),
        ("amqp:///vhost", ("localhost", 5672, "guest", "guest", "vhost")),
        ("amqp://host/", ("host", 5672, "guest", "guest", "/")),
        ("amqp://host/%2f", ("host", 5672, "guest", "guest", "/")),
        ("amqp://[::1]", ("::1", 5672, "guest", "guest", "/")),
    ];
    for (text, (host, port, user, password, vhost)) in table {
        let (h, p, u, pw, v) = parts(text);
        assert_eq!((&*h, p, &*u, &*pw, &*v), (host, port, user, password, vhost), "{text}");
    }
}

#[test]
#[cfg(feature = "embedded")]
fn embedded_brokers_have_a_name_and_no_port() {
    let url = parse("memory://");
    assert_eq!((url.endpoint().memory_name(), url.port(), url.vhost()), (Some("default"), 0, "/"));
    assert_eq!(url.to_string(), "memory://default/%2f");
    let url = parse("memory://u:hunter2@a-b_1.~/v?heartbeat=5");
    assert_eq!((url.endpoint().memory_name(), url.user(), url.vhost()), (Some("a-b_1.~"), "u", "v"));
    assert_eq!(url.to_string(), "memory://a-b_1.~/v?heartbeat=5");
    assert_eq!(AmqpUrl::parse("memory://a:1").unwrap_err(), UrlError::MemoryName);
    assert_eq!(AmqpUrl::parse("memory://[::1]").unwrap_err(), UrlError::MemoryName);
    assert_eq!(Endpoint::new("a", 1).memory_name(), None);
}

#[test]
fn decodes_every_part() {
    let (_, _, user, password, vhost) = parts("amqp://j%c3%bcrg:p%40s%3a%2f%25%23%3F@h/caf%C3%A9%2fx");
    assert_eq!((&*user, &*password, &*vhost), ("jürg", "p@s:/%#?", "café/x"));
}

#[test]
fn shown_urls_read_back_and_mask() {
    let url = parse("amqp://j%c3%bcrg:hunter2@[fe80::1%25eth0]:1/a%2fb?connection_timeout=1500&heartbeat=7");
    assert_eq!(url.to_string(), "amqp://j%c3%bcrg:***@[fe80::1%25eth0]:1/a%2fb?heartbeat=7&connection_timeout=1500");
    assert_eq!(url.host(), "fe80::1%eth0");
    assert_eq!(parse(&url.to_string()).to_string(), url.to_string());
    assert!(!format!("{url:?} {url:#?}").contains("hunter2"));
    assert_eq!(url.heartbeat(), Some(Duration::from_secs(7)));
    assert_eq!(url.connect_timeout(), Some(Duration::from_millis(1500)));
    assert_eq!(format!("{:?}", parse("amqp://")), "AmqpUrl(amqp://guest:***@localhost:5672/%2f)");
    let only_one = parse("amqp://h?connection_timeout=5");
    assert_eq!(only_one.to_string(), "amqp://guest:***@h:5672/%2f?connection_timeout=5");
}

#[test]
fn mistakes_are_named_and_never_quoted() {
    use UrlError::*;
    let long_vhost = format!("amqp://u:hunter2@h/{}", "v".repeat(256));
    let table = [
        ("", Scheme),
        ("hunter2", Scheme),
        ("amqp:u:hunter2@h", Scheme),
        ("u:hunter2@h:5672", Scheme),
        ("http://u:hunter2@h", Scheme),
        ("amqpss://u:hunter2@h", Scheme),
        (" amqp://u:hunter2@h", Scheme),
        ("amqp://u:hunter2@h ", Blank),
        ("amqp://u:hun\tter2@h", Blank),
        ("amqp://u:hunter2#x@h", Fragment),
        ("amqp://u:hunter2/x@h", At),
        ("amqp://u:1/hunter2@h", At),
        ("amqp://u:1?hunter2@h", At),
        ("amqp://u:x@hunter2@h", At),
        ("amqp://u:hunter2@h/a@b", At),
        ("amqp://u:hunter2/h", Port),
        ("amqp://u:hunter2@h:0", Port),
        ("amqp://u:hunter2@h:65536", Port),
        ("amqp://u:hunter2@h:+1", Port),
        ("amqp://u:hunter2@h:", Port),
        ("amqp://u:hunter2@[::1]x", Port),
        ("amqp://u:hunter2@::1", Port),
        ("amqp://u:hunter2@[::g]", Host),
        ("amqp://u:hunter2@[::1%25]", Host),
        ("amqp://u:hunter2@h]", Host),
        ("amqp://u:hunter2@[h", Host),
        ("amqp://u:hunter2@a,b", Host),
        ("amqp://u:hunter2@%20", Host),
        ("amqp://u:hunter2%@h", Escape { part: "password" }),
        ("amqp://%zz:hunter2@h", Escape { part: "user" }),
        ("amqp://u:hunter2@h/%f", Escape { part: "virtual host" }),
        ("amqp://u:hunter2@h?a=%", Escape { part: "query" }),
        ("amqp://u:hunter2%ff@h", NotUtf8 { part: "password" }),
        ("amqp://u:hunter2@%ff", NotUtf8 { part: "host" }),
        ("amqp://u:hunter2%00@h", Nul { part: "password" }),
        ("amqp://u:hunter2@h/a/b", Path),
        ("amqp://u:hunter2@h/a/", Path),
        (&long_vhost, LongVhost),
        ("amqp://u:hunter2@h?verify=none", UnknownParameter { name: "verify".into() }),
        ("amqp://h?hunter2%20", UnknownParameter { name: "(not shown)".into() }),
        ("amqp://u:hunter2@h?heartbeat=1&heartbeat=2", RepeatedParameter { name: "heartbeat" }),
        ("amqp://u:hunter2@h?heartbeat=0", Heartbeat),
        ("amqp://u:hunter2@h?heartbeat=65536", Heartbeat),
        ("amqp://u:hunter2@h?heartbeat", Heartbeat),
        ("amqp://u:hunter2@h?heartbeat=10s", Heartbeat),
        ("amqp://u:hunter2@h?connection_timeout=0", ConnectionTimeout),
        ("amqp://u:hunter2@h?connection_timeout=86400001", ConnectionTimeout),
    ];
    for (text, expected) in table {
        let error = AmqpUrl::parse(text).expect_err(text);
        assert_eq!(error, expected, "{text}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{text}: {error:?}");
    }
}

#[test]
fn endpoints() {
    let table = [("a:1", "a", 1), ("a", "a", 5672), ("10.0.0.1:5", "10.0.0.1", 5), ("[::1]:65535", "::1", 65535)];
    for (text, host, port) in table {
        let endpoint: Endpoint = text.parse().unwrap();
        assert_eq!(endpoint, Endpoint::new(host, port), "{text}");
        assert_eq!(endpoint.to_string().parse::<Endpoint>().unwrap(), endpoint);
    }
    assert_eq!(Endpoint::new("::1", 5672).to_string(), "[::1]:5672");
    for text in ["", ":1", "a:", "a:0", "a:x", "::1", "a b", "[::1", "u:hunter2@a:1", "amqp://a", "a/hunter2"] {
        let error = text.parse::<Endpoint>().expect_err(text);
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{text}: {error:?}");
    }
}

#[test]
fn secrets_do_not_show() {
    let secret = Secret::from("hunter2");
    assert_eq!((format!("{secret:?} {secret:#?}"), secret.expose()), ("*** ***".to_owned(), "hunter2"));
}
