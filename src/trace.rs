//! The W3C trace context of messages: what a `traceparent` looks like, and carrying it from the message that is being
//! handled to those that are published meanwhile.
//!
//! Makes no spans and knows no tracer: who has one sets the header, or reads it.

use std::cell::RefCell;

use crate::message::Message;

/// Which request a message belongs to, and which step of it sent the message.
const TRACEPARENT: &str = "traceparent";
/// What tracing systems have to say beside that.
const TRACESTATE: &str = "tracestate";
/// Version, trace id, parent id and flags, with a dash between each (section 3.2.2 of the specification).
const TRACEPARENT_LEN: usize = 55;
/// How much of a `tracestate` has to be carried at least (section 3.3.1.5), and is here at most.
const TRACESTATE_MAX: usize = 512;
/// How many members a `tracestate` may have (section 3.3.1.1).
const TRACESTATE_MEMBERS: usize = 32;

/// Trace context.
///
/// A message that is handled while another one is published lends it its own: whatever the thread of a handler publishes,
/// by its [`Context`](crate::Context) or by any pool, and calls it makes through an
/// [`RpcClient`](crate::rpc::RpcClient), carry the `traceparent` and `tracestate` of the delivery, unless they have a header
/// `traceparent` of their own. The callbacks of a [`bus`](crate::bus) do the same. Answers of workers, messages that
/// wait to be tried again and those that are dead-lettered keep it too. Threads that a handler starts, and callbacks that
/// are run later, do not have it.
impl Message {
    /// The header `traceparent`, by which tracing systems tell what belongs to one request
    /// (<https://www.w3.org/TR/trace-context/#traceparent-header>). `None` also if there is one that is malformed, which by
    /// that specification is as good as none.
    ///
    /// ```
    /// use coney::Message;
    ///
    /// let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    /// assert_eq!(Message::new("hello").with_traceparent(parent).traceparent(), Some(parent));
    /// assert_eq!(Message::new("hello").with_traceparent("nonsense").traceparent(), None);
    /// ```
    pub fn traceparent(&self) -> Option<&str> {
        if self.headers().is_empty() {
            return None;
        }
        self.headers().get(TRACEPARENT)?.as_str().filter(|text| is_traceparent(text))
    }

    /// Sets the header `traceparent`. One that is malformed is not set.
    pub fn with_traceparent(self, traceparent: impl Into<String>) -> Message {
        let traceparent = traceparent.into();
        if is_traceparent(&traceparent) { self.with_header(TRACEPARENT, traceparent) } else { self }
    }

    /// The header `tracestate`, which goes with `traceparent`. `None` also without a valid `traceparent`, or if it is longer
    /// than 512 characters, has more than 32 members, or is not printable ASCII.
    pub fn tracestate(&self) -> Option<&str> {
        self.traceparent()?;
        self.headers().get(TRACESTATE)?.as_str().filter(|text| is_tracestate(text))
    }

    /// Sets the header `tracestate`. One that is malformed is not set.
    pub fn with_tracestate(self, tracestate: impl Into<String>) -> Message {
        let tracestate = tracestate.into();
        if is_tracestate(&tracestate) { self.with_header(TRACESTATE, tracestate) } else { self }
    }
}

/// Whether this is a `traceparent` of version 00, or of a later one that can be read as that.
fn is_traceparent(text: &str) -> bool {
    let bytes = text.as_bytes();
    let hex = |range: std::ops::Range<usize>| {
        bytes[range].iter().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte))
    };
    let some = |range: std::ops::Range<usize>| bytes[range].iter().any(|byte| *byte != b'0');
    if bytes.len() < TRACEPARENT_LEN || [2, 35, 52].iter().any(|dash| bytes[*dash] != b'-') {
        return false;
    }
    let is_complete = match &bytes[..2] {
        b"ff" => false,
        b"00" => bytes.len() == TRACEPARENT_LEN,
        // What a later version adds comes behind another dash.
        _ => bytes.get(TRACEPARENT_LEN).is_none_or(|next| *next == b'-'),
    };
    is_complete && hex(0..2) && hex(3..35) && some(3..35) && hex(36..52) && some(36..52) && hex(53..55)
}

