//! `coney outbox`: what waits and what was refused is shown, and refused messages are tried again or dropped.

use std::path::Path;

use coney::outbox::Outbox;
use coney::{App, Queue, Settings};

use crate::program::{run, run_in};
use crate::support::{unique, wait_until};

/// An outbox in this directory with three refused messages and one that waits.
fn with_refused(directory: &Path, nowhere: &str) -> Outbox {
    let outbox = Outbox::sqlite(directory.join("shop.db")).unwrap();
    ["one", "two", "three"].iter().for_each(|text| outbox.publish("", nowhere, *text).unwrap());
    let app = App::from_settings(Settings::from_url("memory://cli-outbox").unwrap()).unwrap();
    outbox.forward(&app).unwrap();
    wait_until("all are refused", || outbox.status().unwrap().refused == 3);
    app.shutdown(std::time::Duration::from_secs(10)).unwrap();
    outbox.publish("", nowhere, "waiting").unwrap();
    outbox
}

#[test]
fn an_outbox_is_looked_at_and_decided_on() {
    let (directory, nowhere) = (tempfile::tempdir().unwrap(), unique("nowhere"));
    let outbox = with_refused(directory.path(), &nowhere);
    std::fs::write(directory.path().join("app.toml"), "[outbox]\nstore = \"sqlite:shop.db\"").unwrap();
    let coney = |arguments: &[&str]| run_in(directory.path(), &[&["outbox"], arguments].concat());

    let ran = coney(&["status"]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert!(ran.text().starts_with("1 message pending (7 bytes), the oldest for"), "{ran:?}");
    assert!(ran.text().trim_end().ends_with("; 3 refused"), "{ran:?}");
    let status: serde_json::Value = serde_json::from_str(coney(&["status", "--json"]).text()).unwrap();
    assert_eq!((&status["pending"], &status["refused"], &status["bytes"]), (&1.into(), &3.into(), &7.into()));

    let listed = coney(&["list"]).well();
    assert_eq!(listed.text().lines().filter(|line| line.contains("NO_ROUTE")).count(), 3, "{listed:?}");
    let lines = coney(&["list", "--json-lines", "--count", "1"]).well();
    let first: serde_json::Value = serde_json::from_str(lines.text()).unwrap();
    assert_eq!((&first["body"], &first["routing_key"]), (&"one".into(), &nowhere.as_str().into()));
    let pending: serde_json::Value =
        serde_json::from_str(coney(&["list", "--pending", "--json-lines"]).well().text()).unwrap();
    assert_eq!((&pending["body"], &pending["reason"]), (&"waiting".into(), &serde_json::Value::Null));

    let id = first["id"].to_string();
    assert_eq!(coney(&["drop", &id]).well().text(), "dropped 1 message\n");
    coney(&["drop", &id]).failed(1, &["1 id with no such refused message"]);
    assert_eq!(outbox.status().unwrap().refused, 2);
    coney(&["drop", "--all"]).failed(2, &["Drop 2 messages", "--yes"]);
    assert_eq!(coney(&["retry", "--all"]).well().text(), "2 messages to be forwarded once more\n");
    let status = outbox.status().unwrap();
    assert_eq!((status.pending, status.refused), (3, 0));
    assert_eq!(coney(&["drop", "--all", "--yes"]).well().text(), "dropped 0 messages\n");

    // What was refused may go now.
    let app = App::from_settings(Settings::from_url("memory://cli-outbox-again").unwrap()).unwrap();
    app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&nowhere)).unwrap();
    outbox.forward(&app).unwrap();
    wait_until("it is empty", || outbox.status().unwrap().pending == 0);
    assert!(coney(&["status"]).well().text().starts_with("0 messages pending"));
}

#[test]
fn what_is_no_outbox_is_told() {
    let directory = tempfile::tempdir().unwrap();
    run_in(directory.path(), &["outbox", "status"]).failed(2, &["no outbox is in the settings", "--store sqlite:PATH"]);
    run(&["outbox", "status", "--store", "shop.db"]).failed(2, &["--store: expected sqlite:PATH"]);
    let missing = format!("sqlite:{}", directory.path().join("missing.db").display());
    run(&["outbox", "status", "--store", &missing]).failed(1, &["there is no file"]);
    let file = directory.path().join("text.db");
    std::fs::write(&file, "no database, and long enough for the first page of one ".repeat(20)).unwrap();
    run(&["outbox", "status", "--store", &format!("sqlite:{}", file.display())]).failed(1, &["damaged, or none"]);
}
