//! `[app]`, `[broker]` and `[pools.NAME]`: which keys they have, and how a pool comes by its broker.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use config::{Value, ValueKind};

use super::reader::{Given, Layer, Reader, Section, child, item, kind, origin, sorted, text};
use super::tls::{self, Said};
use super::{
    AppSettings, AuthMechanism, BrokerSettings, LISTEN_POOL, PUBLISH_POOL, PoolSettings, check, pace, password_file,
};
use crate::outcome::RetryPolicy;
use crate::pace::{Concurrency, PauseOnFailures};
use crate::topology::QueueType;
use crate::url::{AmqpUrl, Endpoint, Secret, default_port, host_and_port};

pub(super) const APP_KEYS: [&str; 2] = ["shutdown_timeout", "wait_for_broker"];
pub(super) const BROKER_KEYS: [&str; 12] = [
    "url",
    "hosts",
    "user",
    "password",
    "password_file",
    "auth",
    "vhost",
    "tls",
    "heartbeat",
    "connect_timeout",
    "operation_timeout",
    "max_message_size",
];
pub(super) const POOL_KEYS: [&str; 15] = [
    "size",
    "checkout_timeout",
    "confirm_timeout",
    "publish_timeout",
    "mandatory",
    "max_in_flight",
    "prefetch",
    "retry",
    "max_attempts",
    "retry_queue_type",
    "delay_queue_type",
    "ack_batch",
    "concurrency",
    "max_rate",
    "pause_on_failures",
];

/// A name or an address, and the port if one is said.
type Host = (String, Option<u16>);

/// What `[app]` says.
#[derive(Debug, Default)]
pub(super) struct AppSection {
    shutdown_timeout: Option<Given<Duration>>,
    wait_for_broker: Option<Given<Duration>>,
}

impl AppSection {
    pub(super) fn read(reader: &mut Reader, value: &Value, key: String) -> AppSection {
        let Some(section) = reader.section(value, key, &APP_KEYS) else { return AppSection::default() };
        AppSection {
            shutdown_timeout: reader.duration(&section, "shutdown_timeout", check::duration),
            wait_for_broker: reader.duration(&section, "wait_for_broker", check::duration),
        }
    }

    pub(super) fn over(&self, default: AppSettings) -> AppSettings {
        let value = |given: &Option<Given<Duration>>| given.as_ref().map(|given| given.value);
        AppSettings {
            shutdown_timeout: value(&self.shutdown_timeout).unwrap_or(default.shutdown_timeout),
            wait_for_broker: value(&self.wait_for_broker).or(default.wait_for_broker),
        }
    }
}

/// What one section says about a broker. What it does not say, it inherits.
#[derive(Debug, Default)]
pub(super) struct BrokerSection {
    url: Option<Given<AmqpUrl>>,
    hosts: Option<Given<Vec<Host>>>,
    tls: Option<Given<Said>>,
    user: Option<Given<String>>,
    password: Option<Given<Secret>>,
    password_file: Option<Given<PathBuf>>,
    auth: Option<Given<AuthMechanism>>,
    vhost: Option<Given<String>>,
    heartbeat: Option<Given<Duration>>,
    connect_timeout: Option<Given<Duration>>,
    operation_timeout: Option<Given<Duration>>,
    max_message_size: Option<u64>,
}

impl BrokerSection {
    pub(super) fn read(reader: &mut Reader, value: &Value, key: String) -> BrokerSection {
        match reader.section(value, key, &BROKER_KEYS) {
            Some(section) => BrokerSection::read_keys(reader, &section),
            None => BrokerSection::default(),
        }
    }

