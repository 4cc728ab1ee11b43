//! The messages of a stream: each stays where it is, under its offset, until the segment that it is in goes.
//!
//! What is dropped is dropped in whole segments and only when a new one begins, as RabbitMQ does it. Every message is a chunk of
//! its own.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use super::super::arguments::QueueArguments;
use super::super::ledger::ConsumerId;
use super::super::message::Message;
use super::super::stream::Start;

/// How large a segment becomes, unless the stream says otherwise.
const SEGMENT_BYTES: u64 = 500_000_000;

/// So many messages are a segment, however small they are.
const SEGMENT_MESSAGES: usize = 256_000;

/// So many segments are dropped for one message at most. The others go with the segments to come.
const DROPPED_AT_ONCE: usize = 256;

/// What a message takes besides its body and its properties.
const OVERHEAD: u64 = 64;

#[derive(Debug)]
struct Record {
    message: Arc<Message>,
    /// When it came, in milliseconds since 1970. Never before the one in front of it.
    at: u64,
}

/// Messages that go together.
#[derive(Debug)]
pub(in super::super) struct Segment {
    /// The offset of its first message.
    first: u64,
    records: Vec<Record>,
    bytes: u64,
}

impl Segment {
    fn new(first: u64) -> Segment {
        Segment { first, records: Vec::new(), bytes: 0 }
    }

    /// The offset behind its last message.
    fn end(&self) -> u64 {
        self.first + self.records.len() as u64
    }
}

#[derive(Debug)]
pub(in super::super) struct Log {
    /// The oldest first, and the one that is written to. There are others in front of it only if they have messages.
    segments: VecDeque<Segment>,
    newest: Segment,
    /// Of all but the newest.
    bytes: u64,
    max_bytes: Option<u64>,
    max_age: Option<u64>,
    segment_bytes: u64,
    /// The time of the newest message.
    latest: u64,
    /// The consumers that have read all there is, by the offset that each waits for.
    caught_up: BTreeSet<(u64, ConsumerId)>,
    /// Somebody is about to see what can be read.
    pub(in super::super) is_due: bool,
}

impl Log {
    pub(in super::super) fn new(arguments: &QueueArguments) -> Log {
        Log {
            segments: VecDeque::new(),
            newest: Segment::new(0),
            bytes: 0,
            max_bytes: arguments.max_bytes.map(|bytes| bytes as u64),
            max_age: arguments.max_age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
            segment_bytes: arguments.segment_bytes.map_or(SEGMENT_BYTES, |bytes| bytes as u64),
            latest: 0,
            caught_up: BTreeSet::new(),
            is_due: false,
        }
    }

    /// The offset of the first message, or of the one to come if there is none.
    fn first(&self) -> u64 {
        self.segments.front().unwrap_or(&self.newest).first
    }

    /// The offset of the next message to come.
    pub(in super::super) fn end(&self) -> u64 {
        self.newest.end()
    }

    pub(in super::super) fn len(&self) -> usize {
        usize::try_from(self.end() - self.first()).unwrap_or(usize::MAX)
    }

    /// Adds a message at this time. The segments that are dropped for it are handed out, to be freed where that may take a while.
    pub(in super::super) fn append(&mut self, message: Arc<Message>, now: u64) -> Vec<Segment> {
        self.latest = self.latest.max(now);
        self.newest.bytes += OVERHEAD + (message.body.len() + message.properties.len()) as u64;
        self.newest.records.push(Record { message, at: self.latest });
        if self.newest.bytes < self.segment_bytes && self.newest.records.len() < SEGMENT_MESSAGES {
            return Vec::new();
        }
        let next = Segment::new(self.end());
        self.bytes += self.newest.bytes;
        self.segments.push_back(std::mem::replace(&mut self.newest, next));
        self.drop_old()
    }

    /// Drops the oldest segments while there is too much, or they are too old. The last one that has messages stays.
    fn drop_old(&mut self) -> Vec<Segment> {
        let mut dropped = Vec::new();
        while self.segments.len() > 1
            && dropped.len() < DROPPED_AT_ONCE
            && let Some(oldest) = self.segments.front()
        {
            let is_old = |age| oldest.records.last().is_some_and(|last| self.latest.saturating_sub(last.at) > age);
            let is_too_much = self.max_bytes.is_some_and(|max| self.bytes > max);
            if !is_too_much && !self.max_age.is_some_and(is_old) {
                break;
            }
            self.bytes -= oldest.bytes;
            dropped.extend(self.segments.pop_front());
        }
        dropped
    }

    /// The offset that a consumer begins with.
    pub(in super::super) fn offset_of(&self, start: Start) -> u64 {
        match start {
            Start::First => self.first(),
            Start::Last => self.end().saturating_sub(1).max(self.first()),
            Start::Next => self.end(),
            Start::At(offset) => offset,
            Start::Since(time) => {
                let is_before = |record: &Record| record.at < time;
                let before = self.segments.partition_point(|segment| segment.records.last().is_some_and(is_before));
                let segment = self.segments.get(before).unwrap_or(&self.newest);
                segment.first + segment.records.partition_point(is_before) as u64
            }
        }
    }

    /// The message with this offset and its offset. In the place of one that has gone, it is the first that is there.
    pub(in super::super) fn get(&self, offset: u64) -> Option<(u64, &Arc<Message>)> {
        let offset = offset.max(self.first());
        let behind = self.segments.partition_point(|segment| segment.end() <= offset);
        let segment = self.segments.get(behind).unwrap_or(&self.newest);
        let record = segment.records.get(usize::try_from(offset - segment.first).ok()?)?;
        Some((offset, &record.message))
    }

