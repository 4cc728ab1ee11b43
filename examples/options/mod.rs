//! The options of the examples: `--NAME VALUE`, and no others.

use std::env;
use std::process::exit;
use std::str::FromStr;

pub struct Options {
    usage: &'static str,
    given: Vec<(String, String)>,
}

impl Options {
    /// Reads the arguments of the program. `known` are the names that it has, with their two dashes. Any other ends the
    /// program, with how it is used.
    pub fn read(usage: &'static str, known: &[&str]) -> Options {
        let mut options = Options { usage, given: Vec::new() };
        let mut arguments = env::args().skip(1);
        while let Some(argument) = arguments.next() {
            if argument == "--help" {
                println!("{usage}");
                exit(0);
            }
            let (name, value) = match argument.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (argument, arguments.next()),
            };
            match value {
                Some(value) if known.contains(&name.as_str()) => options.given.push((name, value)),
                _ => options.refuse(&name),
            }
        }
        options
    }

    /// The value of an option, if it is given.
    pub fn get<T: FromStr>(&self, name: &str) -> Option<T> {
        let (_, value) = self.given.iter().rfind(|(given, _)| given == name)?;
        Some(value.parse().unwrap_or_else(|_| self.refuse(&format!("{name} {value}"))))
    }

    fn refuse(&self, what: &str) -> ! {
        eprintln!("what is {what:?}?\n{}", self.usage);
        exit(2);
    }
}
