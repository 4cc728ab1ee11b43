//! The private ground a node stands on: a directory, a cookie, a name server, and the reaper of it all.
//!
//! Apart from the node, because several nodes of one cluster would share it.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::error::{NodeError, Result, failed_to};
use super::process::{POLL, await_gone, free_port, kill_group};
use super::reaper::Reaper;
use super::server::Server;

/// Fresh ports are tried this often. A clash needs two parties picking one of some twenty thousand in the same second.
pub(super) const PORT_ATTEMPTS: usize = 3;

#[derive(Debug)]
pub(super) struct Home {
    pub(super) server: Server,
    pub(super) epmd_port: u16,
    epmd: Option<Child>,
    reaper: Reaper,
    /// `None` only while being dropped.
    dir: Option<TempDir>,
}

impl Home {
    pub(super) fn new(server: Option<&Path>) -> Result<Self> {
        let server = Server::find(server)?;
        let dir = server.directory()?;
        let reaper = Reaper::start(dir.path(), &server.seen(dir.path()))?;
        let mut home = Self { server, epmd_port: 0, epmd: None, reaper, dir: Some(dir) };
        home.write_cookie()?;
        home.start_epmd()?;
        Ok(home)
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.as_ref().expect("set until drop").path()
    }

    /// A command that sees this home, and nothing of the settings of the system's own RabbitMQ or Erlang. It runs in
    /// `directory`.
    pub(super) fn command(&self, program: &Path, directory: &Path) -> Command {
        let mut command = self.server.command(program, directory);
        self.let_see(&mut command);
        command
    }

    /// The same for `erl_call`.
    pub(super) fn erl_call(&self) -> Command {
        let mut command = self.server.quick_command(&self.server.erl_call, self.path());
        self.let_see(&mut command);
        command
    }

    fn let_see(&self, command: &mut Command) {
        command
            .env("LANG", "C.UTF-8")
            .env("HOME", self.seen(self.path()))
            .env("ERL_EPMD_PORT", self.epmd_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("ERL_CRASH_DUMP_SECONDS", "0");
    }

    /// A path in here as the server's programs see it.
    pub(super) fn seen(&self, path: &Path) -> PathBuf {
        self.server.seen(path)
    }

    pub(super) fn reaper(&self) -> &Reaper {
        &self.reaper
    }

    /// Who knows the cookie may run anything on the node, so nobody else may read it; Erlang insists on that.
    fn write_cookie(&self) -> Result<()> {
        let cookie: String = std::iter::repeat_with(fastrand::alphanumeric).take(24).collect();
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.path().join(".erlang.cookie"))
            .and_then(|mut file| file.write_all(cookie.as_bytes()))
            .map_err(failed_to("write the Erlang cookie"))
    }

    /// Erlang's name server, in the foreground: left to themselves nodes start one as a daemon, which outlives them all.
    fn start_epmd(&mut self) -> Result<()> {
        for _ in 0..PORT_ATTEMPTS {
            self.epmd_port = free_port()?;
            let mut epmd = self
                .command(&self.server.epmd, self.path())
                .args(["-port", &self.epmd_port.to_string(), "-address", "127.0.0.1"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .process_group(0)
                .spawn()
                .map_err(failed_to("start epmd"))?;
            self.reaper.hold(epmd.id());
            let deadline = Instant::now() + Duration::from_secs(10);
            while Instant::now() < deadline {
                if epmd.try_wait().map_err(failed_to("wait for epmd"))?.is_some() {
                    break;
                }
                if TcpStream::connect((Ipv4Addr::LOCALHOST, self.epmd_port)).is_ok() {
                    self.epmd = Some(epmd);
                    return Ok(());
                }
                thread::sleep(POLL);
            }
            self.end(epmd);
        }
        Err(NodeError::Boot { reason: "epmd did not start".into(), log: String::new() })
    }

    /// Ends a process group of ours and waits for its leader.
    pub(super) fn end(&self, mut leader: Child) {
        // A leader that ended by itself and was waited for has no id any more that we could signal.
        let ended = matches!(leader.try_wait(), Ok(Some(_)));
        if !ended && let Err(e) = kill_group(&leader) {
            log::warn!("a process of a test node can not be ended: {e}");
            return;
        }
        self.reaper.free(leader.id());
        if let Err(e) = leader.wait() {
            log::warn!("a process of a test node can not be waited for: {e}");
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Some(epmd) = self.epmd.take() {
            self.end(epmd);
        }
        await_gone(&self.seen(self.path()));
        if let Some(dir) = self.dir.take()
            && let Err(e) = dir.close()
        {
            log::warn!("the directory of a test node can not be removed: {e}");
        }
        self.reaper.dismiss();
    }
}
