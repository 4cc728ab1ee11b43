//! The properties of a stored message, as bytes.

use crate::error::StoreError;
use crate::message::Message;

/// As AMQP's content header has them, from the flags on.
pub(super) fn write(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.write_properties(&mut bytes);
    bytes
}

/// The message that was stored. Without properties it is persistent, and has this content type.
pub(super) fn read(
    properties: Option<&[u8]>,
    content_type: Option<String>,
    message_id: &str,
    body: Vec<u8>,
) -> Result<Message, StoreError> {
    let mut message = match properties {
        Some(bytes) => Message::read_properties(bytes).map_err(|malformed| {
            StoreError::Corrupt(format!("the properties of message {message_id:?}: {malformed}"))
        })?,
        None => match content_type {
            Some(content_type) => Message::new(Vec::new()).with_content_type(content_type),
            None => Message::new(Vec::new()),
        },
    };
    *message.body_mut() = body;
    if message.message_id().is_none() {
        message = message.with_message_id(message_id);
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_as_it_was_written() {
        let message = Message::new("body")
            .with_message_id("7")
            .with_content_type("text/plain")
            .with_header("number", 5)
            .transient();
        let read = read(Some(&write(&message)), None, "7", b"body".to_vec()).unwrap();
        assert_eq!(read, message);
    }

    #[test]
    fn a_row_of_another_program_needs_no_properties() {
        let read = read(None, Some("application/json".to_owned()), "7", b"{}".to_vec()).unwrap();
        assert_eq!(read, Message::new("{}").with_content_type("application/json").with_message_id("7"));
    }

    #[test]
    fn properties_that_are_none_are_told() {
        let error = read(Some(b"x"), None, "7", Vec::new()).unwrap_err();
        assert!(error.to_string().contains("the properties of message \"7\""), "{error}");
    }
}
