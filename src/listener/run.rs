//! One run of a listener on a connection that is there: its threads, from the first consumer to the last.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvError, Sender, bounded, never, select, tick, unbounded};

use super::builder::Part;
use super::growth::{Advice, Growth, LOOK};
use super::pause::Mode;
use super::post::Post;
use super::share::{self, Share};
use super::worker::{Lost, Worker};
use super::{ListenerState, Shared, count, own_thread, thread_name};
use crate::connection::Connection;
use crate::error::{Error, Result};
use crate::event::Start;
use crate::metrics::meter::Level;
use crate::session::Endings;

/// A run that has settled something and lasted so long after that, or has settled something else, is a good one. One that ends
/// sooner may have ended by its only message: the ack was sent, and nobody knows whether it arrived.
const PROVEN: Duration = Duration::from_millis(100);

/// How far a listener has come.
pub(super) struct Progress {
    /// Who waits until it consumes for the first time.
    pub(super) first: Option<Sender<Result<()>>>,
    /// It has lost its consumers before.
    pub(super) is_again: bool,
    /// In this session every thread has had a consumer.
    pub(super) has_consumed: bool,
    /// This session has settled messages, and gone on.
    pub(super) has_lived_on: bool,
}

/// What a worker tells its supervisor.
enum Event {
    /// It has a consumer.
    Ready(Endings),
    /// It has ended: because it was told to, or with the reason.
    Ended(Result<()>),
}

/// How far the worker at a post is.
enum Stage {
    /// There is none.
    Vacant,
    Starting,
    Consuming(Endings, Level),
    /// It takes no more messages, and is counted until it has ended.
    Retiring {
        _level: Level,
    },
}

impl Stage {
    fn consumer(&self) -> Option<&Endings> {
        match self {
            Stage::Consuming(endings, _) => Some(endings),
            _ => None,
        }
    }

    /// It takes no more messages.
    fn retire(&mut self) {
        *self = match std::mem::replace(self, Stage::Vacant) {
            Stage::Consuming(_, level) => Stage::Retiring { _level: level },
            other => other,
        };
    }

    /// Whether it takes messages, or will.
    fn serves(&self) -> bool {
        matches!(self, Stage::Starting | Stage::Consuming(..))
    }
}

/// The posts of one queue.
struct Team {
    posts: Range<usize>,
    growth: Growth,
    /// For how long each has had nothing to do, as of the last look; in microseconds.
    idle: Vec<u64>,
}