    fn read_keys(reader: &mut Reader, section: &Section<'_>) -> BrokerSection {
        let url = reader.read(section, "url", |value| AmqpUrl::parse(text(value)?).map_err(|error| error.to_string()));
        let hosts = read_hosts(reader, section);
        if let (Some(url), Some(hosts), Some(value)) = (&url, &hosts, section.value("hosts"))
            && url.layer == hosts.layer
        {
            reader.mistake_in(
                value,
                section.key_of("hosts"),
                "url names a host already; expected url or hosts, not both",
            );
        }
        let tls = Said::read(reader, section);
        if let (Some(url), Some(tls), Some(value)) = (&url, &tls, section.value("tls"))
            && tls.layer >= url.layer
            && let Some(problem) = tls.value.contradicts(&url.value)
        {
            reader.mistake_in(value, section.key_of("tls"), problem);
        }
        let password = reader.read(section, "password", |value| credential(value).map(Secret::new));
        let password_file = reader.read(section, "password_file", |value| match text(value)? {
            "" => Err("expected the path of a file".to_owned()),
            path => Ok(PathBuf::from(path)),
        });
        if let (Some(password), Some(file), Some(value)) = (&password, &password_file, section.value("password_file"))
            && password.layer == file.layer
        {
            let problem = "password is there too; expected password or password_file, not both";
            reader.mistake_in(value, section.key_of("password_file"), problem);
        }
        BrokerSection {
            url,
            hosts,
            tls,
            user: reader.read(section, "user", |value| credential(value).map(str::to_owned)),
            password,
            password_file,
            auth: reader.read(section, "auth", |value| AuthMechanism::parse(text(value)?)),
            vhost: reader.read(section, "vhost", |value| {
                let vhost = text(value)?;
                check::vhost(vhost).map(|()| vhost.to_owned())
            }),
            heartbeat: reader.duration(section, "heartbeat", check::heartbeat),
            connect_timeout: reader.duration(section, "connect_timeout", check::duration),
            operation_timeout: reader.duration(section, "operation_timeout", check::duration),
            max_message_size: reader.number(section, "max_message_size", check::MAX_MESSAGE_SIZE),
        }
    }

    /// What this section says, laid over what it inherits.
    ///
    /// A URL is about a server as a whole, so it replaces host, user, password and virtual host together, and no
    /// inherited password goes to another server. Keys of the same section that stand beside it count for more than
    /// it does, except where a later layer has written the URL and says the same thing in it.
    pub(super) fn over(&self, inherited: &BrokerSettings) -> BrokerSettings {
        let mut broker = inherited.clone();
        if let Some(Given { value: url, .. }) = &self.url {
            broker.endpoints = vec![url.endpoint().clone()];
            broker.user = url.user().to_owned();
            broker.password = url.password().clone();
            broker.vhost = url.vhost().to_owned();
            broker.auth = url.auth().unwrap_or(broker.auth);
            broker.heartbeat = url.heartbeat().unwrap_or(broker.heartbeat);
            broker.connect_timeout = url.connect_timeout().unwrap_or(broker.connect_timeout);
        }
        broker.tls = tls::over(inherited.tls.as_ref(), self.url.as_ref(), self.tls.as_ref());
        let hosts = self.hosts.as_ref().map(|Given { value: hosts, layer }| {
            let default = default_port(broker.tls.is_some());
            let value = hosts.iter().map(|(host, port)| Endpoint::new(host, port.unwrap_or(default))).collect();
            Given { value, layer: *layer }
        });
        let url = self.url.as_ref();
        let written = |part: fn(&AmqpUrl) -> bool| url.filter(|url| part(&url.value)).map(|url| url.layer);
        lay(&mut broker.endpoints, &hosts, written(|_| true));
        lay(&mut broker.user, &self.user, written(|url| url.written().user));
        lay(&mut broker.password, &self.password, written(|url| url.written().password));
        broker.password_file = password_file::over(
            inherited.password_file.as_deref(),
            url.map(|url| (url.layer, url.value.written().password)),
            self.password.as_ref().map(|password| password.layer),
            self.password_file.as_ref(),
        );
        lay(&mut broker.auth, &self.auth, written(|url| url.auth().is_some()));
        lay(&mut broker.vhost, &self.vhost, written(|url| url.written().vhost));
        lay(&mut broker.heartbeat, &self.heartbeat, written(|url| url.heartbeat().is_some()));
        lay(&mut broker.connect_timeout, &self.connect_timeout, written(|url| url.connect_timeout().is_some()));
        lay(&mut broker.operation_timeout, &self.operation_timeout, None);
        broker.max_message_size = self.max_message_size.unwrap_or(broker.max_message_size);
        broker
    }
}

