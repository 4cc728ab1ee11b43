//! Why the broker says no: the reply code, the text and the method that gave offence, as RabbitMQ 3.10 words them.
//!
//! A refusal closes the channel, or the whole connection; which of the two is decided here, by its code. Who writes the
//! close frame is the session.

use std::fmt;

/// Reply texts are short strings: longer ones end in three dots, as RabbitMQ's do.
const TEXT_MAX: usize = 255;

/// What a refusal closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// `channel.close`; the connection goes on.
    Channel,
    /// `connection.close`.
    Connection,
}

/// The cause of a `channel.close` or `connection.close` from the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) scope: Scope,
    pub(crate) code: u16,
    /// With the name of the code in front: `NOT_FOUND - no queue 'q' in vhost '/'`.
    pub(crate) text: String,
    /// Class and method of the offending method; both 0 where there is none.
    pub(crate) class_id: u16,
    pub(crate) method_id: u16,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $constructor:ident = $scope:ident $code:literal $name:literal;)*) => {
        impl Refusal {
            $($(#[$doc])*
            pub(crate) fn $constructor(text: impl fmt::Display) -> Refusal {
                Refusal::new(Scope::$scope, $code, $name, &text)
            })*
        }
    };
}

codes! {
    /// 403: no right, or a name that is not the client's to use.
    access_refused = Channel 403 "ACCESS_REFUSED";
    /// 404: no such queue, exchange or vhost.
    not_found = Channel 404 "NOT_FOUND";
    /// 405: another connection's exclusive queue.
    resource_locked = Channel 405 "RESOURCE_LOCKED";
    /// 406: an argument that cannot be, or differs from what was declared.
    precondition_failed = Channel 406 "PRECONDITION_FAILED";
    /// 320: an operator, or the end of the broker, closes the connection.
    connection_forced = Connection 320 "CONNECTION_FORCED";
    /// 403 as it ends a login.
    login_refused = Connection 403 "ACCESS_REFUSED";
    /// 501: a frame that cannot be read.
    frame_error = Connection 501 "FRAME_ERROR";
    /// 502: a field that cannot be read.
    syntax_error = Connection 502 "SYNTAX_ERROR";
    /// 503: a method that cannot be had.
    command_invalid = Connection 503 "COMMAND_INVALID";
    /// 504: a channel that is not open, or is open already.
    channel_error = Connection 504 "CHANNEL_ERROR";
    /// 505: a frame out of its turn.
    unexpected_frame = Connection 505 "UNEXPECTED_FRAME";
    /// 530: a vhost, a tag or a limit that is not allowed.
    not_allowed = Connection 530 "NOT_ALLOWED";
    /// 540: what AMQP has and RabbitMQ has not.
    not_implemented = Connection 540 "NOT_IMPLEMENTED";
    /// 541: the broker's own fault.
    internal_error = Connection 541 "INTERNAL_ERROR";
}

impl Refusal {
    fn new(scope: Scope, code: u16, name: &str, text: &dyn fmt::Display) -> Refusal {
        Refusal { scope, code, text: fit(format!("{name} - {text}")), class_id: 0, method_id: 0 }
    }

    /// A close with a code and text of somebody's own choosing, for tests that want to see one.
    pub(crate) fn custom(scope: Scope, code: u16, text: impl Into<String>) -> Refusal {
        Refusal { scope, code, text: fit(text.into()), class_id: 0, method_id: 0 }
    }

    /// Names the offending method, unless one is named already.
    pub(crate) fn by_method(mut self, class_id: u16, method_id: u16) -> Refusal {
        if (self.class_id, self.method_id) == (0, 0) {
            (self.class_id, self.method_id) = (class_id, method_id);
        }
        self
    }
}

/// Cuts a text to what a short string holds, between two characters.
fn fit(mut text: String) -> String {
    if text.len() > TEXT_MAX {
        let cut = (0..=TEXT_MAX - 3).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(cut);
        text.push_str("...");
    }
    text
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.code, self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_has_the_name_of_its_code_in_front() {
        let refusal = Refusal::not_found("no queue 'q' in vhost '/'").by_method(50, 10).by_method(60, 40);
        assert_eq!(refusal.text, "NOT_FOUND - no queue 'q' in vhost '/'");
        assert_eq!((refusal.scope, refusal.code), (Scope::Channel, 404));
        assert_eq!((refusal.class_id, refusal.method_id), (50, 10));
    }

    #[test]
    fn long_texts_end_in_dots() {
        let text = Refusal::not_found("ä".repeat(300)).text;
        assert!(text.len() <= TEXT_MAX && text.ends_with("ä..."), "{text}");
    }
}
