//! What the node knows of its connections, channels, consumers and queues.
//!
//! The management plugin would tell the same from statistics that are some seconds old. Here the processes themselves
//! are asked, so an answer is true at the time it is given.

use super::RabbitMq;
use super::error::{NodeError, Result};
use super::eval::binary;

/// A client connection. See [`RabbitMq::connections`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionInfo {
    /// The broker's name for it, `127.0.0.1:40112 -> 127.0.0.1:5672`.
    pub name: String,
    /// Who logged in; empty until then.
    pub user: String,
    /// The virtual host; empty until it is opened.
    pub vhost: String,
    /// `starting`, `tuning`, `opening`, `running`, `flow`, `blocking` (the alarm is raised, nothing published since),
    /// `blocked` or `closing`.
    pub state: String,
    /// The client's port.
    pub port: u16,
    /// How many channels are open.
    pub channels: u32,
    /// The heartbeat agreed upon, in seconds; 0 for none. Means something only once the connection is open.
    pub heartbeat: u32,
    /// The client property `connection_name`.
    pub connection_name: Option<String>,
    /// The client property `information`.
    pub information: Option<String>,
}

/// An open channel. See [`RabbitMq::channels`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChannelInfo {
    /// The [`name`](ConnectionInfo::name) of its connection.
    pub connection: String,
    /// Its number on the connection.
    pub number: u16,
    /// Who opened it.
    pub user: String,
    /// Whether publishes are confirmed.
    pub confirm: bool,
    /// Whether it is transactional.
    pub transactional: bool,
    /// Messages delivered and not yet acknowledged.
    pub unacked: u64,
    /// Messages published and not yet confirmed.
    pub unconfirmed: u64,
    /// How many consumers it has.
    pub consumers: u32,
}

/// A consumer. See [`RabbitMq::consumers`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsumerInfo {
    /// The virtual host of its queue.
    pub vhost: String,
    /// The queue it consumes from.
    pub queue: String,
    /// Its tag.
    pub tag: String,
    /// How many messages it may hold unacknowledged; 0 for any number.
    pub prefetch: u16,
    /// Whether it acknowledges what it gets.
    pub ack_required: bool,
}

/// A queue. See [`RabbitMq::queue_in`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueInfo {
    /// Messages ready to be delivered.
    pub ready: u64,
    /// Messages delivered and not yet acknowledged.
    pub unacked: u64,
    /// How many consumers it has.
    pub consumers: u32,
    /// Whether it survives a restart.
    pub durable: bool,
}