    pub(in super::super) fn iter(&self) -> impl Iterator<Item = &Arc<Message>> {
        let segments = self.segments.iter().chain(Some(&self.newest));
        segments.flat_map(|segment| segment.records.iter().map(|record| &record.message))
    }

    /// A consumer has read all there is, and waits for this offset.
    pub(in super::super) fn wait(&mut self, offset: u64, consumer: ConsumerId) {
        self.caught_up.insert((offset, consumer));
    }

    /// A consumer that waits for this offset does so no more.
    pub(in super::super) fn forget(&mut self, offset: u64, consumer: ConsumerId) {
        self.caught_up.remove(&(offset, consumer));
    }

    /// A consumer that there is something to read for again.
    pub(in super::super) fn wake(&mut self) -> Option<ConsumerId> {
        let &(offset, consumer) = self.caught_up.first()?;
        if offset >= self.end() {
            return None;
        }
        self.caught_up.pop_first();
        Some(consumer)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::super::message::Body;
    use super::*;

    fn log(arguments: QueueArguments) -> Log {
        Log::new(&arguments)
    }

    /// Messages of 100 bytes in all, one for each of these times.
    fn fill(log: &mut Log, times: impl IntoIterator<Item = u64>) -> usize {
        let body = vec![b'x'; 100 - 64 - 2];
        let append = |at| {
            let message = Message { body: Body::Own(body.clone().into()), ..Message::for_test() };
            log.append(Arc::new(message), at).iter().map(|segment| segment.records.len()).sum::<usize>()
        };
        times.into_iter().map(append).sum()
    }

    #[test]
    fn messages_stay_under_their_offsets() {
        let mut log = log(QueueArguments { segment_bytes: Some(300), ..QueueArguments::default() });
        assert_eq!((log.first(), log.end(), log.len()), (0, 0, 0));
        assert!(log.get(0).is_none());
        assert_eq!(fill(&mut log, 0..10), 0);
        assert_eq!((log.first(), log.end(), log.len(), log.iter().count()), (0, 10, 10, 10));
        for offset in 0..10 {
            let (at, message) = log.get(offset).unwrap();
            assert!(at == offset && Arc::ptr_eq(message, log.iter().nth(offset as usize).unwrap()));
        }
        assert!(log.get(10).is_none() && log.get(u64::MAX).is_none());
    }

    #[test]
    fn where_to_begin() {
        let mut log = log(QueueArguments { segment_bytes: Some(300), ..QueueArguments::default() });
        for start in [Start::First, Start::Last, Start::Next, Start::Since(0), Start::Since(u64::MAX)] {
            assert_eq!(log.offset_of(start), 0, "{start:?} of nothing");
        }
        // The clock may go back; the order stays.
        fill(&mut log, [10, 20, 20, 15, 30, 40, 50]);
        let offset = |start| log.offset_of(start);
        assert_eq!(
            [offset(Start::First), offset(Start::Last), offset(Start::Next), offset(Start::At(90))],
            [0, 6, 7, 90]
        );
        let since = [0, 10, 11, 20, 21, 40, 41, 51].map(|time| offset(Start::Since(time)));
        assert_eq!(since, [0, 0, 1, 1, 4, 5, 6, 7]);
    }

    #[test]
    fn the_oldest_go_in_whole_segments() {
        let arguments = QueueArguments { segment_bytes: Some(300), max_bytes: Some(700), ..QueueArguments::default() };
        let mut log = log(arguments.clone());
        assert_eq!(fill(&mut log, 0..8), 0);
        assert_eq!(fill(&mut log, 8..9), 3, "there were three segments of 300 bytes");
        assert_eq!((log.first(), log.len()), (3, 6));
        assert_eq!(log.get(0).unwrap().0, 3, "who is behind goes on with what is there");
        assert_eq!(log.offset_of(Start::First), 3);
        let mut small = self::log(QueueArguments { max_bytes: Some(0), ..arguments });
        assert_eq!(fill(&mut small, 0..30), 27);
        assert_eq!((small.first(), small.len()), (27, 3), "the last one with messages stays");
    }

    #[test]
    fn the_old_go_in_whole_segments() {
        let max_age = Some(Duration::from_millis(100));
        let mut log = log(QueueArguments { segment_bytes: Some(300), max_age, ..QueueArguments::default() });
        assert_eq!(fill(&mut log, [0, 1, 2, 50, 51, 52, 90]), 0);
        assert_eq!(fill(&mut log, [200]), 0, "only when a new segment begins");
        assert_eq!(fill(&mut log, [201]), 6);
        assert_eq!((log.first(), log.len()), (6, 3));
    }

    #[test]
    fn who_waits_is_woken_by_what_it_waits_for() {
        let mut log = log(QueueArguments::default());
        log.wait(0, ConsumerId(1));
        log.wait(0, ConsumerId(2));
        log.wait(1, ConsumerId(3));
        assert_eq!(log.wake(), None);
        fill(&mut log, [0]);
        log.forget(0, ConsumerId(1));
        assert_eq!([log.wake(), log.wake()], [Some(ConsumerId(2)), None]);
        fill(&mut log, [0]);
        assert_eq!([log.wake(), log.wake()], [Some(ConsumerId(3)), None]);
    }
}
