//! Colours, on a terminal and nowhere else; none where `NO_COLOR` is set (<https://no-color.org>), or the terminal is dumb.

use std::borrow::Cow;
use std::env;
use std::io::{IsTerminal, stderr, stdout};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    Plain,
    Red,
    Green,
    Yellow,
}

impl Colour {
    pub fn on_stdout(self, text: &str) -> Cow<'_, str> {
        self.on(text, stdout().is_terminal())
    }

    pub fn on_stderr(self, text: &str) -> Cow<'_, str> {
        self.on(text, stderr().is_terminal())
    }

    fn on(self, text: &str, is_terminal: bool) -> Cow<'_, str> {
        // As ECMA-48 numbers them (Select Graphic Rendition).
        let number = match self {
            Colour::Plain => return Cow::Borrowed(text),
            Colour::Red => 31,
            Colour::Green => 32,
            Colour::Yellow => 33,
        };
        if !is_terminal || !are_wanted() {
            return Cow::Borrowed(text);
        }
        Cow::Owned(format!("\x1b[{number}m{text}\x1b[0m"))
    }
}

fn are_wanted() -> bool {
    let is_dumb = env::var_os("TERM").is_some_and(|term| term == "dumb");
    !is_dumb && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
