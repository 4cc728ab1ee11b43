//! Whether this process is the one that made something, or a child that was forked from it.
//!
//! A child has a copy of the memory and shares the sockets, and has none of the threads. A lock may be held in it for ever, and
//! what it says to the broker would be said in the parent's name. So calls look here first, and destructors do nothing.

use std::mem;
use std::ops::Deref;
use std::process;

use crate::error::{Error, Result};

/// The process that made something.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Maker(u32);

impl Maker {
    /// This process.
    pub(crate) fn this() -> Maker {
        Maker(process::id())
    }

    /// Whether this is another process: a child.
    pub(crate) fn is_parent(self) -> bool {
        self.0 != process::id()
    }

    /// Refuses a call in a child.
    pub(crate) fn check(self) -> Result<()> {
        if self.is_parent() { Err(Error::Forked { pid: self.0 }) } else { Ok(()) }
    }
}

/// A value whose destructor is run by the process that made it, and by no other.
#[derive(Debug)]
pub(crate) struct Kept<T> {
    value: Option<T>,
    maker: Maker,
}

impl<T> Kept<T> {
    pub(crate) fn new(value: T) -> Kept<T> {
        Kept { value: Some(value), maker: Maker::this() }
    }

    pub(crate) fn maker(kept: &Kept<T>) -> Maker {
        kept.maker
    }

    /// Takes the value out.
    pub(crate) fn into_inner(mut kept: Kept<T>) -> Option<T> {
        kept.value.take()
    }
}

impl<T> Deref for Kept<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("it is there until it is dropped")
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        if self.maker.is_parent() {
            mem::forget(self.value.take());
        }
    }
}