/// Consumes until the run is over (`Ok`) or something comes in its way.
pub(super) fn run(
    shared: &Shared,
    connection: &Connection,
    queues: &[String],
    mode: &Mode,
    progress: &mut Progress,
) -> Result<()> {
    let (mut posts, mut teams) = (Vec::new(), Vec::new());
    // Where there is a worker from the beginning.
    let mut first_posts = Vec::new();
    for (route, queue) in shared.routes.iter().zip(queues) {
        let (spec, begin) = (&route.spec, posts.len());
        let (least, most, prefetch) = match mode {
            Mode::All => (spec.concurrency.least(), spec.concurrency.most(), spec.prefetch),
            // All of a partition that has come goes back together, or it would lose its order.
            Mode::Trying(_) if route.is_partition() => (1, 1, spec.prefetch),
            Mode::Trying(_) => (1, 1, 1),
        };
        posts.extend((0..most).map(|_| Post::new(route, queue, prefetch, most > least)));
        first_posts.extend(begin..begin + least);
        if most > least {
            let growth = Growth::new(spec.concurrency);
            teams.push(Team { posts: begin..posts.len(), growth, idle: vec![0; most] });
        }
    }
    let epoch = Instant::now();
    let mut sharing = Sharing::of(&posts, epoch);
    thread::scope(|scope| {
        let (abort, aborted) = bounded(0);
        let mut abort: Option<Sender<()>> = Some(abort);
        let (events, happened) = unbounded();
        let (lost, is_lost) = bounded(1);
        let start = |number: usize| {
            let (post, side) = (&posts[number], connection.beside());
            let (events, aborted, lost) = (events.clone(), aborted.clone(), lost.clone());
            let name = thread_name(&format!("coney-{number}-{}", shared.name));
            let started = Builder::new().name(name.clone()).spawn_scoped(scope, move || {
                let worker = Worker { shared, post, side: &side, stop: &aborted, epoch, lost: &lost };
                own_thread::belongs_to(shared);
                // The supervisor listens until every worker has ended.
                let ready = |endings| drop(events.send((number, Event::Ready(endings))));
                let result = catch_unwind(AssertUnwindSafe(|| worker.run(ready)));
                let _ = events.send((number, Event::Ended(result.unwrap_or_else(|_| Err(panicked())))));
            });
            started.map(drop).map_err(|source| Error::Thread { name, source: source.into() })
        };
        let mut stages: Vec<Stage> = posts.iter().map(|_| Stage::Vacant).collect();
        let mut running = 0;
        let mut failure = None;
        for &number in &first_posts {
            if let Err(error) = enter(start(number), &mut stages[number], &mut running) {
                failure = Some(error);
                abort_all(&mut abort, &posts);
                break;
            }
        }
        let mut is_up = false;
        let mut gone = None;
        let mut stopped = shared.stopped.clone();
        let patience = shared.routes.iter().map(|route| route.spec.warn_after).min().unwrap_or(Duration::MAX);
        let patience = (patience / 2).clamp(Duration::from_millis(10), Duration::from_secs(30));
        let watch = tick(patience);
        let mut warned = vec![0; posts.len()];
        let looks = if teams.is_empty() { never() } else { tick(LOOK) };
        let mut looked = epoch;
        let share_looks = if sharing.is_some() { tick(share::LOOK) } else { never() };
        while running > 0 {
            select! {
                recv(happened) -> event => match event {
                    Ok((number, Event::Ready(endings))) => {
                        let level = posts[number].route.meter(&shared.name).workers.one();
                        stages[number] = Stage::Consuming(endings, level);
                        shared.counters.workers.fetch_add(1, Ordering::Relaxed);
                        if !is_up && first_posts.iter().all(|&first| stages[first].consumer().is_some()) {
                            is_up = true;
                            consuming(shared, progress, mode);
                        }
                    }
                    Ok((number, Event::Ended(result))) => {
                        running -= 1;
                        let stage = std::mem::replace(&mut stages[number], Stage::Vacant);
                        posts[number].vacate();
                        if let Stage::Consuming(..) | Stage::Retiring { .. } = stage {
                            shared.counters.workers.fetch_sub(1, Ordering::Relaxed);
                        }
                        match (stage, result) {
                            // It takes its place behind the consumers of others.
                            (Stage::Retiring { .. }, Ok(())) if posts[number].route.is_partition() && abort.is_some() => {
                                if let Err(error) = enter(start(number), &mut stages[number], &mut running) {
                                    abort_all(&mut abort, &posts);
                                    failure.get_or_insert(error);
                                }
                            }
                            (Stage::Retiring { .. }, Ok(())) => {}
                            (Stage::Starting, Err(error))
                                if is_up && connection.is_alive() && failure.is_none() && !posts[number].route.is_partition() =>
                            {
                                could_not_grow(shared, &mut teams, number, &error);
                            }
                            (_, result) => {
                                abort_all(&mut abort, &posts);
                                if let Err(error) = result {
                                    // The others may have handlers to wait for.
                                    if failure.is_none() && is_up {
                                        shared.now(ListenerState::Recovering { error: error.clone(), attempt: 0 });
                                    }
                                    failure.get_or_insert(error);
                                }
                            }
                        }
                    }
                    Err(_) => break,
                },
                recv(is_lost) -> which => gone = Some(which),
                recv(stopped) -> _ => {
                    abort_all(&mut abort, &posts);
                    stopped = never();
                }
                recv(shared.pauses.signalled()) -> _ => {
                    if shared.pauses.is_run_over() {
                        abort_all(&mut abort, &posts);
                    }
                }
                recv(looks) -> _ => {
                    let now = Instant::now();
                    let since = now - std::mem::replace(&mut looked, now);
                    let may_change = is_up && abort.is_some() && failure.is_none();
                    for team in teams.iter_mut().filter(|_| may_change) {
                        match team.look(&posts, &stages, connection, since, now - epoch) {
                            Change::None => {}
                            Change::Retire(number) => {
                                stages[number].retire();
                                posts[number].retire();
                            }
                            Change::Start(number) => {
                                if let Err(error) = enter(start(number), &mut stages[number], &mut running) {
                                    could_not_grow(shared, std::slice::from_mut(team), number, &error);
                                }
                            }
                        }
                    }
                }
                recv(share_looks) -> _ => {
                    if is_up && abort.is_some() && failure.is_none()
                        && let Some(sharing) = &mut sharing
                    {
                        for number in sharing.surplus(&posts, &stages, connection) {
                            stages[number].retire();
                            posts[number].retire();
                        }
                    }
                }
                recv(watch) -> _ => warn_of_stuck_handlers(shared, &posts, &mut warned, epoch),
            }
            // The handlers may be busy for long, and know nothing of it.
            if is_up
                && let Some(which) = gone.take()
                && failure.is_none()
                && !shared.is_stopped()
            {
                let error = why_lost(shared, which, stages.iter().filter_map(Stage::consumer));
                shared.now(ListenerState::Recovering { error, attempt: 0 });
            }
        }
        drop(abort);
        let settled =
            posts.iter().map(|post| post.settled.load(Ordering::Relaxed)).filter(|settled| *settled > 0).min();
        let settlements: u64 = posts.iter().map(|post| post.settlements.load(Ordering::Relaxed)).sum();
        let has_lasted = |settled| epoch.elapsed() >= Duration::from_millis(settled) + PROVEN;
        progress.has_lived_on |= settlements > 1 || settled.is_some_and(has_lasted);
        match failure {
            Some(_) if shared.is_stopped() => Ok(()),
            Some(error) => {
                explain_ack_timeout(shared, &posts, &error);
                Err(error)
            }
            None => Ok(()),
        }
    })
}

