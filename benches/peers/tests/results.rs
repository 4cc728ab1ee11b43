//! The benchmark runs, and its results have the form that programs read.
//!
//! Quickly, against the embedded broker: what is measured here is of no interest.

use std::fs;
use std::process::Command;

use serde_json::Value;

const BEGINNINGS: [&str; 8] =
    ["publish async", "publish batch", "publish sync", "publish pool", "consume", "get", "rpc", "checkout"];

#[test]
fn every_case_has_numbers_of_coney_and_ratios_to_its_peers() {
    let folder = tempfile::tempdir().unwrap();
    let (json, chart) = (folder.path().join("results.json"), folder.path().join("results.svg"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_coney-peers"));
    command.args(["--embedded", "--quick", "--json"]).arg(&json).arg("--chart").arg(&chart);
    let output = command.output().unwrap();
    let progress = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{progress}");
    assert!(progress.contains(": checkout"), "{progress}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("messages per second"));
    assert!(fs::read_to_string(chart).unwrap().starts_with("<svg"));

    let cases: Vec<Value> = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    let names: Vec<&str> = cases.iter().map(|case| case["case"].as_str().unwrap()).collect();
    for beginning in BEGINNINGS {
        assert!(names.iter().any(|name| name.starts_with(beginning)), "{beginning} is not in {names:?}");
    }
    for case in &cases {
        let name = &case["case"];
        assert_eq!(case["broker"], "embedded");
        assert!(case["coney"]["rate"].as_f64().is_some_and(|rate| rate > 0.0), "{name}: {case:#}");
        assert!(case["peers"]["lapin"]["rate"].as_f64().is_some_and(|rate| rate > 0.0), "{name}: {case:#}");
        let ratio = &case["ratios"]["lapin"];
        let [min, median, max] = ["min", "median", "max"].map(|key| ratio[key].as_f64().unwrap_or_default());
        assert!(0.0 < min && min <= median && median <= max, "{name}: {ratio}");
    }
}
