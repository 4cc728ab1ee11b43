//! What is written beside amiquip, as it goes on the wire: messages and settlements, as amiquip would write them.

use std::sync::Arc;

use amq_protocol::frame::generation::{gen_content_body_frame, gen_content_header_frame, gen_method_frame};
use amq_protocol::protocol::AMQPClass;
use amq_protocol::protocol::basic::{AMQPMethod, Ack, Publish, Reject};

use crate::message::Message;

/// A message, and how it is to be sent.
#[derive(Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    pub(crate) exchange: &'a str,
    pub(crate) routing_key: &'a str,
    pub(crate) message: &'a Arc<Message>,
    pub(crate) mandatory: bool,
    /// One of a stream, of which amiquip writes in one go what has come together.
    pub(crate) of_stream: bool,
}

/// What becomes of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settlement {
    Ack,
    /// With all before it that are not settled.
    AckUpTo,
    Reject,
    Requeue,
}

/// Class `basic`.
const BASIC: u16 = 60;

/// Frame type, channel, size and end octet of three frames; class, method, reserved, two short strings and flags.
const FIXED: usize = 3 * 8 + 4 + 2 + 2 * 256 + 1;

/// A frame that settles a delivery: type, channel, size, class, method, tag, flag, end octet.
const SETTLEMENT: usize = 7 + 4 + 8 + 1 + 1;

/// Makes `buffer` the frame that settles the delivery with this tag. False if that cannot be done.
pub(crate) fn settle(buffer: &mut Vec<u8>, channel: u16, delivery_tag: u64, settlement: Settlement) -> bool {
    let method = match settlement {
        Settlement::Ack => AMQPMethod::Ack(Ack { delivery_tag, multiple: false }),
        Settlement::AckUpTo => AMQPMethod::Ack(Ack { delivery_tag, multiple: true }),
        Settlement::Reject => AMQPMethod::Reject(Reject { delivery_tag, requeue: false }),
        Settlement::Requeue => AMQPMethod::Reject(Reject { delivery_tag, requeue: true }),
    };
    buffer.clear();
    buffer.resize(SETTLEMENT, 0);
    gen_method_frame((buffer.as_mut_slice(), 0), channel, &AMQPClass::Basic(method)).is_ok()
}

/// Makes `buffer` the frames of a message: method, header and, unless the body is empty, one body frame. False if that cannot
/// be done.
pub(crate) fn publish(
    buffer: &mut Vec<u8>,
    channel: u16,
    Outgoing { exchange, routing_key, message, mandatory, .. }: Outgoing<'_>,
) -> bool {
    let body = message.body();
    buffer.clear();
    buffer.resize(FIXED + message.header_len() + body.len(), 0);
    let method = AMQPClass::Basic(AMQPMethod::Publish(Publish {
        ticket: 0,
        exchange: exchange.to_owned(),
        routing_key: routing_key.to_owned(),
        mandatory,
        immediate: false,
    }));
    let space = (buffer.as_mut_slice(), 0);
    let frames = gen_method_frame(space, channel, &method)
        .and_then(|space| {
            gen_content_header_frame(space, channel, BASIC, body.len() as u64, &message.amqp_properties())
        })
        .and_then(|space| if body.is_empty() { Ok(space) } else { gen_content_body_frame(space, channel, body) });
    let Ok((_, length)) = frames else { return false };
    buffer.truncate(length);
    true
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use amq_protocol::frame::AMQPFrame;
    use amq_protocol::frame::parsing::parse_frame;

    use super::*;

    fn published(outgoing: Outgoing<'_>) -> Vec<AMQPFrame> {
        let mut buffer = vec![1; 7];
        assert!(publish(&mut buffer, 7, outgoing));
        parsed(&buffer)
    }

    fn parsed(buffer: &[u8]) -> Vec<AMQPFrame> {
        let mut frames = Vec::new();
        let mut rest = buffer;
        while !rest.is_empty() {
            let (after, frame) = parse_frame(rest).expect("a frame");
            frames.push(frame);
            rest = after;
        }
        frames
    }

    #[test]
    fn a_message_of_the_largest_size_is_three_frames_with_all_of_it_in_them() {
        let long = "x".repeat(255);
        let mut message = Message::new(vec![9; 100_000])
            .with_content_type(&long)
            .with_content_encoding(&long)
            .with_priority(9)
            .with_correlation_id(&long)
            .with_reply_to(&long)
            .with_expiration(Duration::from_millis(u32::MAX.into()))
            .with_message_id(&long)
            .with_timestamp(std::time::SystemTime::now())
            .with_kind(&long)
            .with_user_id(&long)
            .with_app_id(&long)
            .with_cluster_id(&long);
        for n in 0..100 {
            message = message.with_header(format!("header {n}"), long.as_str());
        }
        let message = Arc::new(message);
        let outgoing =
            Outgoing { exchange: &long, routing_key: &long, message: &message, mandatory: true, of_stream: false };
        let frames = published(outgoing);
        let [AMQPFrame::Method(7, method), AMQPFrame::Header(7, BASIC, header), AMQPFrame::Body(7, body)] = &frames[..]
        else {
            panic!("{frames:?}")
        };
        let publish =
            Publish { ticket: 0, exchange: long.clone(), routing_key: long.clone(), mandatory: true, immediate: false };
        assert_eq!(*method, AMQPClass::Basic(AMQPMethod::Publish(publish)));
        assert_eq!((header.body_size, &header.properties), (100_000, &message.amqp_properties()));
        assert_eq!(body, message.body());
    }

    #[test]
    fn an_empty_body_has_no_frame() {
        let message = Arc::new(Message::new(""));
        let outgoing =
            Outgoing { exchange: "", routing_key: "q", message: &message, mandatory: false, of_stream: false };
        assert_eq!(published(outgoing).len(), 2);
    }

    #[test]
    fn each_settlement_is_one_frame_that_says_so() {
        let delivery_tag = u64::MAX - 1;
        for (settlement, expected) in [
            (Settlement::Ack, AMQPMethod::Ack(Ack { delivery_tag, multiple: false })),
            (Settlement::AckUpTo, AMQPMethod::Ack(Ack { delivery_tag, multiple: true })),
            (Settlement::Reject, AMQPMethod::Reject(Reject { delivery_tag, requeue: false })),
            (Settlement::Requeue, AMQPMethod::Reject(Reject { delivery_tag, requeue: true })),
        ] {
            let mut buffer = Vec::new();
            assert!(settle(&mut buffer, 7, delivery_tag, settlement));
            assert_eq!(parsed(&buffer), [AMQPFrame::Method(7, AMQPClass::Basic(expected))]);
        }
    }
}
