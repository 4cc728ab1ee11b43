//! Where calls are handed in: what there is of a channel for them, and the two threads that come and go.
//!
//! - `coney-rpc-connect` opens a channel, and tries again while that may help. It ends with that.
//! - `coney-rpc-callbacks` sends calls that came while there was no channel, looks at the deadlines of those with a callback, and
//!   runs the callbacks. It begins with the first of them and ends with the client.
//!
//! Lock order: the dispatcher's lock is a leaf but for `flight`, whose lock is one too. No channel is opened, used or dropped under it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, Builder, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use super::call_channel::CallChannel;
use super::flight::{Answered, Asker, Call, Counters, Slot, during};
use super::pending::{Pending, Waiting};
use crate::connection::Received;
use crate::connection::callback::Outstanding;
use crate::connection::publisher::after_a_wait;
use crate::error::{Error, Result, counted};
use crate::message::Message;
use crate::pool::{Backoff, Pool, PoolClosed};
use crate::session::Waker;

/// How long the thread for callbacks waits that has nothing to look after.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

struct State {
    channel: Option<Arc<CallChannel>>,
    is_connecting: bool,
    connector: Option<JoinHandle<()>>,
    /// Until when no attempt to connect is made, and why the last one failed.
    failed: Option<(Instant, Error)>,
    backoff: Backoff,
    /// Calls with a callback that came while there was no channel.
    pending: Waiting,
    /// Callbacks to be run that no channel knows of.
    answered: Vec<Answered>,
    runner: Option<JoinHandle<()>>,
    /// The runner itself, also when it is being waited for.
    runs_callbacks: Option<ThreadId>,
    /// Wakes the runner at the socket of this channel.
    waker: Option<Arc<Waker>>,
    /// Something has changed that the runner has not seen.
    has_news: bool,
    /// Threads that have handed in a call and have no answer.
    calling: usize,
    /// No more calls are taken.
    is_closed: bool,
    /// The pool wants its connection back.
    is_leaving: bool,
}

impl State {
    fn new() -> State {
        State {
            channel: None,
            is_connecting: false,
            connector: None,
            failed: None,
            backoff: Backoff::of_connecting(),
            pending: Waiting::default(),
            answered: Vec::new(),
            runner: None,
            runs_callbacks: None,
            waker: None,
            has_news: false,
            calling: 0,
            is_closed: false,
            is_leaving: false,
        }
    }
}

/// See the [module](self).
pub(super) struct Dispatcher {
    pool: Pool,
    counters: Arc<Counters>,
    state: Mutex<State>,
    changed: Condvar,
    this: Weak<Dispatcher>,
}

/// What there is of a channel.
enum Found {
    Open(Arc<CallChannel>),
    /// The reason, if there is one.
    NotYet(Option<Error>),
    Never(Error),
}

