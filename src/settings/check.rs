//! What values may be: the rules for settings read from a file and for those made in code.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::{AppSettings, BrokerSettings, PoolSettings, Problem, Settings, SettingsError};
use crate::pace::{Concurrency, MOST_THREADS, PauseOnFailures, check_rate};
use crate::topology::{Mistake, QueueType, Topology};

pub(super) const SIZE: RangeInclusive<i64> = 1..=1000;
pub(super) const MAX_IN_FLIGHT: RangeInclusive<i64> = 1..=i64::MAX;
/// `basic.qos` carries it as a 16-bit number, in which 0 would mean no limit (AMQP 0-9-1, `basic.qos`).
pub(super) const PREFETCH: RangeInclusive<i64> = 1..=65_535;
/// Messages; the largest number is that of 32 bits.
pub(super) const FAILURES_MIN: RangeInclusive<i64> = 1..=4_294_967_295;
pub(super) const MAX_ATTEMPTS: RangeInclusive<i64> = 1..=1000;
/// In bytes; RabbitMQ takes no larger limit (<https://www.rabbitmq.com/docs/configure>, `max_message_size`).
pub(super) const MAX_MESSAGE_SIZE: RangeInclusive<i64> = 1..=536_870_912;
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// Negotiated in seconds as a 16-bit number, in which 0 would mean none (AMQP 0-9-1, `connection.tune`).
const HEARTBEAT_SECONDS: RangeInclusive<u64> = 1..=65_535;
/// A short string on the wire, whose length is one octet (AMQP 0-9-1, section 4.2.5.3).
const MAX_VHOST: usize = 255;

/// What a whole number within a range is called in a mistake.
pub(super) fn expected_number(range: &RangeInclusive<i64>) -> String {
    match *range.end() {
        i64::MAX => format!("expected a whole number of at least {}", range.start()),
        end => format!("expected a whole number from {} to {end}", range.start()),
    }
}

pub(super) fn number(number: i64, range: &RangeInclusive<i64>) -> Result<(), String> {
    if range.contains(&number) { Ok(()) } else { Err(format!("{}, got {number}", expected_number(range))) }
}

pub(super) fn duration(duration: Duration) -> Result<(), String> {
    if duration.is_zero() || duration > LONGEST {
        return Err(format!("expected more than zero and at most 1 day, got {}", humantime::format_duration(duration)));
    }
    Ok(())
}

pub(super) fn heartbeat(heartbeat: Duration) -> Result<(), String> {
    if heartbeat.subsec_nanos() != 0 || !HEARTBEAT_SECONDS.contains(&heartbeat.as_secs()) {
        return Err(format!(
            "expected whole seconds from 1s to 65535s, got {}; heartbeats cannot be switched off, because a call on \
             a connection gone silent would never end",
            humantime::format_duration(heartbeat)
        ));
    }
    Ok(())
}

pub(super) fn waiting_queue_type(queue_type: QueueType) -> Result<(), String> {
    match queue_type {
        QueueType::Classic | QueueType::Quorum => Ok(()),
        QueueType::Stream => Err("expected \"classic\" or \"quorum\"".to_owned()),
    }
}

fn concurrency(concurrency: &Concurrency) -> Result<(), String> {
    concurrency.check()?;
    if concurrency.most() > MOST_THREADS { Err(Concurrency::EXPECTED.to_owned()) } else { Ok(()) }
}

pub(super) fn credential(text: &str) -> Result<(), String> {
    // SASL PLAIN puts a NUL between user and password (RFC 4616).
    if text.contains('\0') { Err("a NUL character cannot be sent".to_owned()) } else { Ok(()) }
}

pub(super) fn vhost(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_VHOST {
        return Err(format!(
            "expected a virtual host of 1 to {MAX_VHOST} bytes, got {}; the default one is \"/\"",
            name.len()
        ));
    }
    Ok(())
}

impl Settings {
    /// Checks every value against its range and the topology as a whole, as reading a file does. For settings that
    /// were changed in code.
    ///
    /// # Errors
    ///
    /// Every mistake, under the key that the value has in a file.
    pub fn check(&self) -> Result<(), SettingsError> {
        let mut problems = Vec::new();
        self.app.check(&mut problems);
        if let Some(outbox) = &self.outbox {
            collect("outbox", outbox.check(), &mut problems);
        }
        for (name, pool) in &self.pools {
            pool.check(&super::reader::child("pools", name), &mut problems);
        }
        problems.extend(topology_problems(&self.topology));
        into_result(problems)
    }
}

