//! `coney topology`: the topology of the settings beside what the broker has, and how to bring it there.

use clap::Subcommand;
use coney::App;
use serde_json::{Value, json};

use crate::colour::Colour;
use crate::exit::{CODES, Exit, Failure, Result};
use crate::output;
use crate::plan::{self, Plan, State};
use crate::source::{SETTINGS, Source};

/// Compares the topology of the settings with the broker, and declares it.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says what would be created, what is equal, and what conflicts, and changes nothing.
    ///
    /// Over AMQP, bindings can be neither listed nor asked for, so that a binding between things that exist is "unknown";
    /// and of what conflicts the broker tells the first difference only. What exists is compared by declaring it once more
    /// with the wanted properties, which changes nothing; it needs the permission to configure it, counts as use of a queue
    /// with x-expires, and creates what somebody deletes in the very moment between being found and being compared.
    #[command(after_help = format!("Examples:
  coney topology plan
  coney topology plan --profile production --json
  coney topology plan || [ $? -eq 3 ]     # in CI: fails at a conflict, not at what is still to be created

{SETTINGS}

{CODES}"))]
    Plan(Options),
    /// Declares the exchanges, queues and bindings. Does nothing if any of them conflicts.
    ///
    /// Nothing is ever deleted or changed: what exists with other properties has to be deleted by hand first.
    #[command(after_help = format!("Examples:
  coney topology apply
  CONEY_BROKER__PASSWORD=… coney topology apply --profile production

{SETTINGS}

{CODES}"))]
    Apply(Options),
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Prints one JSON object: the items with kind, name, state and detail. After `apply` the states are created, equal and
    /// declared.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    source: Source,
}

impl Arguments {
    pub fn source(&mut self) -> &mut Source {
        match &mut self.command {
            Command::Plan(options) | Command::Apply(options) => &mut options.source,
        }
    }
}

pub fn run(arguments: &Arguments) -> Result {
    match &arguments.command {
        Command::Plan(options) => plan(options),
        Command::Apply(options) => apply(options),
    }
}

/// The app, and its topology, which is not empty.
fn wanted(options: &Options) -> Result<App> {
    if options.source.is_url() {
        return Err(Failure::usage(
            "--url has no topology beside it; name a settings file with --config, and set CONEY_BROKER__URL",
        ));
    }
    let app = options.source.app(|_| ())?;
    if app.topology().is_empty() {
        let file =
            options.source.file().map_or("there is no settings file".to_owned(), |file| file.display().to_string());
        return Err(Failure::failed(format!("no topology is in the settings ({file}); add [[topology.queues]] to it")));
    }
    Ok(app)
}

fn plan(options: &Options) -> Result {
    let app = wanted(options)?;
    let connection = options.source.pool(&app, app.publish_pool())?.connection_or_cause()?;
    let plan = plan::compare(&connection, app.topology())?;
    print(&plan, options.json, State::as_str, |plan| plan.summary())?;
    Ok(plan.exit())
}

fn apply(options: &Options) -> Result {
    let app = wanted(options)?;
    let connection = options.source.pool(&app, app.publish_pool())?.connection_or_cause()?;
    let plan = plan::compare(&connection, app.topology())?;
    if plan.exit() == Exit::Conflict {
        print(&plan, options.json, State::as_str, |plan| plan.summary())?;
        return Err(Failure::new(
            Exit::Conflict,
            format!(
                "nothing was declared: {} in conflict; delete by hand what is to be made anew",
                plan.count(State::Conflict)
            ),
        ));
    }
    connection.declare(app.topology())?;
    let done = |state| match state {
        State::Equal => "equal",
        State::Create => "created",
        State::Conflict => "conflict",
        State::Kept => "kept",
        State::Unknown => "declared",
    };
    print(&plan, options.json, done, |plan| plan.done_summary())?;
    Ok(Exit::Done)
}

fn print(
    plan: &Plan,
    json: bool,
    word: impl Fn(State) -> &'static str,
    summary: impl Fn(&Plan) -> String,
) -> Result<()> {
    if json {
        let items: Vec<Value> = plan.items.iter().map(|item| item.to_json(word(item.state))).collect();
        return Ok(output::line(&output::json(&json!({ "items": items }))?)?);
    }
    for item in &plan.items {
        let detail = if item.detail.is_empty() { String::new() } else { format!("  ({})", item.detail) };
        let colour = match item.state {
            State::Equal => Colour::Plain,
            State::Create => Colour::Green,
            State::Conflict => Colour::Red,
            State::Kept | State::Unknown => Colour::Yellow,
        };
        let word = format!("{:<9}", word(item.state));
        let word = colour.on_stdout(&word);
        output::line(&format!("{word} {:<8} {}", item.kind, output::in_one_line(&format!("{}{detail}", item.name))))?;
    }
    Ok(output::line(&summary(plan))?)
}
