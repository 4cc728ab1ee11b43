//! Which RabbitMQ is run, and how its programs are started.
//!
//! It is the one that is installed, a program that was named, or one in a root directory, for example Debian's of another
//! release. The programs of a root directory are started by `chroot`. They are processes like any other, children of ours
//! on the same network, so nodes live and die as they do elsewhere; only the paths they see are not ours. Their
//! directories are therefore in the root directory's own `/tmp`, where both sides see them, and nothing has to be mounted
//! for that.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::geteuid;

use super::error::{NodeError, Result, failed_to};

/// Names the server that is used where a program names none.
const VARIABLE: &str = "CONEY_RABBITMQ";

/// Where Debian and Red Hat install the server. What they have in `PATH` is a wrapper that insists on the system's user
/// and directories.
const SERVER: &str = "usr/lib/rabbitmq/bin/rabbitmq-server";
const WRAPPER: &str = "rabbitmq-script-wrapper";

/// Where distributions install Erlang.
const ERLANGS: [&str; 3] = ["usr/lib/erlang", "usr/lib64/erlang", "usr/local/lib/erlang"];

/// Becomes a program of a root directory: `sh -c ENTER coney-enter MOUNTS ROOT DIRECTORY PROGRAM ARGUMENT...`. With
/// `MOUNTS` it is in a mount namespace of its own, which ends with it, so that nothing stays mounted. What it mounts there
/// tells the node how much memory there is; it works without, too.
const ENTER: &str = r#"
mounts=$1 root=$2 directory=$3
shift 3
PATH=$PATH:/usr/sbin:/sbin
if [ "$mounts" = yes ]; then
    for one in proc dev; do mount --rbind "/$one" "$root/$one" 2>/dev/null; done
fi
exec chroot "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$directory" "$@"
"#;

/// A RabbitMQ that can be run. The paths are those that its programs see.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) rabbitmq: PathBuf,
    pub(super) erl_call: PathBuf,
    pub(super) epmd: PathBuf,
    root: Option<Root>,
}

#[derive(Debug)]
struct Root {
    dir: PathBuf,
    way: Way,
}

/// What it takes here to start a program in a root directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// As root, with a mount namespace.
    Mounts,
    /// As root in a container that may have no more.
    Chroot,
    /// As anybody else: root only in a user namespace.
    UserNamespace,
}

impl Server {
    /// The server that was asked for, by the program or else by the variable, or the one that is installed.
    pub(super) fn find(asked: Option<&Path>) -> Result<Self> {
        let by_variable = env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        let Some(path) = asked.or(by_variable.as_deref()) else { return Self::installed() };
        let bad = |reason: String| {
            let by = if asked.is_some() { "Builder::server" } else { VARIABLE };
            NodeError::Server { path: path.to_owned(), by, reason }
        };
        let kind = fs::metadata(path).map_err(|e| bad(format!("{e}; expected {EXPECTED}")))?.file_type();
        if kind.is_dir() {
            return Self::in_root(path).map_err(bad);
        }
        Self::program(&std::path::absolute(path).map_err(failed_to("find the current directory"))?)
    }

    fn installed() -> Result<Self> {
        Self::program(&find("rabbitmq-server", &[Path::new("/").join(SERVER)])?)
    }

    fn program(path: &Path) -> Result<Self> {
        // Debian's wrapper would change to a user of its own; what it wraps is beside it.
        let real = path.canonicalize().map_err(failed_to("resolve rabbitmq-server"))?;
        let wrapped = real.file_name() == Some(OsStr::new(WRAPPER));
        let rabbitmq = if wrapped { real.with_file_name("rabbitmq-server") } else { path.to_owned() };
        let (erl_call, epmd) = (find_erlang("erl_call")?, find_erlang("epmd")?);
        Ok(Self { rabbitmq, erl_call, epmd, root: None })
    }

