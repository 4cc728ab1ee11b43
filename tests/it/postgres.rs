//! A private PostgreSQL server for tests, from the installed programs, and a database of its own for each test.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use postgres::{Client, NoTls};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

use crate::support::{unique, wait_until};

/// A server, which ends with the last test that has it.
pub struct Server {
    data: PathBuf,
    port: u16,
    child: Mutex<Option<Child>>,
    _directory: TempDir,
}

/// Where Debian has the programs; another system has them in the path.
fn program(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin").join(name)).find(|program| program.exists());
    found.unwrap_or_else(|| PathBuf::from(name))
}

/// The user and group that the server runs as: it refuses to be root.
fn user() -> Option<(u32, u32)> {
    if !geteuid().is_root() {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<String>>();
    let own = users.lines().map(fields).find(|fields| fields[0] == "postgres").expect("a user postgres: scripts/test");
    Some((own[2].parse().unwrap(), own[3].parse().unwrap()))
}

fn command(name: &str, directory: &Path) -> Command {
    let mut command = Command::new(program(name));
    command.current_dir(directory).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if let Some((user, group)) = user() {
        command.uid(user).gid(group);
    }
    command
}

impl Server {
    /// The one that all tests share.
    pub fn shared() -> Arc<Server> {
        static SERVER: Mutex<Weak<Server>> = Mutex::new(Weak::new());
        let mut server = SERVER.lock().unwrap_or_else(PoisonError::into_inner);
        server.upgrade().unwrap_or_else(|| {
            let new = Arc::new(Server::start());
            *server = Arc::downgrade(&new);
            new
        })
    }

    /// One of its own.
    pub fn start() -> Server {
        let directory = tempfile::tempdir().unwrap();
        if let Some((user, group)) = user() {
            chown(directory.path(), Some(user), Some(group)).unwrap();
        }
        let data = directory.path().join("data");
        let initdb = command("initdb", directory.path())
            .arg("-D")
            .arg(&data)
            .args(["-A", "trust", "-U", "coney", "-E", "UTF8", "--locale=C", "--no-sync"])
            .status()
            .expect("initdb: scripts/test installs PostgreSQL");
        assert!(initdb.success(), "initdb: {initdb}");
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let server = Server { data, port, child: Mutex::new(None), _directory: directory };
        server.start_again();
        server
    }

    pub fn start_again(&self) {
        let child = command("postgres", self.data.parent().unwrap())
            .arg("-D")
            .arg(&self.data)
            .args(["-p", &self.port.to_string()])
            .args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"])
            .spawn()
            .unwrap();
        *self.child.lock().unwrap() = Some(child);
        wait_until("the server accepts connections", || self.connect("postgres").is_ok());
    }

    /// Ends it at once, with all connections.
    pub fn stop(&self) {
        let Some(mut child) = self.child.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).unwrap();
        kill_process(pid, Signal::QUIT).unwrap();
        child.wait().unwrap();
    }

    pub fn connect(&self, database: &str) -> Result<Client, postgres::Error> {
        Client::connect(&self.url(database), NoTls)
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgresql://coney:s3cret@127.0.0.1:{}/{database}", self.port)
    }

    /// A database that nobody else has. Returns its name.
    pub fn database(&self) -> String {
        let name = unique("shop").replace('-', "_");
        self.connect("postgres").unwrap().batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
        name
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}
