//! The thread that owns an RPC client's channel.
//!
//! It takes calls from a queue, publishes them, and matches what comes back by correlation id; what it cannot match it
//! counts. When the channel ends, all calls in flight get the cause, and the next call opens another.
//!
//! It waits on several sources at once only when none has anything: being woken is what a call costs, so each turn takes
//! all that is there. Confirms wake nobody. An answer says more, and only a refusal needs to be found, before long.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use amiquip::{Confirm, Consumer, ConsumerMessage, ConsumerOptions};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, never, select};

use super::flight::{Answered, Call, Counters, Flight, during};
use crate::backoff::Backoff;
use crate::connection::Connection;
use crate::delivery::Received;
use crate::error::{Error, Result};
use crate::frames::Outgoing;
use crate::link::{OpenChannel, cancel};
use crate::pool::Pool;

/// The queue that is none: answers come to whoever consumes from it on the channel that asked.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";
/// How long a refusal by the broker may lie about.
const CONFIRMS_LOOK: Duration = Duration::from_millis(50);
/// How much of one kind is taken in one turn, so that none waits for another for ever.
const TURN: usize = 64;

#[expect(clippy::large_enum_variant, reason = "all but one are the large variant, and would each need a box")]
pub(super) enum Work {
    Call(Call),
    /// Take no more calls, and end once those in flight are answered.
    Close,
}

pub(super) struct Owner {
    pool: Pool,
    work: Receiver<Work>,
    callbacks: Sender<Vec<Answered>>,
    counters: Arc<Counters>,
    /// Calls that were taken while there was no channel.
    waiting: Vec<Call>,
    /// Until when no attempt to connect is made, and why the last one failed.
    failed: Option<(Instant, Error)>,
    backoff: Backoff,
    closed: bool,
}

impl Owner {
    pub(super) fn new(
        pool: Pool,
        work: Receiver<Work>,
        callbacks: Sender<Vec<Answered>>,
        counters: Arc<Counters>,
    ) -> Owner {
        let backoff = Backoff::of_connecting();
        Owner { pool, work, callbacks, counters, waiting: Vec::new(), failed: None, backoff, closed: false }
    }

    pub(super) fn run(mut self) {
        while !self.closed
            && let Ok(work) = self.work.recv()
        {
            self.note(work);
            while !self.waiting.is_empty() {
                // Whoever comes now comes to the same end as those before: it is not tried again for each of them.
                if let Some((until, error)) = self.failed.clone().filter(|(until, _)| Instant::now() < *until) {
                    self.not_connected(&error);
                    self.wait(&error, until);
                    continue;
                }
                // An attempt has an attempt's time, whatever the calls have left: cut short, none might ever succeed.
                match self.pool.connection_once(self.pool.settings().broker.connect_timeout) {
                    Ok(connection) => {
                        self.failed = None;
                        self.backoff.reset();
                        if let Err(error) = self.session(&connection) {
                            log::warn!("rpc client: {error}");
                        }
                    }
                    Err(error) => {
                        self.not_connected(&error);
                        self.failed = Some((Instant::now() + self.backoff.next(), error));
                    }
                }
            }
        }
    }

