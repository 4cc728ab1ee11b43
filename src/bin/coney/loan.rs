//! Messages that go back to their queue unless they are settled.

use std::ops::Deref;

use coney::{Connection, Delivery, Received};

/// A delivery that is put back when it is dropped, whatever the reason: an error, a panic, or that it was only looked at.
///
/// A delivery of the library does so too, but is rejected if it had been redelivered before, and to have been looked at
/// twice is no reason to be lost.
#[derive(Debug)]
pub struct Loan<'c>(Option<Delivery<'c>>);

impl<'c> Loan<'c> {
    /// Takes the next message of the queue, if there is one.
    pub fn get(connection: &'c Connection, queue: &str) -> coney::Result<Option<Loan<'c>>> {
        Ok(connection.get(queue)?.map(Loan::of))
    }

    pub fn of(delivery: Delivery<'c>) -> Loan<'c> {
        Loan(Some(delivery))
    }

    pub fn ack(mut self) -> coney::Result<()> {
        self.0.take().map_or(Ok(()), |delivery| delivery.ack().map(drop))
    }

    pub fn reject(mut self) -> coney::Result<()> {
        self.0.take().map_or(Ok(()), Delivery::reject)
    }
}

impl Deref for Loan<'_> {
    type Target = Received;

    fn deref(&self) -> &Received {
        // Taken out only by what consumes the loan.
        self.0.as_deref().expect("a loan holds its delivery until it is settled")
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        if let Some(delivery) = self.0.take() {
            // If it does not get through, the channel is gone, and the broker has put the message back by itself.
            let _ = delivery.requeue();
        }
    }
}
