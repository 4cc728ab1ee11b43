//! `coney exchange`: makes exchanges and removes them.

use clap::Subcommand;
use coney::{Exchange, ExchangeKind, FieldValue};

use crate::exit::{CODES, Result};
use crate::output;
use crate::queue::{connected, named};
use crate::source::{SETTINGS, Source};
use crate::values;

/// Declares or deletes exchanges.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes an exchange, unless it is there with the same properties.
    ///
    /// It is durable: a restart of the broker does not remove it. One that is there with other properties is left as it is, and
    /// told.
    #[command(after_help = format!("Examples:
  coney exchange declare events topic
  coney exchange declare room direct --argument alternate-exchange=unrouted

{SETTINGS}

{CODES}"))]
    Declare {
        exchange: String,
        /// direct, fanout, topic, headers, or a plugin's kind, which begins with x-.
        kind: ExchangeKind,
        /// A restart of the broker removes the exchange.
        #[arg(long)]
        transient: bool,
        /// The exchange goes when its last binding goes.
        #[arg(long)]
        auto_delete: bool,
        /// Takes messages from other exchanges only.
        #[arg(long)]
        internal: bool,
        /// An optional argument, as text, or with := as JSON; may be given several times.
        #[arg(long, value_name = "NAME=TEXT|NAME:=JSON", value_parser = values::named)]
        argument: Vec<(String, FieldValue)>,
        #[command(flatten)]
        source: Source,
    },
    /// Deletes an exchange with its bindings.
    #[command(after_help = format!("Examples:
  coney exchange delete events
  coney exchange delete events --if-unused

{SETTINGS}

{CODES}"))]
    Delete {
        exchange: String,
        /// Not while anything is bound to it.
        #[arg(long)]
        if_unused: bool,
        #[command(flatten)]
        source: Source,
    },
}

impl Arguments {
    pub fn source(&mut self) -> &mut Source {
        match &mut self.command {
            Command::Declare { source, .. } | Command::Delete { source, .. } => source,
        }
    }
}

pub fn run(arguments: &Arguments) -> Result {
    match &arguments.command {
        Command::Declare { exchange, kind, transient, auto_delete, internal, argument, source } => {
            let declared = Exchange::new(named("exchange", exchange)?, kind.clone())
                .durable(!transient)
                .auto_delete(*auto_delete)
                .internal(*internal);
            let declared =
                argument.iter().fold(declared, |exchange, (name, value)| exchange.argument(name, value.clone()));
            connected(source, |connection| {
                connection.exchange_declare(&declared)?;
                Ok(output::say(&format!("declared exchange {exchange} ({kind})"))?)
            })
        }
        Command::Delete { exchange, if_unused, source } => connected(source, |connection| {
            // To delete what is not there is no error to a broker. A name that is mistyped is one to whoever has typed it.
            connection.exchange_declare_passive(named("exchange", exchange)?)?;
            connection.exchange_delete(exchange, *if_unused)?;
            Ok(output::say(&format!("deleted exchange {exchange}"))?)
        }),
    }
}
