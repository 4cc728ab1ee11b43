//! Running the program: what goes in, what comes out, and how it ends.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write, pipe};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::support::{PATIENCE, wait_until};

/// The program, with no settings but those that a test gives it.
pub fn coney() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coney"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CONEY_") {
            command.env_remove(name);
        }
    }
    command.current_dir("/");
    command
}

/// What a program that has ended has said.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl fmt::Debug for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ran { code, stdout, stderr } = self;
        write!(f, "ended with {code:?}, stdout:\n{}\nstderr:\n{stderr}", String::from_utf8_lossy(stdout))
    }
}

impl Ran {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("UTF-8")
    }

    pub fn lines(&self) -> Vec<&str> {
        self.text().lines().collect()
    }

    /// Each line, as JSON.
    pub fn json(&self) -> Vec<serde_json::Value> {
        self.lines().into_iter().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// It has ended with this code, and has had nothing to complain about.
    #[track_caller]
    pub fn well(self) -> Ran {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{}", String::from_utf8_lossy(&self.stdout));
        self
    }

    /// It has ended with this code and one line on stderr that has all of these in it.
    #[track_caller]
    pub fn failed(self, code: i32, parts: &[&str]) -> Ran {
        assert_eq!((self.code, self.stderr.lines().count()), (Some(code), 1), "{self:?}");
        assert!(self.stderr.starts_with("coney: "), "{}", self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "{part:?} is not in {:?}", self.stderr);
        }
        self
    }
}

/// Runs it to its end.
pub fn run(arguments: &[&str]) -> Ran {
    run_with(coney().args(arguments), b"")
}

/// Runs it to its end with this on stdin.
pub fn feed(arguments: &[&str], stdin: &[u8]) -> Ran {
    run_with(coney().args(arguments), stdin)
}

/// Runs it in this directory, where it finds its app.toml.
pub fn run_in(directory: &Path, arguments: &[&str]) -> Ran {
    run_with(coney().current_dir(directory).args(arguments), b"")
}

pub fn run_with(command: &mut Command, stdin: &[u8]) -> Ran {
    let mut program = Program::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()));
    let Child { stdin: input, stdout, stderr, .. } = &mut program.0;
    let (mut input, stdout, stderr) = (input.take().unwrap(), stdout.take().unwrap(), stderr.take().unwrap());
    let stdin = stdin.to_vec();
    // It may end without having read all of it.
    let writing = thread::spawn(move || input.write_all(&stdin).ok());
    let (stdout, stderr) = (read(stdout), read(stderr));
    let code = program.wait().code();
    writing.join().unwrap();
    let (stdout, stderr) = (stdout.join().unwrap(), String::from_utf8(stderr.join().unwrap()).unwrap());
    assert!(!stderr.contains("panicked"), "{stderr}");
    Ran { code, stdout, stderr }
}

fn read(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        from.read_to_end(&mut all).unwrap();
        all
    })
}

/// Runs it with a stdout that nobody reads any more.
pub fn run_unread(arguments: &[&str]) -> Ran {
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut command = coney();
    let mut program =
        Program::spawn(command.args(arguments).stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()));
    let stderr = read(program.0.stderr.take().unwrap());
    let code = program.wait().code();
    Ran { code, stdout: Vec::new(), stderr: String::from_utf8(stderr.join().unwrap()).unwrap() }
}

/// Runs it by a shell that does this with its stdout, such as `>&-`.
pub fn run_redirected(arguments: &[&str], redirection: &str) -> Ran {
    let program = coney();
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec \"$0\" \"$@\" {redirection}")]).arg(program.get_program()).args(arguments);
    for (name, _) in program.get_envs() {
        shell.env_remove(name);
    }
    run_with(shell.current_dir("/"), b"")
}

/// Runs it with a pipe as its stdout out of which so many bytes are read before its reader goes; returns those too.
pub fn run_read(arguments: &[&str], length: usize) -> (Ran, Vec<u8>) {
    let (mut reader, writer) = pipe().unwrap();
    let mut command = coney();
    let mut program =
        Program::spawn(command.args(arguments).stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()));
    // It keeps the writing end otherwise.
    drop(command);
    let stderr = read(program.0.stderr.take().unwrap());
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes).unwrap();
    drop(reader);
    let code = program.wait().code();
    (Ran { code, stdout: Vec::new(), stderr: String::from_utf8(stderr.join().unwrap()).unwrap() }, bytes)
}

/// A directory with an app.toml in it.
pub fn settings(text: &str) -> TempDir {
    let directory = TempDir::new().unwrap();
    std::fs::write(directory.path().join("app.toml"), text).unwrap();
    directory
}

/// A program that is running. Dropping it ends it.
pub struct Program(pub Child);

impl Program {
    pub fn spawn(command: &mut Command) -> Program {
        Program(command.spawn().unwrap())
    }

    /// Starts it with pipes to its stdin and from its stdout, whose lines come as they are written.
    pub fn talk(arguments: &[&str]) -> (Program, ChildStdin, Receiver<String>) {
        let mut command = coney();
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut program = Program::spawn(&mut command);
        let (stdin, stdout) = (program.0.stdin.take().unwrap(), program.0.stdout.take().unwrap());
        let (said, says) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if said.send(line).is_err() {
                    return;
                }
            }
        });
        (program, stdin, says)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the program has ended", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Ended already, if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The next line that a program writes.
#[track_caller]
pub fn next(says: &Receiver<String>) -> String {
    says.recv_timeout(PATIENCE).expect("a line")
}
