//! The clients that are not written in Rust: rabbitmq-c, built by build.rs, and pika.

use std::process::{Command, Stdio};
use std::sync::LazyLock;

use super::exists;

/// The program of c/peer.c, if rabbitmq-c was installed when this was built.
pub fn rabbitmq_c() -> Option<&'static str> {
    option_env!("PEERS_RABBITMQ_C").filter(|program| exists(program))
}

/// `PEERS_PYTHON` is the interpreter that has pika; without it, `python3`.
fn python() -> Command {
    Command::new(std::env::var_os("PEERS_PYTHON").unwrap_or_else(|| "python3".into()))
}

pub fn has_pika() -> bool {
    static HAS: LazyLock<bool> = LazyLock::new(|| {
        let probe = python().args(["-c", "import pika"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        probe.is_ok_and(|status| status.success())
    });
    *HAS
}

pub fn pika() -> Command {
    let mut command = python();
    command.args(["-B", concat!(env!("CARGO_MANIFEST_DIR"), "/python/peer.py")]);
    command
}