    /// Lets the time go by until then, in which calls come and their deadlines pass.
    fn wait(&mut self, error: &Error, until: Instant) {
        while let Some(first) = self.waiting.iter().map(|call| call.deadline).min()
            && Instant::now() < until
        {
            match self.work.recv_deadline(first.min(until)) {
                Ok(work) => self.note(work),
                Err(RecvTimeoutError::Timeout) => self.not_connected(error),
                // The client, which sends a word before it goes, cannot have gone.
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// The call that is to be made, if it is one; after the close none is, and it is told by being dropped.
    fn accept(&mut self, work: Work) -> Option<Call> {
        match work {
            Work::Call(call) => (!self.closed).then_some(call),
            Work::Close => {
                self.closed = true;
                None
            }
        }
    }

    /// While there is no channel.
    fn note(&mut self, work: Work) {
        let call = self.accept(work);
        self.waiting.extend(call);
    }

    fn run_callbacks(&self, answered: &mut Vec<Answered>) {
        if !answered.is_empty() {
            // Were the runner gone, the callbacks would run on being dropped.
            let _ = self.callbacks.send(std::mem::take(answered));
        }
    }

    /// Calls whose time is over get the cause; the others go on waiting, unless it takes a person to mend it.
    fn not_connected(&mut self, error: &Error) {
        while let Ok(work) = self.work.try_recv() {
            self.note(work);
        }
        let now = Instant::now();
        let hopeless = !error.is_transient();
        let mut answered = Vec::new();
        for call in std::mem::take(&mut self.waiting) {
            if hopeless || call.deadline <= now {
                call.answer(Err(error.clone()), &mut answered);
            } else {
                self.waiting.push(call);
            }
        }
        self.run_callbacks(&mut answered);
    }

    /// From opening a channel until it ends, or nobody can call any more and nothing is in flight.
    fn session(&mut self, connection: &Connection) -> Result<()> {
        let side = connection.beside();
        let (link, limit) = (&side.link, side.settings.broker.operation_timeout);
        let opening = || "open a channel for calls".to_owned();
        let mut flight = Flight::new();
        let result = link.open_channel(limit, &opening).and_then(|open| {
            let result = self.on_channel(&side, &open, &mut flight);
            open.close(link, limit);
            result
        });
        if let Err(error) = &result {
            for call in self.waiting.drain(..) {
                call.answer(Err(error.clone()), &mut flight.answered);
            }
        }
        self.run_callbacks(&mut flight.answered);
        result
    }

    fn on_channel(&mut self, side: &Connection, open: &OpenChannel, flight: &mut Flight) -> Result<()> {
        let (link, limit) = (&side.link, side.settings.broker.operation_timeout);
        let opening = || "open a channel for calls".to_owned();
        let (confirms, returns, consumer) = link.call(limit, &opening, Some(open.id), || {
            let confirms = open.channel.listen_for_publisher_confirms()?;
            let returns = open.channel.listen_for_returns()?;
            open.channel.enable_publisher_confirms()?;
            let options = ConsumerOptions { no_ack: true, ..ConsumerOptions::default() };
            Ok((confirms, returns, open.channel.basic_consume(DIRECT_REPLY_TO, options)?))
        })?;
        let line = Line { side, open, confirms: &confirms, returns: &returns, consumer: &consumer };
        let result = self.answer_all(&line, flight);
        if let Err(error) = &result {
            flight.end(error);
            side.link.suspect();
        }
        // Its connection may be dead, in which case this says nothing new.
        let _ = link.call(limit, &|| "cancel".to_owned(), Some(open.id), || cancel(&consumer));
        result
    }

    fn answer_all(&mut self, line: &Line<'_>, flight: &mut Flight) -> Result<()> {
        let mut waiting = std::mem::take(&mut self.waiting).into_iter();
        while let Some(call) = waiting.next() {
            if let Err(error) = line.send(call, flight, &self.counters) {
                // They are told so too.
                self.waiting.extend(waiting);
                return Err(error);
            }
        }
        let mut pool_closed = self.pool.closed();
        let mut work = self.work.clone();
        let mut leaving = false;
        loop {
            // Once the pool is closed the connection is wanted back: what is under way on it is answered, and no more begun.
            if pool_closed.try_recv() == Err(TryRecvError::Disconnected) {
                leaving = true;
                (pool_closed, work) = (never(), never());
            }
            let busy = self.turn(line, flight, &work)?;
            self.run_callbacks(&mut flight.answered);
            // After the turn: it may have ended the last call, and then nothing would end the wait below.
            if (self.closed || leaving) && flight.is_empty() {
                return Ok(());
            }
            if busy {
                continue;
            }
            let now = Instant::now();
            let look = flight.awaits_confirms().then(|| now + CONFIRMS_LOOK);
            let until = flight.next_deadline().into_iter().chain(look).min();
            let left = until.map_or(Duration::MAX, |until| until.saturating_duration_since(now));
            select! {
                recv(work) -> work => match work {
                    Ok(work) => self.take(work, line, flight)?,
                    // The client, which sends a word before it goes, cannot have gone.
                    Err(_) => self.closed = true,
                },
                recv(line.consumer.receiver()) -> event => line.arrived(event.ok(), flight, &self.counters)?,
                recv(line.returns) -> returned => flight.returned(returned.map_err(|_| line.ending())?),
                recv(pool_closed) -> _ => {}
                default(left) => {}
            }
        }
    }

    /// Takes what is there, and says whether that was anything.
    fn turn(&mut self, line: &Line<'_>, flight: &mut Flight, to_do: &Receiver<Work>) -> Result<bool> {
        let mut busy = false;
        for event in line.consumer.receiver().try_iter().take(TURN) {
            line.arrived(Some(event), flight, &self.counters)?;
            busy = true;
        }
        for returned in line.returns.try_iter().take(TURN) {
            flight.returned(returned);
            busy = true;
        }
        line.confirms.try_iter().for_each(|confirm| flight.confirmed(confirm));
        if flight.next_deadline().is_some_and(|deadline| deadline <= Instant::now()) {
            flight.expire(Instant::now());
        }
        for _ in 0..TURN {
            let Ok(work) = to_do.try_recv() else { break };
            self.take(work, line, flight)?;
            busy = true;
        }
        Ok(busy)
    }

    fn take(&mut self, work: Work, line: &Line<'_>, flight: &mut Flight) -> Result<()> {
        match self.accept(work) {
            Some(call) => line.send(call, flight, &self.counters),
            None => Ok(()),
        }
    }
}

/// A channel on which calls are made.
struct Line<'a> {
    side: &'a Connection,
    open: &'a OpenChannel,
    confirms: &'a Receiver<Confirm>,
    returns: &'a Receiver<amiquip::Return>,
    consumer: &'a Consumer<'a>,
}

impl Line<'_> {
    fn ending(&self) -> Error {
        self.side.link.channel_ending(self.open.id, "wait for answers")
    }

    fn send(&self, call: Call, flight: &mut Flight, counters: &Counters) -> Result<()> {
        let Some((call, message)) = flight.prepare(call, DIRECT_REPLY_TO, self.side.link.frame_max()) else {
            return Ok(());
        };
        counters.calls.fetch_add(1, Ordering::Relaxed);
        let limit = self.side.settings.broker.operation_timeout;
        let outgoing = Outgoing {
            exchange: "",
            routing_key: &call.queue,
            message: &Arc::new(message),
            mandatory: true,
            of_stream: false,
        };
        let sent = self.open.publish(&self.side.link, limit, &|| during(&call.queue), outgoing);
        flight.sent(call);
        sent
    }

    /// `None` is the end of the consumer.
    fn arrived(&self, event: Option<ConsumerMessage>, flight: &mut Flight, counters: &Counters) -> Result<()> {
        match event {
            Some(ConsumerMessage::Delivery(mut delivery)) => {
                flight.arrived(Received::take_from(&mut delivery, None), counters);
                Ok(())
            }
            _ => Err(self.ending()),
        }
    }
}