/// Early in a handshake some numbers are not known; they are given as 0. Something that ends while it is being asked is
/// left out, as if it had ended before.
///
/// Properties are told apart from their absence by an `=` before them.
const CONNECTIONS: &str = "
    Get = fun(Key, List) -> proplists:get_value(Key, List, <<>>) end,
    Number = fun(Key, List) -> case Get(Key, List) of N when is_integer(N) -> N; _ -> 0 end end,
    Property = fun(Key, Table) ->
        case lists:keyfind(Key, 1, Table) of {_, longstr, Value} -> [$=, Value]; _ -> <<>> end
    end,
    Text = fun(Key, List) -> case Get(Key, List) of none -> <<>>; Value -> Value end end,
    Texts = [name, user, vhost, state],
    Numbers = [peer_port, channels, timeout],
    lists:append([
        case catch rabbit_networking:connection_info(Pid, [client_properties | Texts ++ Numbers]) of
            Info when is_list(Info) ->
                Table = case Get(client_properties, Info) of T when is_list(T) -> T; _ -> [] end,
                [[Text(Key, Info) || Key <- Texts] ++ [Number(Key, Info) || Key <- Numbers]
                 ++ [iolist_to_binary(Property(Key, Table)) || Key <- [<<\"connection_name\">>, <<\"information\">>]]];
            _ -> []
        end || Pid <- rabbit_networking:local_connections()])";

const CHANNELS: &str = "
    Keys = [connection, number, user, confirm, transactional, messages_unacknowledged, messages_unconfirmed,
            consumer_count],
    lists:append([
        case catch rabbit_channel:info(Pid, Keys) of
            [{connection, Connection} | Info] ->
                case catch rabbit_networking:connection_info(Connection, [name]) of
                    [{name, Name}] -> [[Name | [Value || {_, Value} <- Info]]];
                    _ -> []
                end;
            _ -> []
        end || Pid <- rabbit_channel:list_local()])";

const CONSUMERS: &str = "
    [begin
        {resource, VHost, queue, Queue} = proplists:get_value(queue_name, Info),
        [VHost, Queue | [proplists:get_value(Key, Info) || Key <- [consumer_tag, prefetch_count, ack_required]]]
     end || Listed <- rabbit_vhost:list_names(), Info <- rabbit_amqqueue:consumers_all(Listed)]";

impl RabbitMq {
    /// The client connections of this node, in no particular order.
    ///
    /// # Errors
    /// [`NodeError::Eval`], [`NodeError::Timeout`] or [`NodeError::State`].
    pub fn connections(&self) -> Result<Vec<ConnectionInfo>> {
        self.node.rows(CONNECTIONS)?.into_iter().map(|row| Fields::of(row).connection()).collect()
    }

    /// The open channels of this node, in no particular order.
    ///
    /// # Errors
    /// [`NodeError::Eval`], [`NodeError::Timeout`] or [`NodeError::State`].
    pub fn channels(&self) -> Result<Vec<ChannelInfo>> {
        self.node.rows(CHANNELS)?.into_iter().map(|row| Fields::of(row).channel()).collect()
    }

    /// The consumers of all queues of all virtual hosts, in no particular order.
    ///
    /// # Errors
    /// [`NodeError::Eval`], [`NodeError::Timeout`] or [`NodeError::State`].
    pub fn consumers(&self) -> Result<Vec<ConsumerInfo>> {
        self.node.rows(CONSUMERS)?.into_iter().map(|row| Fields::of(row).consumer()).collect()
    }

    /// How many messages are ready in a queue of the default virtual host.
    ///
    /// # Errors
    /// [`NodeError::NoSuchQueue`]; else as [`queue_in`](Self::queue_in).
    pub fn queue_len(&self, queue: &str) -> Result<u64> {
        Ok(self.queue(queue)?.ready)
    }

    /// How many messages of a queue of the default virtual host are delivered and not yet acknowledged.
    ///
    /// # Errors
    /// [`NodeError::NoSuchQueue`]; else as [`queue_in`](Self::queue_in).
    pub fn queue_unacked(&self, queue: &str) -> Result<u64> {
        Ok(self.queue(queue)?.unacked)
    }

    fn queue(&self, queue: &str) -> Result<QueueInfo> {
        let none = || NodeError::NoSuchQueue { vhost: "/".into(), queue: queue.into() };
        self.queue_in("/", queue)?.ok_or_else(none)
    }

    /// A queue of any virtual host, or `None` when there is none of that name.
    ///
    /// A classic queue answers itself, after whatever it was sent before. For a quorum queue RabbitMQ keeps the numbers
    /// in a table, which may be a moment behind, on the node that [leads](super::RabbitMqCluster::leader) it; the others
    /// of a cluster say 0.
    ///
    /// # Errors
    /// [`NodeError::Eval`], [`NodeError::Timeout`] or [`NodeError::State`].
    pub fn queue_in(&self, vhost: &str, queue: &str) -> Result<Option<QueueInfo>> {
        let rows = self.node.rows(&format!(
            "case rabbit_amqqueue:lookup({{resource, {}, queue, {}}}) of
                {{ok, Queue}} ->
                    Keys = [messages_ready, messages_unacknowledged, consumers, durable],
                    [[Value || {{_, Value}} <- rabbit_amqqueue:info(Queue, Keys)]];
                {{error, not_found}} -> []
             end",
            binary(vhost),
            binary(queue)
        ))?;
        rows.into_iter().next().map(|row| Fields::of(row).queue()).transpose()
    }
}

/// The single number an expression gave.
pub(super) fn number(rows: &[Vec<String>]) -> Result<usize> {
    Fields::of(rows.first().cloned().unwrap_or_default()).parsed()
}

/// The fields of a row, taken from the front.
struct Fields(std::vec::IntoIter<String>);

impl Fields {
    fn of(row: Vec<String>) -> Self {
        Self(row.into_iter())
    }

    fn text(&mut self) -> String {
        self.0.next().unwrap_or_default()
    }

    fn parsed<T: std::str::FromStr>(&mut self) -> Result<T> {
        let field = self.text();
        field.parse().map_err(|_| NodeError::Eval {
            expression: "information of the node".into(),
            reason: format!("{field:?} is not a {}", std::any::type_name::<T>()),
        })
    }

    fn property(&mut self) -> Option<String> {
        self.text().strip_prefix('=').map(str::to_owned)
    }

    fn connection(mut self) -> Result<ConnectionInfo> {
        Ok(ConnectionInfo {
            name: self.text(),
            user: self.text(),
            vhost: self.text(),
            state: self.text(),
            port: self.parsed()?,
            channels: self.parsed()?,
            heartbeat: self.parsed()?,
            connection_name: self.property(),
            information: self.property(),
        })
    }

    fn channel(mut self) -> Result<ChannelInfo> {
        Ok(ChannelInfo {
            connection: self.text(),
            number: self.parsed()?,
            user: self.text(),
            confirm: self.parsed()?,
            transactional: self.parsed()?,
            unacked: self.parsed()?,
            unconfirmed: self.parsed()?,
            consumers: self.parsed()?,
        })
    }

    fn consumer(mut self) -> Result<ConsumerInfo> {
        Ok(ConsumerInfo {
            vhost: self.text(),
            queue: self.text(),
            tag: self.text(),
            prefetch: self.parsed()?,
            ack_required: self.parsed()?,
        })
    }

    fn queue(mut self) -> Result<QueueInfo> {
        Ok(QueueInfo {
            ready: self.parsed()?,
            unacked: self.parsed()?,
            consumers: self.parsed()?,
            durable: self.parsed()?,
        })
    }
}
