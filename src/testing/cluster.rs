//! Several nodes that are one broker.

use std::sync::Arc;
use std::thread;

use super::error::{NodeError, Result};
use super::eval::binary;
use super::home::Home;
use super::node::Node;
use super::{Builder, RabbitMq};

/// More members than this RabbitMQ itself advises against (<https://www.rabbitmq.com/docs/clustering#node-count>).
const MOST_NODES: usize = 7;

/// `Leader(Quorum(Queue))` gives the name of the node that leads a quorum queue, as a row. The members are asked themselves:
/// the record of who led last may name one that is dead.
const LEADER: &str = "
    Quorum = fun(Queue) ->
        case rabbit_amqqueue:lookup(Queue) of
            {ok, Found} ->
                rabbit_quorum_queue = amqqueue:get_type(Found),
                {Name, _} = amqqueue:get_pid(Found),
                #{nodes := Nodes} = amqqueue:get_type_state(Found),
                {Name, Nodes};
            {error, not_found} -> none
        end
    end,
    Leader = fun(none) -> [];
                ({Name, Nodes}) ->
                    {ok, _, {_, Node}} = ra:members([{Name, Node} || Node <- Nodes]), [[Node]]
             end";

/// `Wait(Test)` waits for `Test()` to be true. The deadline is that of the call.
const WAIT: &str = "
    Loop = fun(Again, Test) ->
        case catch Test() of true -> ok; _ -> timer:sleep(20), Again(Again, Test) end
    end,
    Wait = fun(Test) -> Loop(Loop, Test) end";

/// `Exported(Module, Function, Arity)` is whether this version of RabbitMQ has that function. Those for clusters were named anew
/// in 3.12, and the old names go with Mnesia.
const EXPORTED: &str = "
    Exported = fun(Module, Function, Arity) ->
        code:ensure_loaded(Module), erlang:function_exported(Module, Function, Arity)
    end";

/// A few RabbitMQ nodes in a cluster, private to the test that started them, each as private as a [`RabbitMq`] is and
/// ended like one.
///
/// The nodes share a cookie and an Erlang name server that no other node knows. Each is a [`RabbitMq`] of its own, to be
/// asked, killed, paused and started again; it answers for itself where [connections](RabbitMq::connections) and
/// [channels](RabbitMq::channels) are concerned, and for the cluster where consumers and the declared are. The numbers of
/// messages of a queue are known to the node that [leads](Self::leader) it.
///
/// Of three nodes one may be down at a time: without most of its members a quorum queue takes and gives nothing. When all
/// are down, the last one that went must be started first, or together with the others, for only that one has everything.
///
/// ```no_run
/// use coney::Settings;
/// use coney::testing::RabbitMqCluster;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let cluster = RabbitMqCluster::start(3)?;
/// let settings = Settings::from_toml(&format!("[broker]\nhosts = {:?}", cluster.hosts()))?;
/// // ... declare the quorum queue "orders", use it, and then pull the plug of the node that leads it:
/// let leader = cluster.leader("orders")?;
/// cluster.node(leader).kill()?;
/// cluster.node(leader).start_again()?;
/// cluster.wait_until_in_sync("orders")?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct RabbitMqCluster {
    nodes: Vec<RabbitMq>,
}

impl Builder {
    /// Boots several nodes with these settings, 1 to 7, and makes a cluster of them. All accept logins and know of each
    /// other when this returns; with three nodes on two cores that takes some ten seconds. See [`RabbitMqCluster`].
    ///
    /// # Errors
    /// [`NodeError::ClusterSize`], what [`start`](Self::start) fails with, or [`NodeError::Eval`] and
    /// [`NodeError::Timeout`] from joining.
    pub fn start_cluster(self, count: usize) -> Result<RabbitMqCluster> {
        if !(1..=MOST_NODES).contains(&count) {
            return Err(NodeError::ClusterSize { asked: count, most: MOST_NODES });
        }
        let home = Arc::new(Home::new(self.settings.server.as_deref())?);
        let booted: Vec<Result<RabbitMq>> = thread::scope(|scope| {
            let boots: Vec<_> = (1..=count)
                .map(|number| {
                    let (home, settings) = (Arc::clone(&home), self.settings.clone());
                    scope.spawn(move || Node::boot_new(home, &format!("coney-{number}"), settings))
                })
                .collect();
            boots.into_iter().map(|boot| Ok(RabbitMq { node: boot.join().expect("booting does not panic")? })).collect()
        });
        let cluster = RabbitMqCluster { nodes: booted.into_iter().collect::<Result<_>>()? };
        cluster.join()?;
        Ok(cluster)
    }
}

impl RabbitMqCluster {
    /// Boots so many nodes with RabbitMQ's own defaults, 1 to 7, and makes a cluster of them; all accept logins when this
    /// returns.
    ///
    /// # Errors
    /// As [`Builder::start_cluster`].
    pub fn start(count: usize) -> Result<Self> {
        RabbitMq::builder().start_cluster(count)
    }

    /// The nodes, those that are down included.
    pub fn nodes(&self) -> &[RabbitMq] {
        &self.nodes
    }

    /// One of the nodes, counted from 0.
    ///
    /// # Panics
    /// When there are not that many.
    pub fn node(&self, index: usize) -> &RabbitMq {
        &self.nodes[index]
    }