    fn in_root(dir: &Path) -> Result<Self, String> {
        let dir = dir.canonicalize().map_err(|e| e.to_string())?;
        // Links in there may be absolute, and mean files in there: they are not followed from here.
        let is_there = |path: &Path| fs::symlink_metadata(dir.join(path)).is_ok();
        let inside = |path: PathBuf| Path::new("/").join(path);
        if !is_there(Path::new(SERVER)) {
            return Err(format!("there is no {SERVER} in it; expected {EXPECTED}"));
        }
        let erlang = |program: &str| {
            let found = ERLANGS.iter().find_map(|erlang| {
                let entries = fs::read_dir(dir.join(erlang)).ok()?;
                let versions = entries.flatten().map(|entry| entry.file_name());
                let mut bins = versions.filter(|name| name.as_encoded_bytes().starts_with(b"erts-"));
                bins.find_map(|version| {
                    let path = Path::new(erlang).join(version).join("bin").join(program);
                    is_there(&path).then_some(path)
                })
            });
            found.map(inside).ok_or_else(|| format!("there is no {program} of Erlang in it; expected {EXPECTED}"))
        };
        let (erl_call, epmd) = (erlang("erl_call")?, erlang("epmd")?);
        let root = Root::open(dir)?;
        Ok(Self { rabbitmq: inside(SERVER.into()), erl_call, epmd, root: Some(root) })
    }

    /// Makes a directory for nodes, which is removed with the value.
    pub(super) fn directory(&self) -> Result<tempfile::TempDir> {
        let mut builder = tempfile::Builder::new();
        let made = match &self.root {
            None => builder.prefix("coney-rabbitmq-").tempdir(),
            // Processes are told by the path that they see. With this name none of those is a path of ours.
            Some(root) => builder.prefix("coney-rabbitmq-in-root-").rand_bytes(12).tempdir_in(root.dir.join("tmp")),
        };
        made.map_err(|e| match &self.root {
            None => failed_to("create a temporary directory")(e),
            Some(root) => failed_to(format!("create a directory in {}", root.dir.join("tmp").display()))(e),
        })
    }

    /// The same place as the server sees it.
    pub(super) fn seen(&self, path: &Path) -> PathBuf {
        match self.root.as_ref().and_then(|root| path.strip_prefix(&root.dir).ok()) {
            Some(path) => Path::new("/").join(path),
            None => path.to_owned(),
        }
    }

    /// A command that runs a program of the server's in a directory, which is given as we see it; with nothing in its
    /// environment but where programs are.
    pub(super) fn command(&self, program: &Path, directory: &Path) -> Command {
        let mut command = match &self.root {
            None => {
                let mut command = Command::new(program);
                command.current_dir(directory);
                command
            }
            Some(root) => root.command(root.way, program, &self.seen(directory)),
        };
        command.env_clear().env("PATH", path_for_children()).stdin(Stdio::null());
        command
    }

    /// The same for a program that asks the system for nothing, and is started often.
    pub(super) fn quick_command(&self, program: &Path, directory: &Path) -> Command {
        let mut command = match &self.root {
            Some(root) if root.way == Way::Mounts => root.command(Way::Chroot, program, &self.seen(directory)),
            _ => return self.command(program, directory),
        };
        command.env_clear().env("PATH", path_for_children()).stdin(Stdio::null());
        command
    }
}

/// What a path to a server may be.
const EXPECTED: &str = "the program rabbitmq-server, or the root directory of a system in which it is installed";

impl Root {
    /// Finds a way into it by starting a program there.
    fn open(dir: PathBuf) -> Result<Self, String> {
        let temp = dir.join("tmp");
        // A link that leads out of it would be another directory inside.
        if temp.canonicalize().ok().as_ref() != Some(&temp) {
            return Err(format!("{} is no directory; nodes have theirs in it", temp.display()));
        }
        let ways: &[Way] = if geteuid().is_root() { &[Way::Mounts, Way::Chroot] } else { &[Way::UserNamespace] };
        let mut said = String::new();
        let mut root = Self { dir, way: Way::Chroot };
        for &way in ways {
            root.way = way;
            let mut command = root.command(way, Path::new("/bin/true"), Path::new("/"));
            let tried = command.env_clear().env("PATH", path_for_children()).stdin(Stdio::null()).output();
            match tried {
                Ok(output) if output.status.success() => return Ok(root),
                Ok(output) => said = String::from_utf8_lossy(&output.stderr).trim().to_owned(),
                Err(e) => said = e.to_string(),
            }
        }
        Err(format!("no program can be started in it, which takes root or a user namespace: {said}"))
    }

