//! One server process: its settings, its life and death.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, WaitId, WaitIdOptions, kill_process, waitid};

use super::error::{NodeError, Result, failed_to};
use super::home::{Home, PORT_ATTEMPTS};
use super::process::{POLL, await_gone, free_port, pid_of, wait_until};
use super::version::Version;

/// Succeeds once logins are accepted. `await_startup` waits inside the node, so that this need not be asked over and over.
/// No connection is tried: it would show among the connections a test looks at.
pub(super) const READY: &str = "
    ok = rabbit:await_startup(node(), false, 600000), true = rabbit:is_running(),
    [_ | _] = rabbit_networking:active_listeners(),
    {ok, Version} = application:get_key(rabbit, vsn), [[Version]]";

/// A queue declared a moment ago is in a log that Erlang writes out when it gets round to it; without this, whether it
/// survives a kill is a matter of luck. Khepri, which RabbitMQ may use instead of Mnesia from 4.0 on, writes before it answers.
const WRITE_DOWN: &str = "case mnesia:system_info(is_running) of yes -> mnesia:sync_log(); _ -> ok end, []";

/// Lines of the log lie in a buffer for some seconds.
const WRITE_LOG: &str =
    "[catch Module:filesync(Id) || #{id := Id, module := Module} <- logger:get_handler_config()], []";

/// How long a node may take to write down what it has.
const WRITING: Duration = Duration::from_secs(5);

/// How much of each log an error carries.
const LOG_TAIL_LINES: usize = 100;

/// What the builder collects.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    pub(super) server: Option<PathBuf>,
    pub(super) conf: Vec<String>,
    /// Keys of `rabbitmq.conf`, and files they are to name.
    pub(super) conf_files: Vec<(String, PathBuf)>,
    /// By application: RabbitMQ takes only the last of several entries for the same one.
    pub(super) advanced: BTreeMap<String, Vec<(String, String)>>,
    pub(super) plugins: Vec<String>,
    pub(super) boot_timeout: Duration,
    pub(super) timeout: Duration,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) home: Arc<Home>,
    pub(super) name: String,
    pub(super) settings: Settings,
    pub(super) amqp_port: u16,
    dist_port: u16,
    dir: PathBuf,
    version: OnceLock<Version>,
    /// Asked by every call, also while `life` is held for a whole restart.
    paused: AtomicBool,
    /// The running process. Held for the length of a change, so that changes follow one another.
    life: Mutex<Option<Child>>,
}

impl Node {
    /// Boots a node called `short_name`, on fresh ports.
    pub(super) fn boot_new(home: Arc<Home>, short_name: &str, settings: Settings) -> Result<Self> {
        let dir = home.path().join(short_name);
        let mut node = Self {
            home,
            name: format!("{short_name}@localhost"),
            settings,
            amqp_port: 0,
            dist_port: 0,
            dir,
            version: OnceLock::new(),
            paused: AtomicBool::new(false),
            life: Mutex::new(None),
        };
        let mut attempt = 1;
        loop {
            node.amqp_port = free_port()?;
            node.dist_port = free_port()?;
            node.write_files()?;
            match node.boot() {
                Err(NodeError::Boot { log, .. }) if attempt < PORT_ATTEMPTS && is_port_clash(&log) => attempt += 1,
                Err(e) => return Err(e),
                Ok(()) => return Ok(node),
            }
            node.forget_data()?;
        }
    }