/// Sets what a key of its own says, unless a later layer has said it in a URL.
fn lay<T: Clone>(slot: &mut T, key: &Option<Given<T>>, url: Option<Layer>) {
    if let Some(given) = key
        && url.is_none_or(|url| given.layer >= url)
    {
        slot.clone_from(&given.value);
    }
}

fn credential(value: &Value) -> Result<&str, String> {
    let text = text(value)?;
    check::credential(text).map(|()| text)
}

/// A list of delays in a file; in a variable, text with commas.
fn retry(value: &Value) -> Result<RetryPolicy, String> {
    const EXPECTED: &str = "expected a list of delays such as [\"1s\", \"10s\", \"1m\"], each from 1 ms to a day";
    let texts: Vec<&str> = match &value.kind {
        ValueKind::Array(delays) => {
            delays.iter().map(text).collect::<Result<_, _>>().map_err(|_| EXPECTED.to_owned())?
        }
        ValueKind::String(delays) if origin::variable(value).is_some() => delays.split(',').map(str::trim).collect(),
        other => return Err(format!("{EXPECTED}, got {}", kind(other))),
    };
    let delays: Result<Vec<Duration>, _> = texts.into_iter().map(humantime::parse_duration).collect();
    RetryPolicy::new(delays.map_err(|_| EXPECTED.to_owned())?).map_err(|_| EXPECTED.to_owned())
}

fn waiting_queue_type(value: &Value) -> Result<QueueType, String> {
    match text(value)?.parse() {
        Ok(known @ (QueueType::Classic | QueueType::Quorum)) => Ok(known),
        _ => Err("expected \"classic\" or \"quorum\"".to_owned()),
    }
}

/// A list in a file; in a variable, text with commas.
fn read_hosts(reader: &mut Reader, section: &Section<'_>) -> Option<Given<Vec<Host>>> {
    let value = section.value("hosts")?;
    let key = section.key_of("hosts");
    let hosts: Vec<Result<&str, String>> = match &value.kind {
        ValueKind::Array(hosts) => hosts.iter().map(text).collect(),
        ValueKind::String(hosts) if origin::variable(value).is_some() => {
            hosts.split(',').map(str::trim).filter(|_| !hosts.trim().is_empty()).map(Ok).collect()
        }
        other => {
            let problem = format!("expected a list such as [\"a:5672\", \"b:5672\"], got {}", kind(other));
            reader.mistake_in(value, key, problem);
            return None;
        }
    };
    if hosts.is_empty() {
        reader.mistake_in(value, key, "expected at least one host");
        return None;
    }
    let mut known = Vec::new();
    for (index, host) in hosts.iter().enumerate() {
        let host = host.clone().and_then(|host| host_and_port(host).map_err(|error| error.to_string()));
        match host {
            Ok(host) => known.push(host),
            Err(problem) => reader.mistake_in(value, item(&key, index), problem),
        }
    }
    (known.len() == hosts.len()).then(|| Given { value: known, layer: origin::layer(value) })
}

/// What one section says about a pool.
#[derive(Debug, Default)]
pub(super) struct PoolSection {
    broker: BrokerSection,
    size: Option<u32>,
    checkout_timeout: Option<Given<Duration>>,
    confirm_timeout: Option<Given<Duration>>,
    publish_timeout: Option<Given<Duration>>,
    mandatory: Option<Given<bool>>,
    max_in_flight: Option<usize>,
    prefetch: Option<u16>,
    retry: Option<Given<RetryPolicy>>,
    max_attempts: Option<u32>,
    retry_queue_type: Option<Given<QueueType>>,
    delay_queue_type: Option<Given<QueueType>>,
    ack_batch: Option<Given<bool>>,
    concurrency: Option<Given<Concurrency>>,
    max_rate: Option<Given<f64>>,
    pause_on_failures: Option<Option<PauseOnFailures>>,
}

