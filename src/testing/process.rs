//! Choosing ports, and signals to the processes that are ours.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::error::{Result, failed_to};

/// Between two looks at something outside this process, which has no way to wake us.
pub(super) const POLL: Duration = Duration::from_millis(10);

/// A loopback port nobody listens on.
///
/// Not one the system would hand out itself: while the node is down, a client that keeps trying to reconnect could be
/// given the very port it connects to as its own, and TCP then connects it to itself.
pub(super) fn free_port() -> Result<u16> {
    for _ in 0..100 {
        let port = fastrand::u16(10_000..first_ephemeral_port());
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    let any = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    Ok(any.map_err(failed_to("find a free port"))?.port())
}

/// The lowest port the system picks for outgoing connections. Where it does not say, 32768, the usual one of Linux.
fn first_ephemeral_port() -> u16 {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let first = range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(32_768);
    // A machine whose range begins very low leaves us no room below it; better a port from its range than none.
    if first < 11_000 { 32_768 } else { first }
}

/// The id of a child that has not been waited for, so that it is still the child's own.
pub(super) fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Ends the process group the child leads.
pub(super) fn kill_group(child: &Child) -> Result<()> {
    match kill_process_group(pid_of(child), Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        // Some systems refuse to signal a group that has only a zombie left.
        Err(Errno::PERM) => Ok(()),
        Err(e) => Err(failed_to("kill a process group")(e.into())),
    }
}

/// Waits for the child to end, until `deadline`.
pub(super) fn wait_until(child: &mut Child, deadline: Instant) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait().map_err(failed_to("wait for a process"))? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

/// Waits until no process carries `marker`, a path of ours as they see it, in its environment; ends those that take too long.
///
/// The Erlang machine has helpers (for names, for disk space) which are not our children and not in its process group.
/// They end by themselves when they lose their pipe to the machine. Only Linux lets us see that.
pub(super) fn await_gone(marker: &Path) {
    let patience = Instant::now() + Duration::from_secs(2);
    let limit = patience + Duration::from_secs(3);
    loop {
        let left = carrying(marker);
        let now = Instant::now();
        if left.is_empty() || now >= limit {
            return;
        }
        if now >= patience {
            for pid in left {
                // It may be gone by now, which is what we want.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        thread::sleep(POLL);
    }
}

fn carrying(marker: &Path) -> Vec<Pid> {
    let marker = marker.as_os_str().as_encoded_bytes();
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if pid == own {
            continue;
        }
        // Not readable: somebody else's, or gone.
        let Ok(environment) = fs::read(entry.path().join("environ")) else { continue };
        if environment.windows(marker.len()).any(|window| window == marker) {
            found.extend(i32::try_from(pid).ok().and_then(Pid::from_raw));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::free_port;

    #[test]
    fn free_ports_differ() {
        let ports: std::collections::HashSet<u16> = (0..20).map(|_| free_port().unwrap()).collect();
        assert!(ports.len() > 10, "{ports:?}");
        assert!(ports.iter().all(|&port| port >= 10_000));
    }
}