fn is_tracestate(text: &str) -> bool {
    let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    printable && (1..=TRACESTATE_MAX).contains(&text.len()) && text.split(',').count() <= TRACESTATE_MEMBERS
}

#[derive(Debug, Clone)]
struct Current {
    traceparent: String,
    tracestate: Option<String>,
}

thread_local! {
    /// Of the message that this thread handles.
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
}

/// While it lives, the messages of this thread belong to what another message belongs to.
#[derive(Debug)]
pub(crate) struct Scope {
    before: Option<Current>,
}

/// Begins to handle `message`.
pub(crate) fn handling(message: &Message) -> Scope {
    let current = message.traceparent().map(|traceparent| Current {
        traceparent: traceparent.to_owned(),
        tracestate: message.tracestate().map(str::to_owned),
    });
    Scope { before: replace(current) }
}

/// Puts `current` in the place of what there is. In a destructor of another thread-local there may be nothing any more.
fn replace(current: Option<Current>) -> Option<Current> {
    CURRENT.try_with(|slot| slot.replace(current)).unwrap_or_default()
}

impl Drop for Scope {
    fn drop(&mut self) {
        replace(self.before.take());
    }
}

/// The message as it is to be published by this thread.
pub(crate) fn carried_by(message: Message) -> Message {
    let current = CURRENT.try_with(|current| current.borrow().clone()).unwrap_or_default();
    match current {
        Some(current) if !message.headers().contains_key(TRACEPARENT) => {
            let message = message.with_header(TRACEPARENT, current.traceparent.as_str());
            match &current.tracestate {
                Some(tracestate) => message.with_header(TRACESTATE, tracestate.as_str()),
                None => message,
            }
        }
        _ => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_the_specification_calls_malformed_is_ignored() {
        let of = |parent: &str| Message::new("").with_header(TRACEPARENT, parent).traceparent().is_some();
        assert!(of(PARENT));
        for malformed in [
            "",
            "00",
            &PARENT[1..],
            &format!("{PARENT}-"),
            &PARENT.to_uppercase(),
            &PARENT.replacen("00", "ff", 1),
            &PARENT.replacen("00", "0g", 1),
            &PARENT.replacen('-', "_", 1),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0x",
            "00-äbf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
        ] {
            assert!(!of(malformed), "{malformed}");
        }
        let later = PARENT.replacen("00", "cc", 1);
        assert!(of(&later) && of(&format!("{later}-what")) && !of(&format!("{later}x")));
        assert!(Message::new("").with_header(TRACEPARENT, 7).traceparent().is_none());
    }

    #[test]
    fn a_state_goes_only_with_a_parent_and_only_if_it_is_well_formed() {
        let message = Message::new("").with_tracestate("vendor=1");
        assert_eq!(message.tracestate(), None);
        assert_eq!(message.with_traceparent(PARENT).tracestate(), Some("vendor=1"));
        let members = |count: usize| vec!["a=1"; count].join(",");
        for malformed in [String::new(), "a=ä".to_owned(), "a".repeat(513), members(33)] {
            assert_eq!(Message::new("").with_traceparent(PARENT).with_tracestate(malformed).tracestate(), None);
        }
        assert!(Message::new("").with_traceparent(PARENT).with_tracestate(members(32)).tracestate().is_some());
    }

    #[test]
    fn a_scope_lends_its_context_to_messages_without_one_and_ends() {
        let other = PARENT.replace("4bf9", "5bf9");
        let plain = || carried_by(Message::new("x"));
        let outer = handling(&Message::new("").with_traceparent(PARENT).with_tracestate("v=1"));
        assert_eq!((plain().traceparent(), plain().tracestate()), (Some(PARENT), Some("v=1")));
        let own = carried_by(Message::new("x").with_traceparent(&other));
        assert_eq!((own.traceparent(), own.tracestate()), (Some(&*other), None));
        let inner = handling(&Message::new("no context"));
        assert_eq!(plain(), Message::new("x"));
        drop(inner);
        assert_eq!(plain().traceparent(), Some(PARENT));
        drop(outer);
        assert_eq!(plain(), Message::new("x"));
    }
}
