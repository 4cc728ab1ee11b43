//! What the program says of itself.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::program::{Program, coney, run, run_in, run_unread, settings};
use crate::support::Broker;

const COMMANDS: [&[&str]; 19] = [
    &[],
    &["publish"],
    &["get"],
    &["listen"],
    &["queue", "declare"],
    &["queue", "delete"],
    &["queue", "purge"],
    &["queue", "list"],
    &["exchange", "declare"],
    &["exchange", "delete"],
    &["bind"],
    &["unbind"],
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
        run_unread(&["completions", shell]).failed(7, &["the reader of stdout has gone"]);
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

#[test]
fn what_is_mistyped_is_guessed() {
    for (arguments, meant) in [(&["pubish"][..], "'publish'"), (&["get", "q", "--jsonlines"], "'--json-lines'")] {
        let ran = run(arguments);
        assert!(ran.code == Some(2) && ran.stderr.contains(meant), "{ran:?}");
    }
}

/// What it writes on a terminal, with this in the environment.
fn on_a_terminal(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let open = || File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let mut command = coney();
    command
        .args(arguments)
        .env("TERM", "xterm")
        .env_remove("NO_COLOR")
        .env_remove("CI")
        .envs(environment.iter().copied());
    let mut program = Program::spawn(command.stdin(Stdio::null()).stdout(open()).stderr(open()));
    // It keeps the other end otherwise.
    drop(command);
    let mut written = Vec::new();
    // The end of a terminal is an error.
    let _ = File::from(terminal).read_to_end(&mut written);
    program.wait();
    String::from_utf8(written).unwrap()
}

#[test]
fn colours_are_for_terminals_whose_user_wants_them() {
    let url = Broker::Embedded.url();
    let doctor = ["doctor", "--url", &url];
    let failure = ["get", "no such queue", "--url", &url];
    for (arguments, colour) in [(&doctor[..], "\x1b[32mok"), (&failure, "\x1b[31mconey:"), (&["--help"], "\x1b[")] {
        assert!(on_a_terminal(arguments, &[]).contains(colour), "{arguments:?}");
        for environment in [("NO_COLOR", "1"), ("TERM", "dumb")] {
            let written = on_a_terminal(arguments, &[environment]);
            assert!(!written.contains('\x1b') && !written.is_empty(), "{environment:?}: {written:?}");
        }
        let ran = run(arguments);
        assert!(!ran.stdout.contains(&0x1b) && !ran.stderr.contains('\x1b'), "{ran:?}");
    }
}

const ALONE: &str = "coney: memory:// is a broker of this process alone; for two programs: `coney broker`";

#[test]
fn a_broker_that_nobody_else_sees_is_told() {
    let directory = settings("[broker]\nurl = \"memory://\"\n[[topology.queues]]\nname = \"q\"\n");
    for arguments in [
        &["publish", "", "q", "hello"][..],
        &["publish", "", "q"],
        &["get", "q"],
        &["listen", "q"],
        &["dead", "list", "q"],
        &["dead", "replay", "q"],
        &["dead", "drop", "q", "--yes"],
        &["topology", "plan"],
        &["topology", "apply"],
        &["queue", "declare", "q"],
        &["queue", "delete", "q"],
        &["queue", "purge", "q"],
        &["queue", "list"],
        &["exchange", "declare", "e", "topic"],
        &["exchange", "delete", "e"],
        &["bind", "q", "amq.topic", "k"],
        &["unbind", "q", "amq.topic", "k"],
    ] {
        let ran = run_in(directory.path(), arguments);
        assert!(ran.stderr.starts_with(ALONE), "{arguments:?}: {ran:?}");
    }
    for arguments in [&["doctor"][..], &["bench", "--count", "1"], &["completions", "bash"]] {
        let ran = run_in(directory.path(), arguments).well();
        assert!(!ran.stderr.contains(ALONE), "{arguments:?}: {ran:?}");
    }
}

#[test]
fn a_listener_that_nobody_can_publish_to_says_so() {
    let mut command = coney();
    command.args(["listen", "--exchange", "amq.fanout", "--url", "memory://"]).stdout(Stdio::null());
    let mut program = Program::spawn(command.stderr(Stdio::piped()));
    let mut line = String::new();
    BufReader::new(program.0.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with(ALONE), "{line}");
    program.signal(Signal::INT);
    assert_eq!(program.wait().code(), Some(0));
}
