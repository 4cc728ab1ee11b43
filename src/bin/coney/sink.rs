//! Where messages go that are taken off a queue: stdout, and whether what was written has reached anybody.
//!
//! The standard library takes a stdout that is closed for one that takes everything. That will not do here: what was written to
//! it is acked. So this writes to the descriptor itself, and looks at it first.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use coney::Received;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, stat};
use rustix::io::{Errno, ioctl_fionread};

use crate::exit::{Failure, Result};
use crate::output::Format;

/// What is added to the line that says why no more is written.
pub const GIVEN_BACK: &str = "what was not read is back in its queue";

/// The pause between two looks at a pipe, at first and at most. Nothing tells when a pipe has been read.
const FIRST_LOOK: Duration = Duration::from_micros(20);
const LAST_LOOK: Duration = Duration::from_millis(10);

/// Stdout, for messages.
#[derive(Debug)]
pub struct Sink {
    format: Format,
    file: File,
    is_pipe: bool,
}

impl Sink {
    /// Looks whether stdout can be written to, before anything is taken off a queue for it.
    pub fn open(format: Format) -> Result<Sink> {
        let stdout = io::stdout();
        let closed = || {
            Failure::failed(
                "stdout is closed, so nobody would see a message, and none was taken; to throw messages away write them to \
                 /dev/null (opened for writing only, or it looks like a closed stdout)",
            )
        };
        let cannot = |errno: Errno| Failure::from(io::Error::from(errno));
        // What the standard library puts in place of a descriptor that is closed when a program starts is /dev/null, opened
        // for reading and writing. A shell opens it for writing.
        match fcntl_getfl(&stdout).map_err(cannot)? & OFlags::ACCMODE {
            OFlags::RDONLY => return Err(closed()),
            OFlags::RDWR if is_null(&stdout).map_err(cannot)? => return Err(closed()),
            _ => {}
        }
        let file = File::from(stdout.as_fd().try_clone_to_owned()?);
        let is_pipe = FileType::from_raw_mode(fstat(&file).map_err(cannot)?.st_mode) == FileType::Fifo;
        Ok(Sink { format, file, is_pipe })
    }

    /// Writes one message.
    pub fn write(&self, received: &Received) -> io::Result<()> {
        (&self.file).write_all(&self.format.of(received)?)
    }

    /// Waits until what was written has been read, where stdout is a pipe: what lies in one is lost when its reader goes.
    /// False if `gave_up` came true first.
    pub fn wait_for_reader(&self, gave_up: impl Fn() -> bool) -> io::Result<bool> {
        let mut pause = FIRST_LOOK;
        while self.has_unread()? {
            if gave_up() {
                return Ok(false);
            }
            // It may have read everything and gone after that.
            if self.reader_goes_within(pause)? && self.has_unread()? {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            pause = LAST_LOOK.min(pause * 2);
        }
        Ok(true)
    }

    fn has_unread(&self) -> io::Result<bool> {
        Ok(self.is_pipe && ioctl_fionread(&self.file)? > 0)
    }

    /// Whether nobody is left to read the pipe.
    pub fn reader_has_gone(&self) -> bool {
        // What cannot be looked at is found when it is written to.
        self.reader_goes_within(Duration::ZERO).unwrap_or(false)
    }

    fn reader_goes_within(&self, limit: Duration) -> io::Result<bool> {
        if !self.is_pipe {
            return Ok(false);
        }
        let limit = Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() };
        let mut end = [PollFd::new(&self.file, PollFlags::empty())];
        match poll(&mut end, Some(&limit)) {
            Ok(_) => Ok(end[0].revents().intersects(PollFlags::ERR)),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

fn is_null(stdout: impl AsFd) -> rustix::io::Result<bool> {
    let (one, null) = (fstat(stdout)?, stat("/dev/null")?);
    Ok(FileType::from_raw_mode(one.st_mode) == FileType::CharacterDevice && one.st_rdev == null.st_rdev)
}
