//! `coney completions`: what a shell needs to complete our arguments.

use std::io::Write;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::exit::{CODES, Exit, Result};

/// Prints a script that completes the arguments of coney in a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Examples:
  coney completions bash > ~/.local/share/bash-completion/completions/coney
  coney completions zsh > ~/.zfunc/_coney
  coney completions fish > ~/.config/fish/completions/coney.fish

{CODES}"))]
pub struct Arguments {
    shell: Shell,
}

pub fn run(arguments: &Arguments) -> Result {
    // Into memory first: writing to a stdout that is closed is an error for us, and a panic there.
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut crate::Arguments::command(), "coney", &mut script);
    std::io::stdout().lock().write_all(&script)?;
    Ok(Exit::Done)
}