    fn command(&self, way: Way, program: &Path, directory: &Path) -> Command {
        let (first, arguments): (&str, &[&str]) = match way {
            Way::Mounts => ("unshare", &["--mount", "/bin/sh"]),
            Way::Chroot => ("/bin/sh", &[]),
            Way::UserNamespace => ("unshare", &["--user", "--map-root-user", "--mount", "/bin/sh"]),
        };
        let mut command = Command::new(first);
        command.args(arguments).args(["-c", ENTER, "coney-enter"]);
        command.arg(if way == Way::Chroot { "no" } else { "yes" });
        command.arg(&self.dir).arg(directory).arg(program).current_dir("/");
        command
    }
}

/// Our `PATH`, and the directories without which no script runs.
pub(super) fn path_for_children() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    if !path.is_empty() {
        path.push(":");
    }
    path.push("/usr/local/bin:/usr/bin:/bin");
    path
}

/// A program of the Erlang installation, which not every distribution links into `PATH`.
fn find_erlang(program: &'static str) -> Result<PathBuf> {
    let mut places = Vec::new();
    // `erl` is a link to, or lives in, <root>/bin; its programs are in <root>/erts-*/bin or <root>/lib/*/bin.
    if let Ok(erl) = find("erl", &[]).and_then(|erl| erl.canonicalize().map_err(failed_to("resolve erl")))
        && let Some(root) = erl.ancestors().nth(2)
    {
        for parent in [root.to_owned(), root.join("lib")] {
            for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
                places.push(entry.path().join("bin").join(program));
            }
        }
    }
    find(program, &places)
}

fn find(program: &'static str, known: &[PathBuf]) -> Result<PathBuf> {
    let path = path_for_children();
    let in_path = env::split_paths(&path).map(|dir| dir.join(program));
    known.iter().cloned().chain(in_path).find(|file| file.is_file()).ok_or(NodeError::NotInstalled { program })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{NodeError, Server, find};

    #[test]
    fn an_absent_program_says_how_to_get_it() {
        let error = find("no-such-rabbitmq-server", &["/no/such/place".into()]).unwrap_err();
        assert!(matches!(error, NodeError::NotInstalled { program: "no-such-rabbitmq-server" }));
        assert_eq!(
            error.to_string(),
            "no-such-rabbitmq-server is not installed; scripts/test installs it (Debian: apt-get install rabbitmq-server)"
        );
    }

    #[test]
    fn what_is_no_server_is_refused_by_name() {
        let empty = tempfile::tempdir().unwrap();
        for (path, says) in [
            (Path::new("/no/such/place"), "No such file"),
            (empty.path(), "there is no usr/lib/rabbitmq/bin/rabbitmq-server in it"),
        ] {
            let text = Server::find(Some(path)).unwrap_err().to_string();
            assert!(
                text.starts_with(&format!(
                    "cannot run RabbitMQ from {}, which Builder::server names: ",
                    path.display()
                )),
                "{text}"
            );
            assert!(text.contains(says) && text.contains("expected the program rabbitmq-server"), "{text}");
        }
        // As in a root directory of which a part is missing.
        std::fs::create_dir_all(empty.path().join("usr/lib/rabbitmq/bin")).unwrap();
        std::fs::write(empty.path().join(super::SERVER), "").unwrap();
        let text = Server::find(Some(empty.path())).unwrap_err().to_string();
        assert!(text.contains("there is no erl_call of Erlang in it"), "{text}");
    }
}