    /// The [`url`](RabbitMq::url) of each node, in their order.
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(RabbitMq::url).collect()
    }

    /// `127.0.0.1:PORT` of each node, in their order: what `hosts` in the settings takes.
    pub fn hosts(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect()
    }

    /// Which node leads a quorum queue of the default virtual host, counted from 0. While the members elect another
    /// leader, this waits for them.
    ///
    /// # Errors
    /// [`NodeError::NoSuchQueue`]; [`NodeError::Eval`] when it is no quorum queue, when most of its members are down or
    /// no node answers; else as [`RabbitMq::eval`].
    pub fn leader(&self, queue: &str) -> Result<usize> {
        let question = format!("{LEADER}, Leader(Quorum({}))", resource(queue));
        let rows = self.ask(|node| node.node.rows(&question))?;
        let name = rows.first().and_then(|row| row.first()).ok_or_else(|| no_such(queue))?;
        let index = self.nodes.iter().position(|node| node.node.name == *name);
        index.ok_or_else(|| NodeError::Eval {
            expression: "the leader of a queue".into(),
            reason: format!("{name} is none of our nodes"),
        })
    }

    /// Waits until every node runs and every other knows that, for instance after
    /// [`start_again`](RabbitMq::start_again) of one; at most for the [`timeout`](Builder::timeout), for each node.
    ///
    /// # Errors
    /// [`NodeError::Timeout`] when one of them is known to be down; [`NodeError::Eval`] or [`NodeError::State`] when one
    /// does not answer.
    pub fn wait_until_whole(&self) -> Result<()> {
        let count = self.nodes.len();
        let question = format!(
            "{WAIT}, {EXPORTED},
             Running = case Exported(rabbit_nodes, list_running, 0) of
                 true -> fun rabbit_nodes:list_running/0;
                 false -> fun rabbit_nodes:all_running/0
             end,
             Wait(fun() -> length(Running()) =:= {count} end)"
        );
        self.nodes.iter().try_for_each(|node| node.node.run(&question))
    }

    /// Waits until every node runs and has, of a quorum queue of the default virtual host, all that its leader had
    /// committed when this was called: then any one node may go, and nothing is lost. At most for the
    /// [`timeout`](Builder::timeout), after as much for the nodes.
    ///
    /// # Errors
    /// [`NodeError::NoSuchQueue`]; [`NodeError::Timeout`]; [`NodeError::Eval`] when it is no quorum queue; else as
    /// [`wait_until_whole`](Self::wait_until_whole).
    pub fn wait_until_in_sync(&self, queue: &str) -> Result<()> {
        self.wait_until_whole()?;
        let question = format!(
            "{LEADER}, {WAIT},
             {{resource, VHost, queue, Name}} = {},
             Members = fun() ->
                 [{{proplists:get_value(<<\"Raft State\">>, Member), proplists:get_value(<<\"Commit Index\">>, Member)}}
                  || Member <- rabbit_quorum_queue:status(VHost, Name)]
             end,
             case Quorum({{resource, VHost, queue, Name}}) of
                 none -> [];
                 {{_, Nodes}} ->
                     true = length(Nodes) > 0,
                     Wait(fun() -> lists:keymember(leader, 1, Members()) end),
                     {{leader, Goal}} = lists:keyfind(leader, 1, Members()),
                     Wait(fun() ->
                         Now = Members(),
                         length(Now) =:= length(Nodes) andalso
                             lists:all(fun({{_, Index}}) -> is_integer(Index) andalso Index >= Goal end, Now)
                     end),
                     [[ok]]
             end",
            resource(queue)
        );
        let rows = self.ask(|node| node.node.rows(&question))?;
        if rows.is_empty() { Err(no_such(queue)) } else { Ok(()) }
    }

    /// Makes a cluster of nodes that run each for itself.
    ///
    /// One after another, for two that join at the same time can meet in the middle of each other's change. That is also
    /// why RabbitMQ's own peer discovery is not used: there the nodes race for a lock, wait for seconds when they lose,
    /// and one that finds no peer in time quietly stays alone.
    fn join(&self) -> Result<()> {
        let Some((first, others)) = self.nodes.split_first() else { return Ok(()) };
        for other in others {
            // Joining forgets what the node had of its own.
            let joining = format!(
                "{EXPORTED},
                 Join = case Exported(rabbit_db_cluster, join, 2) of
                     true -> fun rabbit_db_cluster:join/2;
                     false -> fun rabbit_mnesia:join_cluster/2
                 end,
                 ok = Join('{}', disc)",
                first.node.name
            );
            other.stop_app()?;
            other.node.run(&joining)?;
            other.start_app()?;
        }
        self.wait_until_whole()
    }

    /// The answer of the first node that gives one.
    fn ask<T>(&self, question: impl Fn(&RabbitMq) -> Result<T>) -> Result<T> {
        let mut nodes = self.nodes.iter();
        let mut answer = nodes.next().map(&question).expect("a cluster has a node");
        for node in nodes {
            // What takes too long on one takes too long on all.
            if !matches!(answer, Err(NodeError::Eval { .. } | NodeError::State { .. })) {
                break;
            }
            answer = question(node);
        }
        answer
    }
}

fn resource(queue: &str) -> String {
    format!("{{resource, <<\"/\">>, queue, {}}}", binary(queue))
}

fn no_such(queue: &str) -> NodeError {
    NodeError::NoSuchQueue { vhost: "/".into(), queue: queue.into() }
}

#[cfg(test)]
mod tests {
    use super::RabbitMqCluster;

    #[test]
    fn a_cluster_of_none_or_of_very_many_is_refused() {
        for (count, says) in [(0, "0 were asked for"), (8, "8 were asked for")] {
            let error = RabbitMqCluster::start(count).unwrap_err().to_string();
            assert!(error.contains("1 to 7 nodes") && error.contains(says), "{error}");
        }
    }
}
