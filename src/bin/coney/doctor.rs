//! `coney doctor`: what is wrong with the settings, the network, the broker or our rights on it, and what to do.

use std::fmt;
use std::time::{Duration, Instant};

use coney::{App, BrokerSettings, Connection, Error, Pool, Queue};
use serde::Serialize;

use crate::colour::Colour;
use crate::deprecated;
use crate::exit::{self, CODES, Exit, Result};
use crate::network;
use crate::output;
use crate::plan::{self, State};
use crate::source::{SETTINGS, Source};

/// How many round trips are timed.
const ROUND_TRIPS: usize = 5;

/// Tries everything that the settings name, and says what is wrong and what to do.
///
/// For each pool: whether its hosts resolve and can be reached, whether the broker takes user, password and virtual host,
/// whether a queue of our own can be made, written and read, and how long a round trip takes. Then the topology, as
/// `topology plan` looks at it, with what of it RabbitMQ 4 has given up or deprecates. Nothing is changed but an exclusive queue, which goes again at once.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Examples:
  coney doctor
  coney doctor --profile production
  coney doctor --url amqps://app@rabbit.example/orders
  coney doctor --json | jq 'select(.verdict == \"problem\")'

Each line is a finding: ok, problem or hint. With a problem among them the exit code is 1.

{SETTINGS}

{CODES}"))]
pub struct Arguments {
    /// Prints each finding as one line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub source: Source,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Problem,
    Hint,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Ok => "ok",
            Verdict::Problem => "problem",
            Verdict::Hint => "hint",
        })
    }
}

#[derive(Debug, Serialize)]
struct Finding<'a> {
    verdict: Verdict,
    about: &'a str,
    text: &'a str,
}

/// Says findings as they are made, and keeps count.
struct Report {
    json: bool,
    problems: u32,
}

impl Report {
    fn say(&mut self, verdict: Verdict, about: &str, text: impl fmt::Display) -> Result<()> {
        if verdict == Verdict::Problem {
            self.problems += 1;
        }
        let text = text.to_string();
        let line = match self.json {
            true => output::json(&Finding { verdict, about, text: &text })?,
            false => {
                let colour = match verdict {
                    Verdict::Ok => Colour::Green,
                    Verdict::Problem => Colour::Red,
                    Verdict::Hint => Colour::Yellow,
                };
                let verdict = format!("{verdict:<8}");
                let said = output::beginning(&format!("{about}: {text}"), usize::MAX);
                format!("{} {said}", colour.on_stdout(&verdict))
            }
        };
        Ok(output::line(&line)?)
    }

    fn ok(&mut self, about: &str, text: impl fmt::Display) -> Result<()> {
        self.say(Verdict::Ok, about, text)
    }

    fn hint(&mut self, about: &str, text: impl fmt::Display) -> Result<()> {
        self.say(Verdict::Hint, about, text)
    }

    /// A problem, and what may be done about it.
    fn problem(&mut self, about: &str, error: &Error) -> Result<()> {
        self.say(Verdict::Problem, about, error)?;
        exit::hint(error).map_or(Ok(()), |hint| self.hint(about, hint))
    }
}

pub fn run(arguments: &Arguments) -> Result {
    let mut report = Report { json: arguments.json, problems: 0 };
    if let Some(app) = look_at_settings(arguments, &mut report)? {
        let wanted = arguments.source.pool_name();
        if let Some(name) = wanted {
            app.pool(name)?;
        }
        for pool in app.pools().filter(|pool| wanted.is_none_or(|name| name == pool.name())) {
            let about = format!("pool {}", pool.name());
            let connection = look_at_pool(&mut report, &about, pool)?;
            let declares = pool.name() == app.publish_pool().name() || wanted.is_some();
            if let Some(connection) = connection.filter(|_| declares) {
                look_at_topology(&mut report, &app, &connection)?;
            }
        }
    }
    Ok(if report.problems == 0 { Exit::Done } else { Exit::Failed })
}