    fn life(&self) -> MutexGuard<'_, Option<Child>> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_files(&self) -> Result<()> {
        let mut conf = format!("listeners.tcp.1 = 127.0.0.1:{}\n", self.amqp_port);
        // A nearly full disk must not block publishers; a test that wants that asks for it.
        conf.push_str("disk_free_limit.absolute = 1MB\n");
        for line in &self.settings.conf {
            conf.push_str(line);
            conf.push('\n');
        }
        fs::create_dir_all(&self.dir).map_err(failed_to("create a node's directory"))?;
        for (number, (key, file)) in self.settings.conf_files.iter().enumerate() {
            let copy = self.dir.join(format!("file-{number}"));
            fs::copy(file, &copy).map_err(failed_to(format!("copy {}, for {key}", file.display())))?;
            conf.push_str(&format!("{key} = {}\n", self.home.seen(&copy).display()));
        }
        let applications: Vec<String> = self
            .settings
            .advanced
            .iter()
            .map(|(application, settings)| {
                let settings: Vec<String> =
                    settings.iter().map(|(key, value)| format!("    {{{key}, {value}}}")).collect();
                format!("  {{{application}, [\n{}\n  ]}}", settings.join(",\n"))
            })
            .collect();
        let plugins: Vec<String> = self.settings.plugins.iter().map(|plugin| atom(plugin)).collect();
        let plugins = format!("[{}].\n", plugins.join(","));
        let advanced = format!("[\n{}\n].\n", applications.join(",\n"));
        fs::write(self.dir.join("rabbitmq.conf"), conf)
            .and_then(|()| fs::write(self.dir.join("advanced.config"), advanced))
            .and_then(|()| fs::write(self.dir.join("enabled_plugins"), plugins))
            .and_then(|()| fs::write(self.dir.join("rabbitmq-env.conf"), ""))
            .map_err(failed_to("write the node's configuration"))
    }

    fn forget_data(&self) -> Result<()> {
        fs::remove_dir_all(&self.dir).map_err(failed_to("remove a node's data"))
    }

    fn spawn(&self) -> Result<Child> {
        let output = |name| File::options().create(true).append(true).open(self.dir.join(name));
        let stdout = output("output").map_err(failed_to("create the node's output file"))?;
        let stderr = stdout.try_clone().map_err(failed_to("create the node's output file"))?;
        let file = |name| self.home.seen(&self.dir.join(name));
        self.home
            .command(&self.home.server.rabbitmq, &self.dir)
            .env("RABBITMQ_NODENAME", &self.name)
            .env("RABBITMQ_DIST_PORT", self.dist_port.to_string())
            .env("RABBITMQ_MNESIA_BASE", file("mnesia"))
            .env("RABBITMQ_LOG_BASE", file("log"))
            .env("RABBITMQ_LOGS", file("log/node.log"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", file("enabled_plugins"))
            .env("RABBITMQ_CONFIG_FILE", file("rabbitmq.conf"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", file("advanced.config"))
            .env("RABBITMQ_CONF_ENV_FILE", file("rabbitmq-env.conf"))
            .env("RABBITMQ_PID_FILE", file("pid"))
            // Makes the script become the Erlang machine instead of waiting for it as its parent, so that our child is
            // the machine. It also leaves out `-noinput`, which is given below.
            .env("RABBITMQ_ALLOW_INPUT", "1")
            .arg("-noinput")
            .args(["-start_epmd", "false"])
            .args(["-kernel", "inet_dist_use_interface", "{127,0,0,1}"])
            // A test's broker is small, and shares the machine with the test and perhaps with other nodes: few threads,
            // not bound to processors, or all nodes would be bound to the same ones.
            .args(["+S", "2:2", "+stbt", "u"])
            // A thread that looks for more work for a moment before it sleeps saves waking it. Booting reads very many
            // small files, each by way of another thread: RabbitMQ's own default, not to look, more than doubles it.
            .args(["+sbwt", "short", "+sbwtdcpu", "short", "+sbwtdio", "short"])
            .stdout(stdout)
            .stderr(stderr)
            .process_group(0)
            .spawn()
            .map_err(failed_to("start rabbitmq-server"))
    }

    /// Starts the process and waits until it accepts logins.
    pub(super) fn boot(&self) -> Result<()> {
        let mut life = self.life();
        if life.is_some() {
            return Err(NodeError::State { what: "start the node", state: "running" });
        }
        let mut child = self.spawn()?;
        self.home.reaper().hold(child.id());
        match self.await_boot(&mut child) {
            Ok(()) => {
                *life = Some(child);
                Ok(())
            }
            Err(reason) => {
                self.bury(child);
                Err(NodeError::Boot { reason, log: self.log_tail() })
            }
        }
    }

    fn await_boot(&self, child: &mut Child) -> Result<(), String> {
        let deadline = Instant::now() + self.settings.boot_timeout;
        loop {
            if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
                return Err(format!("it ended with {status}"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("not ready after {:?}", self.settings.boot_timeout));
            }
            // Fails while the node has no name yet, and when it gives up.
            if let Ok(rows) = self.evaluate(READY, left) {
                let text = rows.into_iter().flatten().next().unwrap_or_default();
                let version = Version::parse(&text).ok_or_else(|| format!("it calls itself version {text:?}"))?;
                self.version.get_or_init(|| version);
                return Ok(());
            }
            thread::sleep(POLL);
        }
    }

    /// Ends the process if it has not ended, and waits for its helpers to go.
    fn bury(&self, child: Child) {
        self.home.end(child);
        self.paused.store(false, Ordering::SeqCst);
        await_gone(&self.home.seen(&self.dir.join("mnesia")));
    }

    pub(super) fn kill(&self) -> Result<()> {
        // A node that is paused, or too ill to answer, is killed as it is.
        for what in [WRITE_LOG, WRITE_DOWN] {
            if let Err(e) = self.evaluate(what, self.settings.timeout.min(WRITING)) {
                log::debug!("killing a test node that has not written everything down: {e}");
                break;
            }
        }
        let child = self.life().take().ok_or(NodeError::State { what: "kill the node", state: "killed" })?;
        self.bury(child);
        Ok(())
    }

    /// Lets the node end in order: it closes its connections and its files.
    pub(super) fn shut_down(&self) -> Result<()> {
        self.refuse_if_paused("restart the node")?;
        let mut life = self.life();
        let child = life.as_mut().ok_or(NodeError::State { what: "restart the node", state: "killed" })?;
        kill_process(pid_of(child), Signal::TERM).map_err(|e| failed_to("end the node")(e.into()))?;
        let ended = wait_until(child, Instant::now() + self.settings.timeout)?;
        if ended.is_none() {
            return Err(self.timed_out("shutting the node down"));
        }
        if let Some(child) = life.take() {
            self.bury(child);
        }
        Ok(())
    }

    /// Stops the process in its tracks; returns when it stands still.
    pub(super) fn pause(&self) -> Result<()> {
        let life = self.life();
        let child = life.as_ref().ok_or(NodeError::State { what: "pause the node", state: "killed" })?;
        if self.paused.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.paused.store(true, Ordering::SeqCst);
        kill_process(pid_of(child), Signal::STOP).map_err(|e| failed_to("pause the node")(e.into()))?;
        let deadline = Instant::now() + self.settings.timeout;
        while Instant::now() < deadline {
            let stopped = waitid(WaitId::Pid(pid_of(child)), WaitIdOptions::STOPPED | WaitIdOptions::NOHANG);
            if stopped.map_err(|e| failed_to("pause the node")(e.into()))?.is_some() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Err(self.timed_out("pausing the node"))
    }

    pub(super) fn resume(&self) -> Result<()> {
        let life = self.life();
        let child = life.as_ref().ok_or(NodeError::State { what: "resume the node", state: "killed" })?;
        kill_process(pid_of(child), Signal::CONT).map_err(|e| failed_to("resume the node")(e.into()))?;
        self.paused.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Waiting for an answer from a paused node is waiting for the time-out.
    pub(super) fn refuse_if_paused(&self, what: &'static str) -> Result<()> {
        if self.paused.load(Ordering::SeqCst) {
            return Err(NodeError::State { what, state: "paused" });
        }
        Ok(())
    }

    pub(super) fn timed_out(&self, what: &str) -> NodeError {
        NodeError::Timeout { what: what.into(), after: self.settings.timeout }
    }

    /// Known from the first boot on.
    pub(super) fn version(&self) -> Version {
        *self.version.get().expect("a node is there for others once it has booted")
    }

    /// Everything the node logged, in all its lives.
    pub(super) fn log(&self) -> String {
        // One that does not run, or is paused, has written what it will.
        if let Err(e) = self.evaluate(WRITE_LOG, self.settings.timeout.min(WRITING)) {
            log::debug!("a test node has not written its log: {e}");
        }
        self.log_on_disk()
    }

    fn log_on_disk(&self) -> String {
        fs::read(self.dir.join("log/node.log"))
            .map(|log| String::from_utf8_lossy(&log).into_owned())
            .unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let output = fs::read(self.dir.join("output")).unwrap_or_default();
        format!(
            "--- end of its output ---\n{}\n--- end of its log ---\n{}",
            tail(&String::from_utf8_lossy(&output)),
            tail(&self.log_on_disk())
        )
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Taken out first: `bury` must not run under the lock of a poisoned or busy life.
        let child = self.life().take();
        if let Some(child) = child {
            self.bury(child);
        }
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

/// Somebody took one of the ports between our look and the node's.
/// A word of Erlang, whatever is in it.
fn atom(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

fn is_port_clash(log: &str) -> bool {
    // The broker's own words for the AMQP port and for the distribution port.
    ["eaddrinuse", "dist_port_already_used"].iter().any(|sign| log.contains(sign))
}
