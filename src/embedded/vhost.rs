//! A virtual host: exchanges, queues, channels, and the one lock over all of them.
//!
//! Lock order: the virtual host's state, then leaves: an outbox's own lock, the clock's, that of the news. Never the
//! other way round, and no I/O nor anybody's code under it. Frames are pushed while the lock is held, which is what
//! fixes their order: a deliver never before its consume-ok nor after its cancel-ok, a return before its ack.
//!
//! What may be long is done in slices, and who waits for the lock has a turn between two of them.

mod basic;
mod channel;
mod declare;
mod deliver;
mod exchanges;
mod hurt;
mod look;
mod perform;
mod publish;
mod rest;
mod room;
mod sessions;
mod settle;
mod state;
mod streams;
mod timers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

pub(crate) use self::channel::ChannelKey;
pub(super) use self::look::{BindingFacts, ConsumerFacts, ExchangeFacts, QueueFacts};
use self::rest::SLICE;
use self::sessions::Closing;
use self::state::{Discarded, State};
use super::clock::{Alarm, Overdue};
use super::news::News;
use super::outbox::{Outbox, SessionId};
use super::refusal::Refusal;
use super::release::Release;
use super::users::User;
use crate::amqp::method::{BasicPublish, Method};

/// What the engine lets pass.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Limits {
    pub(crate) release: Release,
    /// How long a delivery may stay unacked before its channel is closed; `None` is for ever.
    pub(crate) consumer_timeout: Option<Duration>,
    /// Whether queues may be quorum queues.
    pub(crate) quorum_queues: bool,
}

/// A virtual host.
#[derive(Debug)]
pub(crate) struct VHost {
    name: String,
    alarm: Alarm,
    news: Arc<News>,
    state: Mutex<State>,
}

impl VHost {
    /// An empty one, with the exchanges every virtual host has. The clock has still to be told to watch it.
    pub(crate) fn new(name: &str, limits: Limits, alarm: Alarm, news: Arc<News>) -> Arc<VHost> {
        let state = Mutex::new(State::new(name, limits));
        Arc::new(VHost { name: name.to_string(), alarm, news, state })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Changes something, then sees to what follows from it.
    fn change<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let outcome = act(&mut state);
        self.follow_up(state);
        outcome
    }

    /// Sees to what follows from a change, and tells those who wait for one.
    fn follow_up(&self, mut state: MutexGuard<'_, State>) {
        // What others discard is theirs to free.
        let mut discarded = std::mem::take(&mut state.discarded);
        attend(&mut state, &mut discarded);
        let sooner = state.timers.sooner();
        drop(state);
        drop(discarded);
        if let Some(at) = sooner {
            self.alarm.at(at);
        }
        self.news.tell();
    }

    /// Opens a channel. `wants_cancel` says whether the client has the capability `consumer_cancel_notify`.
    pub(crate) fn open_channel(
        &self,
        outbox: &Arc<Outbox>,
        user: &Arc<User>,
        number: u16,
        wants_cancel: bool,
    ) -> ChannelKey {
        self.change(|state| state.open_channel(outbox, user, number, wants_cancel))
    }

    /// Ends a channel: its consumers go, what it has not acked is ready again, in its old place.
    pub(crate) fn close_channel(&self, channel: ChannelKey) {
        let mut state = self.state();
        let closing = state.begin_closing(&[channel]);
        finish_closing(&mut state, closing);
        self.follow_up(state);
    }

    /// Ends all channels of a connection and deletes its exclusive queues.
    pub(crate) fn close_session(&self, session: SessionId) {
        let mut state = self.state();
        let closing = state.begin_closing_session(session);
        finish_closing(&mut state, closing);
        self.follow_up(state);
    }

    /// Performs any method of the classes access, exchange, queue, basic, tx and confirm but `basic.publish`. The reply,
    /// if there is to be one, is in the outbox when this returns.
    pub(crate) fn perform(&self, channel: ChannelKey, method: Method) -> Result<(), Refusal> {
        let (class_id, method_id) = (method.class_id(), method.method_id());
        self.change(|state| state.perform(channel, method)).map_err(|refusal| refusal.by_method(class_id, method_id))
    }

    /// Publishes. `properties` are the flags and values as they came.
    pub(crate) fn publish(
        &self,
        channel: ChannelKey,
        publish: BasicPublish,
        properties: Box<[u8]>,
        body: Vec<u8>,
    ) -> Result<(), Refusal> {
        let mut state = self.state();
        let outcome = state.publish(channel, &publish, properties, body.into()).map(|routed| {
            let Some(routed) = routed else { return };
            let mut accepted = true;
            for (number, queues) in state.or_return(channel, &routed).chunks(SLICE).enumerate() {
                if number > 0 {
                    MutexGuard::bump(&mut state);
                }
                accepted &= state.distribute(&routed, queues);
            }
            state.confirm(channel, accepted);
        });
        self.follow_up(state);
        outcome.map_err(|refusal| refusal.by_method(BasicPublish::CLASS_ID, BasicPublish::METHOD_ID))
    }

    /// Tells a connection which of its publishes have been confirmed since the last time.
    pub(crate) fn flush_confirms(&self, session: SessionId) {
        self.state().flush_confirms(session);
    }

    /// A connection's outbox has drained: its consumers may be given messages again.
    pub(crate) fn room_again(&self, session: SessionId) {
        self.change(|state| state.room_again(session));
    }

    /// Sees to what is due. Says when something will be next, and which channels have to be closed.
    pub(super) fn tick(&self, now: Instant) -> (Option<Instant>, Vec<Overdue>) {
        let mut state = self.state();
        let (mut overdue, mut discarded) = (Vec::new(), Vec::new());
        while let Some(due) = state.timers.pop(now) {
            state.see_to(due, now, &mut overdue);
            attend(&mut state, &mut discarded);
            MutexGuard::bump(&mut state);
        }
        let next = state.timers.next();
        self.follow_up(state);
        (next, overdue)
    }
}

/// Closes channels, with turns for others if they have much to give back.
fn finish_closing(state: &mut MutexGuard<'_, State>, mut closing: Closing) {
    while state.close_some(&mut closing) {
        MutexGuard::bump(state);
    }
}

/// Does what is left to do, unless somebody is at it already.
fn attend(state: &mut MutexGuard<'_, State>, discarded: &mut Vec<Discarded>) {
    if std::mem::replace(&mut state.is_attended, true) {
        return;
    }
    while state.do_some() {
        discarded.append(&mut state.discarded);
        MutexGuard::bump(state);
    }
    discarded.append(&mut state.discarded);
    state.is_attended = false;
}

#[cfg(test)]
mod tests;
