//! What in a topology RabbitMQ 4 has given up, or is about to (<https://www.rabbitmq.com/docs/deprecated-features>).

use coney::{FieldValue, Queue, Topology};

/// Arguments of queues that were, and what is there instead.
const ARGUMENTS: [(&str, &str); 5] = [
    ("x-ha-policy", "mirrored queues are gone; quorum queues are replicated"),
    ("x-queue-master-locator", "x-queue-leader-locator is its name now"),
    ("x-queue-mode", "every classic queue keeps its messages on disk since RabbitMQ 3.12"),
    ("x-max-in-memory-length", "quorum queues keep their messages on disk since RabbitMQ 3.10"),
    ("x-max-in-memory-bytes", "quorum queues keep their messages on disk since RabbitMQ 3.10"),
];

/// The hints about a topology on a broker of this version, a sentence each.
pub fn in_topology(topology: &Topology, version: Option<&str>) -> Vec<String> {
    let mut said: Vec<String> = topology.queues.iter().flat_map(in_queue).collect();
    let classic = topology.queues.iter().filter(|queue| is_mirrorable(queue)).count();
    if classic > 0 {
        let major = version.and_then(|version| version.split('.').next()?.parse::<u32>().ok());
        let when = match major {
            Some(..=3) => "in RabbitMQ 4 policies ha-… mirror nothing any more",
            _ => "policies ha-… mirror nothing since RabbitMQ 4",
        };
        let queues = if classic == 1 { "1 queue is".to_owned() } else { format!("{classic} queues are") };
        said.push(format!(
            "{queues} classic, on one node: {when} (rabbitmqctl list_policies); quorum queues are replicated"
        ));
    }
    said
}

fn in_queue(queue: &Queue) -> Vec<String> {
    let name = &queue.name;
    let mut said = Vec::new();
    if !queue.durable && !queue.exclusive {
        said.push(format!(
            "queue {name}: is neither durable nor exclusive, which RabbitMQ 4 deprecates and may forbid; expected one of them"
        ));
    }
    for (argument, instead) in ARGUMENTS.iter().filter(|(argument, _)| queue.arguments.contains_key(*argument)) {
        said.push(format!("queue {name}: {argument} means nothing to RabbitMQ 4: {instead}"));
    }
    said
}

/// Whether a policy could have it mirrored: durable, shared, and classic as far as its declaration says.
fn is_mirrorable(queue: &Queue) -> bool {
    let kind = queue.arguments.get("x-queue-type").and_then(FieldValue::as_str);
    queue.durable && !queue.exclusive && matches!(kind, None | Some("classic"))
}