impl PoolSection {
    fn read(reader: &mut Reader, value: &Value, key: String) -> PoolSection {
        let allowed: Vec<&str> = POOL_KEYS.into_iter().chain(BROKER_KEYS).collect();
        let Some(section) = reader.section(value, key, &allowed) else { return PoolSection::default() };
        if let (Some(attempts), None) = (section.value("max_attempts"), section.value("retry")) {
            reader.mistake_in(attempts, section.key_of("max_attempts"), "expected retry beside it, the delays");
        }
        PoolSection {
            broker: BrokerSection::read_keys(reader, &section),
            size: reader.number(&section, "size", check::SIZE),
            checkout_timeout: reader.duration(&section, "checkout_timeout", check::duration),
            confirm_timeout: reader.duration(&section, "confirm_timeout", check::duration),
            publish_timeout: reader.duration(&section, "publish_timeout", check::duration),
            mandatory: reader.boolean(&section, "mandatory"),
            max_in_flight: reader.number(&section, "max_in_flight", check::MAX_IN_FLIGHT),
            prefetch: reader.number(&section, "prefetch", check::PREFETCH),
            retry: reader.read(&section, "retry", retry),
            max_attempts: reader.number(&section, "max_attempts", check::MAX_ATTEMPTS),
            retry_queue_type: reader.read(&section, "retry_queue_type", waiting_queue_type),
            delay_queue_type: reader.read(&section, "delay_queue_type", waiting_queue_type),
            ack_batch: reader.boolean(&section, "ack_batch"),
            concurrency: reader.read(&section, "concurrency", pace::concurrency),
            max_rate: reader.read(&section, "max_rate", pace::max_rate),
            pause_on_failures: pace::pause_on_failures(reader, &section),
        }
    }

    fn over(&self, broker: &BrokerSettings) -> PoolSettings {
        let default = PoolSettings::new(self.broker.over(broker));
        let duration = |given: &Option<Given<Duration>>, default| given.as_ref().map_or(default, |given| given.value);
        PoolSettings {
            size: self.size.unwrap_or(default.size),
            checkout_timeout: duration(&self.checkout_timeout, default.checkout_timeout),
            confirm_timeout: duration(&self.confirm_timeout, default.confirm_timeout),
            publish_timeout: duration(&self.publish_timeout, default.publish_timeout),
            mandatory: self.mandatory.as_ref().map_or(default.mandatory, |given| given.value),
            max_in_flight: self.max_in_flight.unwrap_or(default.max_in_flight),
            prefetch: self.prefetch.unwrap_or(default.prefetch),
            retry: self.retry.as_ref().map(|given| match self.max_attempts {
                Some(max_attempts) => given.value.clone().with_max_attempts(max_attempts),
                None => given.value.clone(),
            }),
            retry_queue_type: self.retry_queue_type.as_ref().map(|given| given.value),
            delay_queue_type: self.delay_queue_type.as_ref().map_or(default.delay_queue_type, |given| given.value),
            ack_batch: self.ack_batch.as_ref().map_or(default.ack_batch, |given| given.value),
            concurrency: self.concurrency.as_ref().map_or(default.concurrency, |given| given.value),
            max_rate: self.max_rate.as_ref().map(|given| given.value),
            pause_on_failures: self.pause_on_failures.unwrap_or(default.pause_on_failures),
            ..default
        }
    }
}

/// All pools that are written down.
#[derive(Debug, Default)]
pub(super) struct PoolSections(BTreeMap<String, PoolSection>);

impl PoolSections {
    pub(super) fn read(reader: &mut Reader, value: &Value, key: &str) -> PoolSections {
        let mut pools = BTreeMap::new();
        for (name, value) in reader.table(value, key).map(sorted).unwrap_or_default() {
            if name.is_empty() {
                reader.mistake_in(value, child(key, name), "expected a pool name that is not empty");
            }
            pools.insert(name.to_owned(), PoolSection::read(reader, value, child(key, name)));
        }
        PoolSections(pools)
    }

    /// The pools, each with its broker, and the two that are always there.
    pub(super) fn over(mut self, broker: &BrokerSettings) -> BTreeMap<String, PoolSettings> {
        for name in [PUBLISH_POOL, LISTEN_POOL] {
            self.0.entry(name.to_owned()).or_default();
        }
        self.0.into_iter().map(|(name, pool)| (name, pool.over(broker))).collect()
    }
}
