//! `coney bench`: that it measures, and leaves nothing.

use crate::contract;
use crate::program::run;
use crate::support::Broker;

contract!(a_bench_measures_and_leaves_nothing);

fn a_bench_measures_and_leaves_nothing(broker: Broker) {
    let ran = run(&["bench", "--count", "2000", "--size", "8", "--json", "--url", &broker.url()]).well();
    let result = &ran.json()[0];
    assert_eq!((result["messages"].as_u64(), result["bytes"].as_u64()), (Some(2000), Some(8)));
    for rate in ["published_per_second", "consumed_per_second"] {
        assert!(result[rate].as_f64().is_some_and(|rate| rate > 0.0), "{result}");
    }
    for latency in ["confirm_us", "delivery_us"] {
        let [p50, max] = ["p50", "max"].map(|name| result[latency][name].as_u64().expect("a time"));
        assert!(0 < p50 && p50 <= max, "{result}");
    }
}

#[test]
fn the_embedded_broker_is_measured_by_its_name() {
    let ran = run(&["bench", "--count", "100", "--url", "memory://bench"]).well();
    assert!(ran.lines()[0].starts_with("100 messages of 100 bytes"), "{ran:?}");
    assert_eq!(ran.lines().len(), 5, "{ran:?}");
}
