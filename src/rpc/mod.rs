//! Calls over queues: a worker that answers, and a client that waits for its answer.
//!
//! ```
//! # #[cfg(feature = "embedded")]
//! # fn main() -> coney::Result<()> {
//! use coney::rpc::{RpcClient, RpcWorker};
//! use coney::{App, Settings};
//!
//! let app = App::from_settings(Settings::from_url("memory://sums")?)?;
//! let worker = RpcWorker::new(&app).route("sum", |numbers: Vec<u32>| Ok::<u32, String>(numbers.iter().sum())).run()?;
//! let client = RpcClient::new(&app)?;
//! assert_eq!(client.call::<_, u32>("sum", &[1, 2, 3])?, 6);
//! # client.close();
//! # worker.stop()
//! # }
//! # #[cfg(not(feature = "embedded"))]
//! # fn main() {}
//! ```
//!
//! # On the wire
//!
//! A request is `{"data": ...}`, or the bare value, with `reply_to` and `correlation_id`. Its answer has the same
//! `correlation_id`, the property `type` = `result`, and one of the two bodies
//!
//! ```json
//! {"success": true, "data": 6}
//! {"success": false, "error": {"type": "String", "message": "no", "args": ["no"], "trace": ""}}
//! ```
//!
//! in gzip JSON unless another [`Encoding`](crate::Encoding) is chosen. The client has its answers sent to
//! [direct reply-to](https://www.rabbitmq.com/docs/direct-reply-to), which needs no queue.

mod call_channel;
mod client;
mod dispatcher;
mod flight;
mod pending;
mod server;

pub use self::client::{RpcClient, RpcClientStats};
pub use self::server::RpcWorker;
