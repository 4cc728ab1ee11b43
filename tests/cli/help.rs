//! What the program says of itself.

use crate::program::{run, run_unread};
use crate::support::Broker;

const COMMANDS: [&[&str]; 11] = [
    &[],
    &["publish"],
    &["get"],
    &["listen"],
    &["topology", "plan"],
    &["topology", "apply"],
    &["dead", "list"],
    &["dead", "replay"],
    &["dead", "drop"],
    &["doctor"],
    &["bench"],
];

#[test]
fn every_command_shows_examples_its_settings_and_the_exit_codes() {
    for command in COMMANDS {
        let ran = run(&[command, &["--help"]].concat()).well();
        let example = ["  coney", command.first().unwrap_or(&"publish")].join(" ");
        for part in ["Examples:\n", &example, "CONEY_BROKER__PASSWORD", "Exit codes:\n  0  done"] {
            assert!(ran.text().contains(part), "{part:?} is not in the help of {command:?}");
        }
    }
}

#[test]
fn completions_are_there_for_every_shell() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let ran = run(&["completions", shell]).well();
        assert!(ran.text().contains("json-lines"), "{shell}");
        run_unread(&["completions", shell]).well();
    }
    assert_eq!(run(&["completions", "cmd"]).code, Some(2));
}

#[test]
fn the_broker_may_be_named_before_the_command_or_after_it() {
    let [there, elsewhere] = [Broker::Embedded.url(), "amqp://localhost:1".to_owned()];
    run(&["--url", &there, "doctor"]).well();
    run(&["--url", &elsewhere, "get", "q"]).failed(5, &["localhost:1/"]);
    run(&["--url", &elsewhere, "doctor", "--url", &there]).well();
    run(&["--config", "/no/such/file", "doctor", "--url", &there]).well();
    run(&["--url", &there, "topology", "plan", "--config", "/no/such/file"]).failed(1, &["/no/such/file"]);
    run(&["--config", "/no/such/file", "dead", "list", "q"]).failed(1, &["/no/such/file"]);
    run(&["--pool", "none", "get", "q", "--url", &there]).failed(1, &["no pool is named \"none\"", "--pool"]);
    run(&["--config", "f", "broker"]).failed(2, &["behind its name"]);
}
