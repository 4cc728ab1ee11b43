//! The example, run as a newcomer runs it.

use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_coney-batch-insert")).args(arguments).output().unwrap()
}

#[test]
fn every_message_is_a_row_and_a_batch_has_many() {
    let output = run(&["--messages", "2000"]);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    let batches = stdout.strip_prefix("2000 rows in ").and_then(|rest| rest.strip_suffix(" batches\n"));
    let batches: u32 = batches.unwrap_or_else(|| panic!("{stdout}")).parse().unwrap();
    // Four full ones, or some more on a machine that stands still between messages.
    assert!((4..200).contains(&batches), "{stdout}");
}

#[test]
fn arguments_that_it_does_not_know_are_told() {
    for (arguments, told) in [
        (&["--messages", "0"][..], "--messages is \"0\", expected a whole number from 1 to"),
        (&["--rows", "7"], "got --rows 7, expected nothing or --messages N"),
    ] {
        let output = run(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(told), "{stderr}");
    }
}
