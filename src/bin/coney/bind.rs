//! `coney bind` and `coney unbind`: by which routing key messages go from an exchange to a queue.

use coney::{Binding, FieldValue};

use crate::exit::{CODES, Result};
use crate::output;
use crate::queue::{connected, named};
use crate::source::{SETTINGS, Source};
use crate::values;

/// Binds a queue to an exchange, so that messages for KEY go from there to it.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Examples:
  coney bind orders room user1
  coney bind audit events 'order.#'
  coney bind audit amq.headers --argument x-match=all --argument kind=order
  coney bind archive events '#' --to-exchange

{SETTINGS}

{CODES}"))]
pub struct BindArguments {
    #[command(flatten)]
    binding: Arguments,
}

/// Removes a binding. KEY and --argument have to be those it was made with.
///
/// A binding that is not there counts as removed.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Examples:
  coney unbind orders room user1
  coney unbind audit events 'order.#'

{SETTINGS}

{CODES}"))]
pub struct UnbindArguments {
    #[command(flatten)]
    binding: Arguments,
}

#[derive(Debug, clap::Args)]
struct Arguments {
    /// The queue that messages go to; with --to-exchange, the exchange.
    queue: String,
    /// The exchange that they come from.
    exchange: String,
    /// The routing key, or the pattern for a topic exchange.
    #[arg(default_value = "")]
    key: String,
    /// QUEUE is the name of an exchange.
    #[arg(long)]
    to_exchange: bool,
    /// An optional argument, as text, or with := as JSON; may be given several times. A headers exchange compares them.
    #[arg(long, value_name = "NAME=TEXT|NAME:=JSON", value_parser = values::named)]
    argument: Vec<(String, FieldValue)>,
    #[command(flatten)]
    source: Source,
}

impl BindArguments {
    pub fn source(&mut self) -> &mut Source {
        &mut self.binding.source
    }
}

impl UnbindArguments {
    pub fn source(&mut self) -> &mut Source {
        &mut self.binding.source
    }
}

impl Arguments {
    fn binding(&self) -> Result<Binding> {
        let to = named("queue", &self.queue)?;
        let binding = if self.to_exchange { Binding::exchange(to) } else { Binding::queue(to) };
        let binding = binding.to(named("exchange", &self.exchange)?).routing_key(&self.key);
        Ok(self.argument.iter().fold(binding, |binding, (name, value)| binding.argument(name, value.clone())))
    }

    fn in_words(&self) -> String {
        let kind = if self.to_exchange { "exchange" } else { "queue" };
        format!("{kind} {} to exchange {}, key {:?}", self.queue, self.exchange, self.key)
    }
}

pub fn bind(arguments: &BindArguments) -> Result {
    let arguments = &arguments.binding;
    let binding = arguments.binding()?;
    connected(&arguments.source, |connection| {
        connection.bind(&binding)?;
        Ok(output::say(&format!("bound {}", arguments.in_words()))?)
    })
}

pub fn unbind(arguments: &UnbindArguments) -> Result {
    let arguments = &arguments.binding;
    let binding = arguments.binding()?;
    connected(&arguments.source, |connection| {
        connection.unbind(&binding)?;
        Ok(output::say(&format!("no longer bound: {}", arguments.in_words()))?)
    })
}
