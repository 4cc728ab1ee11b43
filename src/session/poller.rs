//! Which sockets the idle reader waits for, and which of them something has come for.
//!
//! What a wait costs does not depend on how many sockets there are: on Linux it is epoll(7). Elsewhere it is poll(2), where it
//! does.

use std::os::fd::AsFd;

#[cfg(target_os = "linux")]
pub(super) use self::epoll::Poller;
#[cfg(not(target_os = "linux"))]
pub(super) use self::poll::Poller;

/// What is waited for at a socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Interest {
    pub(super) read: bool,
    pub(super) write: bool,
}

impl Interest {
    fn is_none(self) -> bool {
        self == Interest::default()
    }
}

/// What has come for the source of this number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Came {
    pub(super) number: u64,
    /// It can be read, or has failed, which a read would say. Otherwise it can only be written.
    pub(super) is_readable: bool,
}

/// What can be waited for.
type Source = dyn AsFd + Send + Sync;

#[cfg(target_os = "linux")]
mod epoll {
    use std::io;
    use std::mem::MaybeUninit;
    use std::os::fd::OwnedFd;
    use std::sync::Arc;
    use std::time::Duration;

    use rustix::event::Timespec;
    use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
    use rustix::io::Errno;

    use super::{Came, Interest, Source};

    /// Events taken at a time; the rest comes with the next wait.
    const AT_ONCE: usize = 64;

    /// See the [module](super).
    #[derive(Debug)]
    pub(in super::super) struct Poller(OwnedFd);

    impl Poller {
        pub(in super::super) fn new() -> io::Result<Poller> {
            epoll::create(CreateFlags::CLOEXEC).map(Poller).map_err(io::Error::from)
        }

        /// Changes what is waited for at this source. Before its descriptor is closed there must be nothing any more: a process
        /// that was forked may keep it open, and then it would be told of for ever.
        pub(in super::super) fn change(
            &mut self,
            number: u64,
            source: Arc<Source>,
            from: Interest,
            to: Interest,
        ) -> io::Result<()> {
            let mut flags = EventFlags::empty();
            flags.set(EventFlags::IN, to.read);
            flags.set(EventFlags::OUT, to.write);
            let data = EventData::new_u64(number);
            match (from.is_none(), to.is_none()) {
                (true, true) => {}
                (true, false) => epoll::add(&self.0, source, data, flags)?,
                (false, false) => epoll::modify(&self.0, source, data, flags)?,
                // With nothing to wait for it would still be told of failures.
                (false, true) => epoll::delete(&self.0, source)?,
            }
            Ok(())
        }

        /// Waits until something comes, for `limit` at most, and puts it into `came`. A signal ends it early.
        pub(in super::super) fn wait(&mut self, limit: Option<Duration>, came: &mut Vec<Came>) -> io::Result<()> {
            came.clear();
            let mut room = [const { MaybeUninit::<Event>::uninit() }; AT_ONCE];
            let timespec = limit.and_then(|limit| Timespec::try_from(limit).ok());
            let events = match epoll::wait(&self.0, &mut room[..], timespec.as_ref()) {
                Ok((events, _)) => events,
                Err(Errno::INTR) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            came.extend(events.iter().map(|event| {
                let flags = event.flags;
                Came {
                    number: event.data.u64(),
                    is_readable: flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR),
                }
            }));
            Ok(())
        }
    }
}

/// Built for tests too, so that it is known to work where it is not used.
#[cfg(any(test, not(target_os = "linux")))]
mod poll {
    use std::collections::BTreeMap;
    use std::io;
    use std::sync::Arc;
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags};

    use super::super::socket::poll_for;
    use super::{Came, Interest, Source};

    /// See the [module](super).
    #[derive(Default)]
    pub(in super::super) struct Poller {
        sources: BTreeMap<u64, (Arc<Source>, Interest)>,
    }

    impl Poller {
        pub(in super::super) fn new() -> io::Result<Poller> {
            Ok(Poller::default())
        }

        /// Changes what is waited for at this source.
        pub(in super::super) fn change(
            &mut self,
            number: u64,
            source: Arc<Source>,
            _: Interest,
            to: Interest,
        ) -> io::Result<()> {
            if to.is_none() {
                self.sources.remove(&number);
            } else {
                self.sources.insert(number, (source, to));
            }
            Ok(())
        }

        /// Waits until something comes, for `limit` at most, and puts it into `came`. A signal ends it early.
        pub(in super::super) fn wait(&mut self, limit: Option<Duration>, came: &mut Vec<Came>) -> io::Result<()> {
            came.clear();
            let polled = self.sources.values().map(|(source, interest)| {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, interest.read);
                flags.set(PollFlags::OUT, interest.write);
                PollFd::from_borrowed_fd(source.as_fd(), flags)
            });
            let mut fds: Vec<_> = polled.collect();
            poll_for(&mut fds, limit)?;
            let told = self.sources.keys().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
            came.extend(told.map(|(number, fd)| Came {
                number: *number,
                is_readable: fd.revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR),
            }));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    const NOTHING: Interest = Interest { read: false, write: false };
    const READ: Interest = Interest { read: true, write: false };
    const WRITE: Interest = Interest { read: false, write: true };
    const BOTH: Interest = Interest { read: true, write: true };
    const LONG: Option<Duration> = Some(Duration::from_secs(60));
    const NOW: Option<Duration> = Some(Duration::ZERO);

    macro_rules! tells_what_came {
        ($name:ident, $poller:ty) => {
            #[test]
            fn $name() {
                let mut poller = <$poller>::new().unwrap();
                let mut came = Vec::new();
                let (one, mut other_one) = UnixStream::pair().unwrap();
                let (two, other_two) = UnixStream::pair().unwrap();
                let (one, two) = (Arc::new(one), Arc::new(two));
                poller.change(1, one.clone(), NOTHING, READ).unwrap();
                poller.change(2, two.clone(), NOTHING, READ).unwrap();
                poller.wait(NOW, &mut came).unwrap();
                assert_eq!(came, [], "nothing has come");

                other_one.write_all(b"x").unwrap();
                for _ in 0..2 {
                    poller.wait(LONG, &mut came).unwrap();
                    assert_eq!(came, [Came { number: 1, is_readable: true }], "until it is read");
                }
                poller.change(1, one.clone(), READ, NOTHING).unwrap();
                poller.wait(NOW, &mut came).unwrap();
                assert_eq!(came, [], "nobody waits for it");

                poller.change(1, one.clone(), NOTHING, WRITE).unwrap();
                poller.wait(LONG, &mut came).unwrap();
                assert_eq!(came, [Came { number: 1, is_readable: false }], "only room is waited for");
                poller.change(1, one.clone(), WRITE, BOTH).unwrap();
                poller.wait(LONG, &mut came).unwrap();
                assert_eq!(came, [Came { number: 1, is_readable: true }]);
                (&*one).read_exact(&mut [0]).unwrap();
                poller.change(1, one.clone(), BOTH, READ).unwrap();
                poller.wait(NOW, &mut came).unwrap();
                assert_eq!(came, []);

                drop(other_two);
                poller.wait(LONG, &mut came).unwrap();
                assert_eq!(came, [Came { number: 2, is_readable: true }], "its end is something to read");
                poller.change(2, two.clone(), READ, NOTHING).unwrap();
                poller.wait(NOW, &mut came).unwrap();
                assert_eq!(came, [], "its end is told to nobody who has not asked");
            }
        };
    }

    #[cfg(target_os = "linux")]
    tells_what_came!(epoll_tells_what_came, super::epoll::Poller);
    tells_what_came!(poll_tells_what_came, super::poll::Poller);
}