impl AppSettings {
    fn check(&self, problems: &mut Vec<Problem>) {
        let results = [
            ("shutdown_timeout", duration(self.shutdown_timeout)),
            ("wait_for_broker", self.wait_for_broker.map_or(Ok(()), duration)),
        ];
        collect("app", results, problems);
    }
}

impl PoolSettings {
    fn check(&self, key: &str, problems: &mut Vec<Problem>) {
        self.broker.check(key, problems);
        let results = [
            ("size", number(self.size.into(), &SIZE)),
            ("checkout_timeout", duration(self.checkout_timeout)),
            ("confirm_timeout", duration(self.confirm_timeout)),
            ("publish_timeout", duration(self.publish_timeout)),
            ("max_in_flight", number(i64::try_from(self.max_in_flight).unwrap_or(i64::MAX), &MAX_IN_FLIGHT)),
            ("prefetch", number(self.prefetch.into(), &PREFETCH)),
            ("retry_queue_type", self.retry_queue_type.map_or(Ok(()), waiting_queue_type)),
            ("delay_queue_type", waiting_queue_type(self.delay_queue_type)),
            ("concurrency", concurrency(&self.concurrency)),
            ("max_rate", self.max_rate.map_or(Ok(()), check_rate)),
        ];
        collect(key, results, problems);
        if let Some(Err((part, problem))) = self.pause_on_failures.as_ref().map(PauseOnFailures::check) {
            collect(&super::reader::child(key, "pause_on_failures"), [(part, Err(problem))], problems);
        }
    }
}

impl BrokerSettings {
    fn check(&self, key: &str, problems: &mut Vec<Problem>) {
        let hosts = if self.endpoints.is_empty() {
            Err("expected at least one host".to_owned())
        } else if self
            .endpoints
            .iter()
            .any(|endpoint| endpoint.host.is_empty() || endpoint.port == 0 && endpoint.memory_name().is_none())
        {
            Err("expected hosts that have a name and a port other than 0".to_owned())
        } else {
            Ok(())
        };
        let tls = match &self.tls {
            Some(_) if !cfg!(feature = "tls") => Err("TLS needs coney's cargo feature `tls`".to_owned()),
            Some(_) if self.endpoints.iter().any(|endpoint| endpoint.memory_name().is_some()) => {
                Err("an embedded broker has no TLS; expected none".to_owned())
            }
            Some(tls) => tls.problem().map_or(Ok(()), |(key, problem)| Err(format!("{key}: {problem}"))),
            None => Ok(()),
        };
        let results = [
            ("hosts", hosts),
            ("tls", tls),
            ("user", credential(&self.user)),
            ("password", credential(self.password.expose())),
            ("vhost", vhost(&self.vhost)),
            ("heartbeat", heartbeat(self.heartbeat)),
            ("connect_timeout", duration(self.connect_timeout)),
            ("operation_timeout", duration(self.operation_timeout)),
            ("max_message_size", number(i64::try_from(self.max_message_size).unwrap_or(i64::MAX), &MAX_MESSAGE_SIZE)),
        ];
        collect(key, results, problems);
    }
}

impl Topology {
    /// Checks names, kinds, and that every binding joins things that are there: declared in this topology, or one of
    /// the `amq.` exchanges.
    ///
    /// # Errors
    ///
    /// Every mistake, each under a key such as `topology.bindings[0].queue`.
    pub fn check(&self) -> Result<(), SettingsError> {
        into_result(topology_problems(self))
    }
}

fn topology_problems(topology: &Topology) -> Vec<Problem> {
    let as_problem = |Mistake { list, index, field, problem }: Mistake| {
        Problem::new(format!("topology.{}[{index}].{field}", list.as_str()), problem)
    };
    let mistakes = topology.entry_mistakes().into_iter().chain(topology.reference_mistakes());
    mistakes.map(as_problem).collect()
}

fn collect<const N: usize>(key: &str, results: [(&str, Result<(), String>); N], problems: &mut Vec<Problem>) {
    for (name, result) in results {
        problems.extend(result.err().map(|problem| Problem::new(super::reader::child(key, name), problem)));
    }
}

fn into_result(problems: Vec<Problem>) -> Result<(), SettingsError> {
    if problems.is_empty() { Ok(()) } else { Err(SettingsError::new(None, problems)) }
}
