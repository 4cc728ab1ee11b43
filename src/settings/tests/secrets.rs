//! A password put in every place there is, right and wrong, comes out of none.

use std::error::Error as _;

use super::*;

const PASSWORD: &str = "hunter2";

/// Display, Debug and sources of whatever comes of it.
fn everything_said(loader: Loader) -> String {
    let mut said = format!("{loader:?} {loader:#?}");
    match loader.load() {
        Ok(settings) => {
            said.push_str(&format!("{settings:?} {settings:#?} {}", settings.pools["publish"].broker.masked_url()))
        }
        Err(error) => {
            said.push_str(&format!("{error} {error:?} {error:#?}"));
            let mut source = error.source();
            while let Some(error) = source {
                said.push_str(&format!("{error} {error:?}"));
                source = error.source();
            }
        }
    }
    said
}

#[test]
fn no_text_gives_a_password_away() {
    let texts = [
        // Where it belongs.
        "[broker]\nurl = 'amqp://u:hunter2@h/v'",
        "[broker]\npassword = 'hunter2'",
        "[pools.audit]\nurl = 'amqp://u:hunter2@h'\nsize = 0",
        "[profiles.test.broker]\npassword = 'hunter2'\nheartbeat = 0",
        // URLs with a mistake in them.
        "[broker]\nurl = 'amqps://u:hunter2@h'",
        "[broker]\nurl = 'u:hunter2@h'",
        "[broker]\nurl = 'amqp://u:hunter2@h:x'",
        "[broker]\nurl = 'amqp://u:1/hunter2@h'",
        "[broker]\nurl = 'amqp://u:1?hunter2@h'",
        "[broker]\nurl = 'amqp://u:1#hunter2@h'",
        "[broker]\nurl = 'amqp://u:hunter2%@h'",
        "[broker]\nurl = 'amqp://u:hunter2%ff@h'",
        "[broker]\nurl = 'amqp://u:hunter2@h/a/b'",
        "[broker]\nurl = 'amqp://u:hunter2@h?x=1'",
        "[profiles.test.broker]\nurl = 'amqp://u:hunter2@h:0'",
        // In other places and of other types.
        "[broker]\nurl = ['amqp://u:hunter2@h']",
        "[broker]\nurl = { hunter2 = 1 }",
        "[broker]\npassword = ['hunter2']",
        "[broker]\nuser = ['hunter2']",
        "[broker]\nhosts = ['u:hunter2@h:1', 'amqp://u:hunter2@h', 'hunter2:x', 'hunter2 ']",
        "[broker]\nhosts = 'amqp://u:hunter2@h'",
        "[broker]\nheartbeat = 'hunter2'",
        "[broker]\nheartbeat = '1hunter2'",
        "[broker]\ntls = 'hunter2'",
        "[pools.publish]\nsize = 'hunter2'\nmandatory = 'hunter2'",
        "broker = 'amqp://u:hunter2@h'",
        "[broker]\n'amqp://u:hunter2@h' = 1",
        "'u:hunter2@h' = 1",
        "[pools.'amqp://u:hunter2@h']\nsize = 0",
        "[profiles.'amqp://u:hunter2@h'.broker]\nuser = 1",
        "[[topology.exchanges]]\nname = 'e'\nkind = 'hunter2'",
        "[[topology.bindings]]\nexchange = 'amqp://u:hunter2@h'\nqueue = 'amqp://u:hunter2@h'",
        "[[topology.queues]]\nname = 'u:hunter2@h'\n[[topology.queues]]\nname = 'u:hunter2@h'\nx = 1",
        // On a line that is not TOML.
        "[broker]\nurl = amqp://u:hunter2@h",
        "[broker]\nurl = 'amqp://u:hunter2@h",
        "[broker]\npassword = hunter2",
        "[broker]\npassword = 'hunter2' x",
        "[broker]\npassword = \"hunter2\\q\"",
        "[broker]\npassword 'hunter2'",
        "[broker]\nhunter2",
        "[broker]\npassword = 'a'\npassword = 'hunter2'",
        "[broker]\npassword = 1979-05-27hunter2",
        "[broker]\npassword = 0hunter2",
        "[broker]\npassword = '''hunter2",
        "[broker]\npassword = 'hunter2'\nsize = 99999999999999999999",
        "[broker\npassword = 'hunter2'",
        "[broker]\r\npassword = hunter2\r\n",
        "broker.hunter2.x = 1\nbroker.hunter2 = 1\n",
    ];
    for text in texts {
        for profile in [false, true] {
            let loader = Settings::loader().text(text);
            let said = everything_said(if profile { loader.profile("test") } else { loader });
            assert!(!said.contains(PASSWORD), "{text}\n{said}");
        }
    }
}

#[test]
fn passwords_that_are_numbers_are_no_better() {
    for text in ["[broker]\npassword = 48151623", "[broker]\nurl = 48151623", "[broker]\nuser = 48151623.5"] {
        let said = everything_said(Settings::loader().text(text));
        assert!(!said.contains("48151623"), "{text}\n{said}");
    }
}

#[test]
fn variables_do_not_give_a_password_away() {
    let names = [
        "CONEY_PROFILE",
        "CONEY_BROKER__URL",
        "CONEY_BROKER__PASSWORD",
        "CONEY_BROKER__HOSTS",
        "CONEY_BROKER__TLS",
        "CONEY_BROKER__HEARTBEAT",
        "CONEY_BROKER__PASWORD",
        "CONEY_BROKER__PASSWORD__X",
        "CONEY_POOLS__AUDIT__URL",
        "CONEY_POOLS__PUBLISH__SIZE",
        "CONEY_POOLS__PUBLISH__MANDATORY",
        "CONEY_BROKER",
        "CONEY_LOG",
    ];
    let values = ["amqp://u:hunter2@h", "amqp://u:hunter2@h:x", "u:hunter2@h:1,b"];
    for name in names {
        for value in values {
            let said = everything_said(Settings::loader().environment([(name, value)]));
            assert!(!said.contains(PASSWORD), "{name}={value}\n{said}");
        }
    }
    assert!(!format!("{:?}", Settings::from_url("amqp://u:hunter2@h:x").unwrap_err()).contains(PASSWORD));
    assert!(!format!("{:?}", Settings::from_url("amqp://u:hunter2@h").unwrap()).contains(PASSWORD));
}
