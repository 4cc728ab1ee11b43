//! `coney outbox`: what waits in an outbox, what the broker has refused, and what becomes of that.

use std::time::SystemTime;

use clap::Subcommand;
use coney::outbox::{EntryState, Listed, Outbox};
use serde_json::json;

use crate::ask;
use crate::exit::{CODES, Exit, Failure, Result};
use crate::output;
use crate::source::{SETTINGS, Source};

/// How the path of a file may begin.
const SQLITE: &str = "sqlite:";

/// Looks at an outbox, and decides on what the broker has refused.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
struct Where {
    /// The outbox: sqlite:PATH. Defaults to [outbox] store of the settings.
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
    #[command(flatten)]
    source: Source,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says how many messages wait, for how long, and how many were refused. Asks no broker.
    ///
    /// The exit code is 3 if some were refused.
    #[command(after_help = format!("Examples:
  coney outbox status
  coney outbox status --store sqlite:shop.db --json

{SETTINGS}

{CODES}"))]
    Status {
        /// Prints one JSON object: pending, bytes, refused and oldest, which is in seconds.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: Where,
    },
    /// Lists the oldest messages that were refused, with the reasons, or those that wait.
    #[command(after_help = format!("Examples:
  coney outbox list
  coney outbox list --pending --count 10
  coney outbox list --json-lines | jq .reason

{SETTINGS}

{CODES}"))]
    List {
        /// Those that wait to be forwarded, in place of those that were refused.
        #[arg(long)]
        pending: bool,
        /// So many at most.
        #[arg(long, value_name = "N", default_value_t = 100)]
        count: usize,
        /// Prints each as a line of JSON: id, message_id, exchange, routing_key, ordering_key, reason, age and body.
        #[arg(long)]
        json_lines: bool,
        #[command(flatten)]
        at: Where,
    },
    /// Has refused messages forwarded once more: those with these ids, or all of them.
    #[command(after_help = format!("Examples:
  coney outbox retry 17 18
  coney outbox retry --all

{SETTINGS}

{CODES}"))]
    Retry {
        /// As `list` shows them.
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        ids: Vec<i64>,
        /// All that were refused.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        at: Where,
    },
    /// Removes refused messages for good: those with these ids, or all of them.
    ///
    /// Asks before it removes all of them.
    #[command(after_help = format!("Examples:
  coney outbox drop 17
  coney outbox drop --all --yes

{SETTINGS}

{CODES}"))]
    Drop {
        /// As `list` shows them.
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        ids: Vec<i64>,
        /// All that were refused.
        #[arg(long)]
        all: bool,
        /// Does not ask.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        at: Where,
    },
}

impl Arguments {
    pub fn source(&mut self) -> &mut Source {
        match &mut self.command {
            Command::Status { at, .. }
            | Command::List { at, .. }
            | Command::Retry { at, .. }
            | Command::Drop { at, .. } => &mut at.source,
        }
    }
}

impl Where {
    /// Opens the outbox. One that is not there is not made.
    fn open(&self) -> Result<Outbox> {
        let configured = self.source.settings()?.outbox.map(|outbox| outbox.store);
        let Some(store) = self.store.clone().or(configured) else {
            return Err(Failure::usage(
                "no outbox is in the settings; name one with --store sqlite:PATH, or add [outbox] store",
            ));
        };
        let Some(path) = store.strip_prefix(SQLITE).filter(|path| !path.is_empty()) else {
            return Err(Failure::usage(format!("--store: expected sqlite:PATH, got {store:?}")));
        };
        if !std::path::Path::new(path).exists() {
            return Err(Failure::failed(format!(
                "there is no file {path:?}; a program makes it when it opens its outbox"
            )));
        }
        Ok(Outbox::sqlite(path)?)
    }
}

pub fn run(arguments: &Arguments) -> Result {
    match &arguments.command {
        Command::Status { json, at } => status(&at.open()?, *json),
        Command::List { pending, count, json_lines, at } => {
            let state = if *pending { EntryState::Pending } else { EntryState::Refused };
            for listed in at.open()?.list(state, *count)? {
                output::line(&if *json_lines { output::json(&as_json(&listed))? } else { as_text(&listed) })?;
            }
            Ok(Exit::Done)
        }
        Command::Retry { ids, all, at } => {
            let number = at.open()?.retry(chosen(ids, *all))?;
            output::say(&format!("{} to be forwarded once more", output::count(number, "message")))?;
            done(number, ids)
        }
        Command::Drop { ids, all, yes, at } => {
            let outbox = at.open()?;
            let refused = output::count(outbox.status()?.refused, "message");
            if *all && !*yes && !ask::agrees(&format!("Drop {refused} of outbox {} for good?", outbox.name()))? {
                return Err(Failure::failed("nothing was dropped"));
            }
            let number = outbox.discard(chosen(ids, *all))?;
            output::say(&format!("dropped {}", output::count(number, "message")))?;
            done(number, ids)
        }
    }
}

fn chosen(ids: &[i64], all: bool) -> Option<&[i64]> {
    if all { None } else { Some(ids) }
}

/// An id that no refused message has is a failure.
fn done(number: u64, ids: &[i64]) -> Result {
    if number < ids.len() as u64 {
        let missing = ids.len() as u64 - number;
        return Err(Failure::failed(format!("{} with no such refused message", output::count(missing, "id"))));
    }
    Ok(Exit::Done)
}

fn status(outbox: &Outbox, json: bool) -> Result {
    let status = outbox.status()?;
    if json {
        let oldest = status.oldest.map(|oldest| oldest.as_secs_f64());
        let line =
            json!({ "pending": status.pending, "bytes": status.bytes, "refused": status.refused, "oldest": oldest });
        output::line(&output::json(&line)?)?;
    } else {
        let age = status.oldest.map(|oldest| format!(", the oldest for {oldest:.0?}")).unwrap_or_default();
        let (pending, bytes) = (output::count(status.pending, "message"), output::count(status.bytes, "byte"));
        output::line(&format!("{pending} pending ({bytes}){age}; {} refused", status.refused))?;
    }
    Ok(if status.refused > 0 { Exit::Pending } else { Exit::Done })
}

fn age(listed: &Listed) -> f64 {
    SystemTime::now().duration_since(listed.stored_at).unwrap_or_default().as_secs_f64()
}

fn as_json(listed: &Listed) -> serde_json::Value {
    let entry = &listed.stored.entry;
    json!({
        "id": listed.stored.id,
        "message_id": entry.message.message_id(),
        "exchange": entry.exchange,
        "routing_key": entry.routing_key,
        "ordering_key": entry.ordering_key,
        "reason": listed.reason,
        "age": age(listed),
        "body": entry.message.text(),
    })
}

fn as_text(listed: &Listed) -> String {
    let entry = &listed.stored.entry;
    let reason = listed.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    output::in_one_line(&format!(
        "{:>8} {:>7.0} s  exchange {:?}, routing key {:?}, id {}{reason}",
        listed.stored.id,
        age(listed),
        entry.exchange,
        entry.routing_key,
        entry.message.message_id().unwrap_or_default()
    ))
}
