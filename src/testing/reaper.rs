//! The child that cleans up when this process can not.
//!
//! `Drop` does not run when a process is killed, nor for a `static`. The reaper is a small shell which reads its
//! standard input, a pipe only this process holds the other end of: however this process ends, the reaper reads the end
//! of the file, ends what it was told to hold and removes the directory. An orderly end is said in so many words, so
//! that the reaper never signals a process id which has gone to somebody else.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use super::error::{Result, failed_to};
use super::server::path_for_children;

/// Process groups first: that works on every Unix. Then, where there is `/proc`, whatever still carries the directory in
/// its environment: the Erlang machine puts its helpers in sessions of their own, out of reach of a group signal, and a
/// process started in the instant before this process died was never reported here.
const SCRIPT: &str = r#"
trap '' HUP INT QUIT TERM
cd /
held=
while read -r word group; do
    case $word in
    hold) held="$held $group" ;;
    free)
        rest=
        for one in $held; do [ "$one" = "$group" ] || rest="$rest $one"; done
        held=$rest
        ;;
    done) exit 0 ;;
    esac
done
for group in $held; do kill -s KILL -- "-$group" 2>/dev/null; done
round=0
while [ "$round" -lt 50 ]; do
    left=$(grep -lsF -- "$2" /proc/[0-9]*/environ) || break
    for one in $left; do
        one=${one#/proc/}
        kill -s KILL "${one%/environ}" 2>/dev/null
    done
    sleep 0.02
    round=$((round + 1))
done
rm -rf -- "$1"
"#;

#[derive(Debug)]
pub(super) struct Reaper {
    child: Child,
    /// `None` once dismissed.
    orders: Mutex<Option<ChildStdin>>,
}

impl Reaper {
    /// Starts the reaper of `dir`, which is `marker` in the environment of those it ends.
    pub(super) fn start(dir: &Path, marker: &Path) -> Result<Self> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "coney-reaper"])
            .arg(dir)
            .arg(marker)
            .env_clear()
            .env("PATH", path_for_children())
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Not in our group: an interrupt from the terminal is meant to end us, not the one who cleans up after us.
            .process_group(0)
            .spawn()
            .map_err(failed_to("start /bin/sh"))?;
        let orders = Mutex::new(child.stdin.take());
        Ok(Self { child, orders })
    }

    /// From now on `group` ends when we do.
    pub(super) fn hold(&self, group: u32) {
        self.order(&format!("hold {group}\n"));
    }

    /// `group` is dead. To be said before its leader is waited for, while its id can not be given to another process.
    pub(super) fn free(&self, group: u32) {
        self.order(&format!("free {group}\n"));
    }

    /// Everything is gone already; there is nothing to do.
    pub(super) fn dismiss(&mut self) {
        self.order("done\n");
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Err(e) = self.child.wait() {
            log::warn!("the reaper of a test node can not be waited for: {e}");
        }
    }

    fn order(&self, line: &str) {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipe) = orders.as_mut()
            && let Err(e) = pipe.write_all(line.as_bytes())
        {
            // The node works without it; only an unclean end of this process would leave something behind.
            log::warn!("the reaper of a test node is gone: {e}");
        }
    }
}
