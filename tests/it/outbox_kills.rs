//! Orders go from one database to another, each exactly once, while the programs and the broker are killed.

use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{example, hurt_node};

/// How many orders there are, how often a program is killed, and after how many kills of programs the broker is.
/// `CONEY_OUTBOX_KILLS` sets another number of kills; there are 125 orders for each.
const KILLS: usize = 12;
const ORDERS_FOR_EACH: usize = 125;
const BROKER_EVERY: usize = 6;

/// One of the two programs, running.
struct Program {
    role: &'static str,
    child: Child,
}

impl Program {
    fn start(role: &'static str, directory: &Path, orders: usize) -> Program {
        let child = example("orders")
            .args(["--role", role, "--orders", &orders.to_string(), "--config"])
            .arg(directory.join("app.toml"))
            .arg("--directory")
            .arg(directory)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Program { role, child }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn killed_at_random_moments_orders_and_messages_handled_are_the_same() {
    let kills = std::env::var("CONEY_OUTBOX_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let orders = kills * ORDERS_FOR_EACH;
    let (node, directory) = (hurt_node(), tempfile::tempdir().unwrap());
    let queue = "[pools.publish]\nconfirm_timeout = \"5s\"\n[pools.listen]\nretry = [\"100ms\"]\nmax_attempts = 1000\n";
    let settings = format!("[broker]\nurl = {:?}\nheartbeat = \"2s\"\nconnect_timeout = \"3s\"\n{queue}", node.url());
    std::fs::write(directory.path().join("app.toml"), settings).unwrap();
    let mut programs = ["shop", "warehouse"].map(|role| Program::start(role, directory.path(), orders));
    let begun = Instant::now();
    for kill in 1..=kills {
        thread::park_timeout(Duration::from_millis(fastrand::u64(20..300)));
        let program = &mut programs[fastrand::usize(..2)];
        program.child.kill().unwrap();
        program.child.wait().unwrap();
        if kill % BROKER_EVERY == 0 {
            node.kill().unwrap();
            node.start_again().unwrap();
        }
        *program = Program::start(program.role, directory.path(), orders);
    }
    // A shop that has ended was there to the end.
    let Program { child, .. } = &mut programs[0];
    let deadline = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "the shop does not come to its end");
        thread::park_timeout(Duration::from_millis(50));
    }
    let mut ledger = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut ledger).unwrap();
    eprintln!(
        "{kills} kills of programs, {} of the broker, in {:.1?}: {ledger}",
        kills / BROKER_EVERY,
        begun.elapsed()
    );
    assert_eq!(ledger, format!("{orders} orders, {orders} handled, 0 missing, 0 handled twice\n"));
}
