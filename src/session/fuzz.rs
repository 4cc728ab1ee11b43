//! What fuzzers and benchmarks feed with bytes that a broker might send. Nothing here is part of the interface.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::channel_state::{ChannelState, ChannelTable, Incoming, Sink};
use super::core::FRAME_MAX;
use super::handshake::Introduction;
use super::inbound::{ForControl, Inbound};
use crate::amqp::frame;
use crate::amqp::method::Method;
use crate::settings::BrokerSettings;

const BODY_MAX: u64 = 128 << 20;
/// The channels that are open. The last one is all amiquip's.
const CHANNELS: u16 = 8;

/// Counts what comes.
#[derive(Default)]
struct Counter(AtomicU64);

impl Sink for Counter {
    fn take(&self, _: Incoming) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn ended(&self) {}
}

/// Takes bytes as they would come from a socket. Calls `for_amiquip` with what amiquip would get. Returns how much came on
/// channels of ours, or why the connection would end.
pub fn inbound(mut bytes: &[u8], mut for_amiquip: impl FnMut(&[u8])) -> Result<u64, String> {
    let (counter, channels) = (Arc::<Counter>::default(), ChannelTable::default());
    for number in 1..=CHANNELS {
        let sink: Arc<dyn Sink> = Arc::clone(&counter) as _;
        let state = Arc::new(ChannelState::new(number, Some(sink).filter(|_| number < CHANNELS)));
        state.ask_for(u8::MAX);
        channels.insert(state);
    }
    let mut inbound = Inbound::new(FRAME_MAX, BODY_MAX);
    let introduction = Introduction::new("fuzz", &BrokerSettings::default());
    loop {
        let taken = inbound.take(bytes, &channels, |for_control| {
            match for_control {
                ForControl::Frame(frame) | ForControl::ChannelCloseOk { frame, .. } => for_amiquip(frame),
                ForControl::ChannelClose { frame, .. } => for_amiquip(&frame),
                // As the connection does: amiquip is shown another.
                ForControl::Start { mechanisms, .. } => {
                    if let Ok(shown) = introduction.shown_start(mechanisms) {
                        for_amiquip(&framed(&shown.into()));
                    }
                }
                ForControl::Connection(method) => for_amiquip(&framed(&method)),
            }
            Ok(())
        });
        match taken {
            Ok(Some(length)) => bytes = &bytes[length..],
            Ok(None) => return Ok(counter.0.load(Ordering::Relaxed)),
            Err(end) => return Err(format!("{end:?}")),
        }
    }
}

fn framed(method: &Method) -> Vec<u8> {
    let mut frame = Vec::new();
    frame::write_method(&mut frame, 0, method);
    frame
}