/// Counts a worker that has started.
fn enter(started: Result<()>, stage: &mut Stage, running: &mut usize) -> Result<()> {
    started?;
    *stage = Stage::Starting;
    *running += 1;
    Ok(())
}

/// The share of a listener on a partitioned queue.
struct Sharing {
    /// The queue whose consumers are counted.
    members: String,
    share: Share,
}

impl Sharing {
    fn of(posts: &[Post<'_>], now: Instant) -> Option<Sharing> {
        let members = posts.iter().find(|post| post.route.spec.part == Part::Members)?.queue.to_owned();
        let partitions = posts.iter().filter(|post| post.route.is_partition()).count();
        Some(Sharing { members, share: Share::new(partitions, now) })
    }

    /// Which partitions to give back: those that have the least to do now.
    fn surplus(&mut self, posts: &[Post<'_>], stages: &[Stage], connection: &Connection) -> Vec<usize> {
        // An error of it is told by the consumers too.
        let Ok(members) = connection.queue_declare_passive(&self.members) else { return Vec::new() };
        let is_active = |&number: &usize| stages[number].consumer().is_some() && posts[number].route.is_active();
        let mut active: Vec<usize> = (0..posts.len()).filter(is_active).collect();
        let members = usize::try_from(members.consumer_count).unwrap_or(usize::MAX);
        let surplus = self.share.surplus(Instant::now(), members, active.len());
        active.sort_by_key(|&number| posts[number].busy.load(Ordering::Relaxed) > 0);
        active.truncate(surplus);
        active
    }
}

/// What is to be done about the number of workers.
enum Change {
    None,
    Start(usize),
    Retire(usize),
}

impl Team {
    /// Sees what the workers have done in the last while.
    fn look(
        &mut self,
        posts: &[Post<'_>],
        stages: &[Stage],
        connection: &Connection,
        since: Duration,
        since_epoch: Duration,
    ) -> Change {
        let now = u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX);
        let mut busy = Vec::new();
        for (number, last) in self.posts.clone().zip(&mut self.idle) {
            let Some(idle) = &posts[number].idle else { continue };
            let total = idle.total(now);
            let idle = Duration::from_micros(total.saturating_sub(std::mem::replace(last, total)));
            if stages[number].serves() {
                busy.push((1.0 - idle.as_secs_f64() / since.as_secs_f64().max(f64::EPSILON)).max(0.0));
            }
        }
        let serving = |number: &usize| stages[*number].serves();
        let messages_wait = || {
            self.posts.clone().filter(serving).any(|number| posts[number].has_waiting()) || {
                // An error of it is told by the consumers too.
                let queue = connection.queue_declare_passive(posts[self.posts.start].queue);
                queue.is_ok_and(|queue| queue.message_count > 0)
            }
        };
        match self.growth.advise(Instant::now(), &busy, messages_wait) {
            Advice::Stay => Change::None,
            // One that retires makes room when it has ended.
            Advice::OneMore => {
                let vacant = self.posts.clone().find(|&number| matches!(stages[number], Stage::Vacant));
                vacant.map_or(Change::None, Change::Start)
            }
            Advice::OneLess => {
                let idle = |number: &usize| posts[*number].busy.load(Ordering::Relaxed) == 0;
                let mut consuming = self.posts.clone().filter(|number| stages[*number].consumer().is_some());
                let chosen = consuming.clone().rfind(idle).or_else(|| consuming.next_back());
                chosen.map_or(Change::None, Change::Retire)
            }
        }
    }
}

/// A worker more could not be had. There are enough for the messages, if not for their number.
fn could_not_grow(shared: &Shared, teams: &mut [Team], number: usize, error: &Error) {
    let listener = shared.name.as_str();
    log::warn!(listener; "listener {listener:?}: no thread more: {error}");
    for team in teams.iter_mut().filter(|team| team.posts.contains(&number)) {
        team.growth.has_failed(Instant::now());
    }
}

/// Why a consumer is gone whose worker may be in its handler.
fn why_lost<'c>(
    shared: &Shared,
    lost: Result<Lost, RecvError>,
    mut consumers: impl Iterator<Item = &'c Endings>,
) -> Error {
    if let Ok(Lost::Cancelled(queue)) = lost {
        return Error::ConsumerCancelled { queue };
    }
    let during = format!("run of listener {:?}", shared.name);
    match consumers.find(|consumer| consumer.has_ended()) {
        Some(ended) => ended.ending(&during),
        None => Error::ConnectionLost { during, detail: "a channel has ended".to_owned() },
    }
}

/// Handlers are caught where they are called; this is for what is around them, a logger that panics for instance.
fn panicked() -> Error {
    Error::ConnectionLost {
        during: "run of a listener".to_owned(),
        detail: "a thread of the listener panicked".to_owned(),
    }
}

/// Tells all workers to end.
fn abort_all(abort: &mut Option<Sender<()>>, posts: &[Post<'_>]) {
    *abort = None;
    posts.iter().for_each(Post::wake);
}

/// Every thread that there is to begin with has its consumer. The state is the last to change: who sees it also finds what was
/// counted and logged.
fn consuming(shared: &Shared, progress: &mut Progress, mode: &Mode) {
    let has_consumed = std::mem::replace(&mut progress.has_consumed, true);
    if let Mode::Trying(pause) = mode {
        let (listener, pool) = (shared.name.as_str(), shared.pool.name());
        log::info!(listener, pool; "listener {listener:?}: tries one message");
        return shared.now(ListenerState::from(pause));
    }
    let start = match (has_consumed, progress.is_again) {
        (true, _) => Start::AfterPause,
        (false, true) => Start::Again,
        (false, false) => Start::First,
    };
    if let Start::Again = start {
        count(&shared.counters.recoveries);
    }
    shared.events.consuming(start);
    shared.now(ListenerState::Consuming);
    if let Some(first) = progress.first.take() {
        // In the background nobody waits for it.
        let _ = first.send(Ok(()));
    }
}

fn warn_of_stuck_handlers(shared: &Shared, posts: &[Post<'_>], warned: &mut [u64], epoch: Instant) {
    for (post, warned) in posts.iter().zip(warned) {
        let since = post.busy.load(Ordering::Relaxed);
        let held = epoch.elapsed().saturating_sub(Duration::from_millis(since));
        if since > 0 && since != *warned && held >= post.route.spec.warn_after {
            *warned = since;
            log::warn!(
                listener = shared.name.as_str(), queue = post.queue;
                "listener {:?}, queue {:?}: a handler has been at its message for {held:.0?}; the broker takes a message \
                 back that is not acked in time (consumer_timeout)",
                shared.name,
                post.queue
            );
        }
    }
}

/// The time that the broker gives a consumer to ack, if a channel has ended because it was up.
pub(super) fn ack_timeout(error: &Error) -> Option<Duration> {
    let Error::ChannelClosed { code: 406, text, .. } = error else { return None };
    if !text.contains("delivery acknowledgement on channel") {
        return None;
    }
    let limit = text.split_once("Timeout value used: ").and_then(|(_, rest)| rest.split(' ').next());
    Some(limit.and_then(|limit| limit.parse().ok()).map_or(Duration::ZERO, Duration::from_millis))
}

/// Says what an error of the broker means that only names a timeout.
fn explain_ack_timeout(shared: &Shared, posts: &[Post<'_>], error: &Error) {
    let Some(limit) = ack_timeout(error) else { return };
    let Some(post) = posts.iter().max_by_key(|post| post.slowest.load(Ordering::Relaxed)) else { return };
    let slowest = Duration::from_millis(post.slowest.load(Ordering::Relaxed));
    let (listener, queue, prefetch) = (shared.name.as_str(), post.queue, post.prefetch);
    log::error!(
        listener, queue;
        "listener {listener:?}, queue {queue:?}: a message was not acked within {limit:.1?} of its delivery (the broker's \
         consumer_timeout), and the broker delivers it again; the slowest handler took {slowest:.1?}, and up to {prefetch} \
         messages (prefetch) are delivered ahead"
    );
}