impl Dispatcher {
    pub(super) fn of(pool: &Pool) -> Arc<Dispatcher> {
        let dispatcher = Arc::new_cyclic(|this| Dispatcher {
            pool: pool.clone(),
            counters: Arc::default(),
            state: Mutex::new(State::new()),
            changed: Condvar::new(),
            this: Weak::clone(this),
        });
        let observer: Weak<Dispatcher> = Arc::downgrade(&dispatcher);
        pool.notify_when_closed(observer);
        dispatcher
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes those who wait for a change of the state.
    fn change(&self, mut state: MutexGuard<'_, State>) {
        state.has_news = true;
        let waker = state.waker.clone();
        drop(state);
        self.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Counts the calling thread until it has its answer. What is handed in before the client is closed is carried out.
    fn begin_to_call(&self, queue: &str) -> Result<Calling<'_>> {
        let mut state = self.state();
        if state.is_closed {
            return Err(closed(queue));
        }
        state.calling += 1;
        Ok(Calling(self))
    }

    /// Makes a call and waits for its answer.
    pub(super) fn call(&self, message: Message, call: Call, slot: &Slot) -> Result<Received> {
        let (deadline, timeout, queue) = (call.deadline, call.timeout, call.queue.clone());
        let timed_out = || Error::Timeout { during: during(&queue), after: timeout };
        if deadline <= Instant::now() {
            return Err(timed_out());
        }
        self.pool.maker().check()?;
        let _calling = self.begin_to_call(&queue)?;
        let channel = self.wait_for_channel(deadline)?.ok_or_else(timed_out)?;
        let answer = match channel.wait_unblocked(deadline, timeout).map(|()| channel.send(message, call)) {
            Ok(Ok(number)) => {
                let answer = channel.wait(number, slot, deadline);
                answer.unwrap_or_else(|| Err(channel.flight.too_late(number, &queue, timeout)))
            }
            Ok(Err(unsent)) => Err(unsent.error),
            Err(blocked) => Err(blocked),
        };
        self.leave_if_due(&channel);
        answer
    }

    /// Waits until there is room for one more callback, which `outstanding` counts already, and the broker takes requests. A
    /// callback that calls does not wait: nobody else would make room for it.
    pub(super) fn wait_for_room(
        &self,
        outstanding: &Outstanding,
        queue: &str,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<()> {
        let max = self.pool.settings().max_in_flight;
        let state = self.state();
        if state.is_closed || state.runs_callbacks == Some(thread::current().id()) {
            return Ok(());
        }
        let channel = state.channel.clone().filter(|channel| channel.is_open());
        drop(state);
        if outstanding.wait_for(Instant::now(), max).is_err() {
            if let Some(channel) = &channel {
                channel.flush();
            }
            if let Err(count) = outstanding.wait_for(deadline, after_a_wait(max)) {
                let reason = self.state().failed.as_ref().map(|(_, error)| error.clone());
                let during = || format!("{} with {} outstanding", during(queue), counted(count, "callback"));
                return Err(reason.unwrap_or_else(|| Error::Timeout { during: during(), after: timeout }));
            }
        }
        channel.map_or(Ok(()), |channel| channel.wait_unblocked(deadline, timeout))
    }

    /// Makes a call whose answer is a callback's.
    pub(super) fn call_later(&self, message: Message, call: Call) {
        if let (Err(forked), Asker::Callback(_)) = (self.pool.maker().check(), &call.asker) {
            if let Asker::Callback(callback) = call.asker {
                callback(Err(forked));
            }
            return;
        }
        let mut state = self.state();
        if state.is_closed {
            drop(state);
            if let Asker::Callback(callback) = call.asker {
                callback(Err(closed(&call.queue)));
            }
            return;
        }
        let channel = state.channel.clone().filter(|channel| channel.is_open() && !state.is_leaving);
        let has_runner = state.runner.is_some();
        let Some(channel) = channel.filter(|_| state.pending.is_empty()) else {
            state.pending.push(Pending { message, call });
            drop(state);
            self.start_runner();
            let state = self.state();
            return self.change(state);
        };
        drop(state);
        if !has_runner {
            self.start_runner();
        }
        let was_idle = !channel.flight.has_callbacks();
        match channel.send(message, call) {
            // The runner sleeps while there is nothing to wait for.
            Ok(_) if was_idle => {
                let state = self.state();
                self.change(state);
            }
            Ok(_) => {}
            Err(unsent) => {
                if let Some(answered) = unsent.into_answered() {
                    self.run_later(answered);
                }
            }
        }
    }

    /// Has a callback run, or runs it if nobody else does any more.
    pub(super) fn run_later(&self, answered: Answered) {
        let mut state = self.state();
        if state.is_closed {
            drop(state);
            return answered.tell();
        }
        state.answered.push(answered);
        drop(state);
        self.start_runner();
        let state = self.state();
        self.change(state);
    }

    /// The channel, if there is one; if not, one is on its way unless that is of no use.
    fn find(&self, state: &mut State) -> (Found, Option<Arc<CallChannel>>) {
        if state.is_leaving {
            return (Found::Never(Error::PoolClosed { pool: self.pool.name().to_owned() }), None);
        }
        let mut old = None;
        match &state.channel {
            Some(channel) if channel.is_open() => return (Found::Open(Arc::clone(channel)), None),
            Some(_) => {
                old = state.channel.take();
                state.waker = None;
            }
            None => {}
        }
        if let Some((until, error)) = &state.failed
            && Instant::now() < *until
        {
            let error = error.clone();
            let found = if error.is_transient() { Found::NotYet(Some(error)) } else { Found::Never(error) };
            return (found, old);
        }
        if !state.is_connecting {
            state.is_connecting = true;
            if let Err(error) = self.start_connector(state) {
                state.is_connecting = false;
                return (Found::Never(error), old);
            }
        }
        let reason = state.failed.as_ref().map(|(_, error)| error.clone());
        (Found::NotYet(reason), old)
    }

    /// Waits for a channel until `deadline`; `None` if there is none by then and no reason for it.
    fn wait_for_channel(&self, deadline: Instant) -> Result<Option<Arc<CallChannel>>> {
        let mut state = self.state();
        loop {
            let (found, old) = self.find(&mut state);
            let reason = match found {
                Found::Open(channel) => return Ok(Some(channel)),
                Found::Never(error) => {
                    drop(state);
                    drop(old);
                    return Err(error);
                }
                Found::NotYet(reason) => reason,
            };
            if let Some(old) = old {
                drop(state);
                drop(old);
                state = self.state();
                continue;
            }
            let now = Instant::now();
            if deadline <= now {
                return reason.map_or(Ok(None), Err);
            }
            let next = state.failed.as_ref().map(|(until, _)| *until).filter(|until| *until > now);
            let until = next.map_or(deadline, |next| next.min(deadline));
            state = self.changed.wait_timeout(state, until - now).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn start_connector(&self, state: &mut State) -> Result<()> {
        let name = "coney-rpc-connect".to_owned();
        let Some(this) = self.this.upgrade() else { return Ok(()) };
        // The one before has done its work.
        drop(state.connector.take());
        let started = Builder::new().name(name.clone()).spawn(move || this.connect());
        state.connector = Some(started.map_err(|source| Error::Thread { name, source: Arc::new(source) })?);
        Ok(())
    }

    /// Opens a channel, once. An attempt has an attempt's time, whatever the calls have left: cut short, none might ever
    /// succeed.
    fn connect(&self) {
        let timeout = self.pool.settings().broker.connect_timeout;
        let opened = self
            .pool
            .connection_once(timeout)
            .and_then(|connection| CallChannel::open(connection, Arc::clone(&self.counters)));
        let mut state = self.state();
        state.is_connecting = false;
        match opened {
            Ok(channel) if state.is_leaving => {
                drop(state);
                drop(channel);
                return self.change(self.state());
            }
            Ok(channel) => {
                state.failed = None;
                state.backoff.reset();
                state.channel = Some(Arc::new(channel));
            }
            Err(error) => {
                log::debug!("rpc client: {error}");
                let wait = state.backoff.next();
                state.failed = Some((Instant::now() + wait, error));
            }
        }
        self.change(state);
    }

    fn start_runner(&self) {
        let mut state = self.state();
        if state.runner.is_some() {
            return;
        }
        let Some(this) = self.this.upgrade() else { return };
        match Builder::new().name("coney-rpc-callbacks".to_owned()).spawn(move || this.run()) {
            Ok(runner) => state.runner = Some(runner),
            Err(error) => {
                log::error!("rpc client: no thread for callbacks: {error}; they are told so");
                let (pending, answered) = (state.pending.take(), std::mem::take(&mut state.answered));
                drop(state);
                // Told by being dropped.
                drop((pending, answered));
            }
        }
    }

    /// Runs callbacks until the client is closed and all are done.
    fn run(self: Arc<Dispatcher>) {
        self.state().runs_callbacks = Some(thread::current().id());
        loop {
            let now = Instant::now();
            let mut state = self.state();
            state.has_news = false;
            let mut answered = std::mem::take(&mut state.answered);
            let mut old = None;
            let mut to_send = None;
            if !state.pending.is_empty() {
                let (found, dropped) = self.find(&mut state);
                old = dropped;
                match found {
                    Found::Open(_) => to_send = Some(state.pending.take()),
                    Found::NotYet(reason) => state.pending.expire(now, reason.as_ref(), &mut answered),
                    Found::Never(error) => state.pending.fail(&error, &mut answered),
                }
            }
            let channel = state.channel.clone();
            let due = state.pending.due();
            let retry = state.failed.as_ref().map(|(until, _)| *until).filter(|_| due.is_some());
            let is_done = state.is_closed && state.pending.is_empty();
            drop(state);
            drop(old);
            if let Some(channel) = &channel {
                for Pending { message, call } in to_send.into_iter().flatten() {
                    if let Err(unsent) = channel.send(message, call) {
                        answered.extend(unsent.into_answered());
                    }
                }
            }
            let mut due = due.into_iter().chain(retry).min();
            if let Some(channel) = &channel {
                let (mut more, next) = channel.flight.take_answered(now);
                answered.append(&mut more);
                due = due.into_iter().chain(next).min();
            }
            if !answered.is_empty() {
                answered.into_iter().for_each(Answered::tell);
                continue;
            }
            let is_waited_for = channel.as_ref().is_some_and(|channel| channel.flight.has_callbacks());
            if is_done && !is_waited_for {
                return;
            }
            if let Some(channel) = &channel {
                self.leave_if_due(channel);
            }
            let until = due.unwrap_or_else(|| now + LONGEST_WAIT);
            match channel.filter(|channel| is_waited_for && channel.is_open()) {
                Some(channel) => self.wait_at(&channel, until),
                None => self.wait_for_news(until),
            }
        }
    }

    fn wait_for_news(&self, until: Instant) {
        let mut state = self.state();
        while !state.has_news {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits at the socket, for answers and for news.
    fn wait_at(&self, channel: &CallChannel, until: Instant) {
        let mut state = self.state();
        let waker = match &state.waker {
            Some(waker) => Arc::clone(waker),
            None => match channel.waker() {
                Ok(waker) => Arc::clone(state.waker.insert(Arc::new(waker))),
                Err(error) => {
                    drop(state);
                    log::warn!("rpc client: {error}");
                    return self.wait_for_news(until.min(Instant::now() + Duration::from_millis(50)));
                }
            },
        };
        drop(state);
        channel.wait_until(Some(&waker), until, || {
            channel.flight.has_answered() || channel.flight.has_ended() || self.state().has_news
        });
    }

    /// Gives the connection back if the pool wants it and nothing is under way.
    fn leave_if_due(&self, channel: &Arc<CallChannel>) {
        let mut state = self.state();
        if !state.is_leaving || !channel.flight.is_empty() {
            return;
        }
        let channel = state.channel.take();
        state.waker = None;
        drop(state);
        drop(channel);
    }

    /// Takes no more calls, waits for those in flight, each until its own deadline, and gives the connection back.
    pub(super) fn close(&self) {
        if self.pool.maker().is_parent() {
            return;
        }
        let mut state = self.state();
        state.is_closed = true;
        self.change(state);
        // It ends once every callback is run.
        let runner = self.state().runner.take();
        join(runner);
        let mut state = self.state();
        while state.calling > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let (channel, connector) = (state.channel.take(), state.connector.take());
        drop(state);
        drop(channel);
        join(connector);
        // It may have been opened for calls whose time was up by then.
        let channel = self.state().channel.take();
        drop(channel);
    }
}

/// A thread that has handed in a call.
struct Calling<'a>(&'a Dispatcher);

impl Drop for Calling<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.calling -= 1;
        let is_last = state.calling == 0 && state.is_closed;
        drop(state);
        if is_last {
            self.0.changed.notify_all();
        }
    }
}

fn closed(queue: &str) -> Error {
    Error::ConnectionLost { during: during(queue), detail: "the client was closed".to_owned() }
}

/// A callback that drops the last client runs on a thread that cannot wait for itself.
fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread
        && thread.thread().id() != thread::current().id()
    {
        // There is nothing in it that could panic but what is caught.
        let _ = thread.join();
    }
}

impl PoolClosed for Dispatcher {
    fn pool_closed(&self) {
        let mut state = self.state();
        state.is_leaving = true;
        let channel = state.channel.clone();
        self.change(state);
        if let Some(channel) = channel {
            self.leave_if_due(&channel);
        }
    }
}