fn look_at_settings(arguments: &Arguments, report: &mut Report) -> Result<Option<App>> {
    const ABOUT: &str = "settings";
    let source = &arguments.source;
    let from = match source.file() {
        _ if source.is_url() => "from --url".to_owned(),
        Some(file) => format!("from {} and the environment", file.display()),
        None => "from the environment; there is no app.toml here".to_owned(),
    };
    let read = source.settings_or_mistakes()?.and_then(App::from_settings);
    match read {
        Ok(app) => {
            report.ok(ABOUT, from)?;
            Ok(Some(app))
        }
        Err(Error::Settings(mistakes)) => {
            for mistake in &mistakes.problems {
                report.say(Verdict::Problem, ABOUT, mistake)?;
            }
            report.hint(ABOUT, format!("{from}; every key is in the app.toml of coney, with its default"))?;
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Says how far we get, and returns the connection if there is one.
fn look_at_pool(report: &mut Report, about: &str, pool: &Pool) -> Result<Option<coney::PooledConnection>> {
    let broker = &pool.settings().broker;
    report.ok(
        about,
        format!("is for {}, at most {}", broker.masked_url(), output::count(pool.settings().size.into(), "connection")),
    )?;
    if !look_at_network(report, about, broker)? {
        return Ok(None);
    }
    let since = Instant::now();
    let connection = match pool.connection_or_cause() {
        Ok(connection) => connection,
        Err(error) => {
            report.problem(about, &error)?;
            return Ok(None);
        }
    };
    let took = since.elapsed();
    report.ok(about, format!("logged in as {:?} to virtual host {:?} in {took:.1?}", broker.user, broker.vhost))?;
    if let Some(version) = connection.server_version() {
        report.ok(about, format!("the broker says that it is version {version}"))?;
    }
    look_at_security(report, about, broker)?;
    match try_queue(&connection) {
        Ok(round_trip) => {
            report.ok(about, format!("made, wrote, read and removed a queue; a round trip takes {round_trip:.1?}"))?;
        }
        Err(error) => {
            report.problem(about, &error)?;
            if error.code() == Some(403) {
                report.hint(about, "a user who only publishes, or only consumes, may do without")?;
            }
        }
    }
    if let Some(reason) = connection.blocked() {
        report.say(Verdict::Problem, about, format!("the broker takes no messages at present: {reason}"))?;
    }
    Ok(Some(connection))
}

/// Whether any host can be reached.
fn look_at_network(report: &mut Report, about: &str, broker: &BrokerSettings) -> Result<bool> {
    let mut reached = false;
    for endpoint in &broker.endpoints {
        if endpoint.memory_name().is_some() {
            report.hint(about, "memory:// is a broker inside each program, which ends with it; nothing is shared")?;
            reached = true;
            continue;
        }
        let addresses = match network::resolve(endpoint, broker.connect_timeout) {
            Ok(addresses) => addresses,
            Err(error) => {
                report.say(Verdict::Problem, about, format!("cannot resolve {:?}: {error}", endpoint.host))?;
                report.hint(about, "check the host in the settings, and the name server")?;
                continue;
            }
        };
        match network::dial(&addresses, broker.connect_timeout) {
            Ok(address) => {
                reached = true;
                report.ok(about, format!("{endpoint} is {address} and takes connections"))?;
            }
            Err(error) => {
                report.say(
                    Verdict::Problem,
                    about,
                    format!("cannot reach {endpoint} ({}): {error}", list(&addresses)),
                )?;
                report.hint(
                    about,
                    "is the broker running, does it listen on this port, and does a firewall let us through?",
                )?;
            }
        }
    }
    Ok(reached)
}

fn list(addresses: &[std::net::SocketAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn look_at_security(report: &mut Report, about: &str, broker: &BrokerSettings) -> Result<()> {
    let is_near =
        |host: &str| host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    let is_far = broker.endpoints.iter().any(|one| one.memory_name().is_none() && !is_near(&one.host));
    match &broker.tls {
        Some(tls) if tls.danger_accept_any_certificate => {
            report.hint(
                about,
                "TLS, but any certificate is accepted, so anybody may be in between; set ca_file instead",
            )?;
        }
        Some(tls) => {
            let trusted =
                tls.ca_file.as_ref().map_or("the system's authorities".to_owned(), |file| file.display().to_string());
            let name = tls.server_name.as_deref().unwrap_or("the host");
            let own = if tls.certificate_file.is_some() { ", with a certificate of ours" } else { "" };
            report.ok(about, format!("TLS, verified against {trusted} for {name}{own}"))?;
        }
        None if is_far => report.hint(about, "no TLS: the password crosses the network in clear; see amqps://")?,
        None => {}
    }
    if is_far && broker.user == "guest" && broker.password.expose() == "guest" {
        report.hint(about, "the user is guest with the password everybody knows; make a user of your own")?;
    }
    Ok(())
}

/// Makes a queue of our own, writes to it and reads from it; returns how long a round trip takes, the middle one of some.
fn try_queue(connection: &Connection) -> coney::Result<Duration> {
    let queue = connection.queue_declare(&Queue::server_named())?.name;
    connection.publish("", &queue, "coney doctor")?;
    connection.get_and_ack(&queue)?;
    let mut times = Vec::new();
    for _ in 0..ROUND_TRIPS {
        let since = Instant::now();
        connection.queue_declare_passive(&queue)?;
        times.push(since.elapsed());
    }
    connection.queue_delete(&queue)?;
    times.sort_unstable();
    Ok(times[ROUND_TRIPS / 2])
}

fn look_at_topology(report: &mut Report, app: &App, connection: &Connection) -> Result<()> {
    const ABOUT: &str = "topology";
    if app.topology().is_empty() {
        return report.ok(ABOUT, "none is in the settings");
    }
    let plan = match plan::compare(connection, app.topology()) {
        Ok(plan) => plan,
        Err(error) => return report.problem(ABOUT, &error),
    };
    for item in &plan.items {
        let verdict = match item.state {
            State::Conflict => Verdict::Problem,
            State::Create => Verdict::Hint,
            State::Kept if !item.detail.is_empty() => Verdict::Hint,
            State::Equal | State::Kept | State::Unknown => continue,
        };
        let words = if item.state == State::Create { "is not there" } else { item.detail.as_str() };
        report.say(verdict, ABOUT, format!("{} {}: {words}", item.kind, item.name))?;
    }
    for said in deprecated::in_topology(app.topology(), connection.server_version()) {
        report.hint(ABOUT, said)?;
    }
    match plan.exit() {
        Exit::Conflict => report.hint(ABOUT, "delete by hand what is to be made anew, or change the settings"),
        Exit::Pending => report.hint(ABOUT, format!("{}; run `coney topology apply`", plan.summary())),
        _ => report.ok(ABOUT, plan.summary()),
    }
}
