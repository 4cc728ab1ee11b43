//! Builds the client of rabbitmq-c, if its headers are there; the program finds it by the variable PEERS_RABBITMQ_C.

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=c/peer.c");
    let compiler = cc::Build::new().opt_level(2).get_compiler();
    if !has_header(&mut compiler.to_command()) {
        println!("cargo:warning=librabbitmq-dev is not installed: there will be no numbers of rabbitmq-c");
        // A file that is not there has cargo look again each time: it may be installed by then.
        println!("cargo:rerun-if-changed=c/librabbitmq-dev-is-missing");
        return;
    }
    let out = env::var("OUT_DIR").expect("cargo sets it");
    let program = Path::new(&out).join("peer-rabbitmq-c");
    let mut command = compiler.to_command();
    command.args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations", "c/peer.c", "-o"]);
    let built = command.arg(&program).args(["-lrabbitmq", "-pthread"]).status();
    assert!(built.is_ok_and(|status| status.success()), "c/peer.c does not build");
    println!("cargo:rustc-env=PEERS_RABBITMQ_C={}", program.display());
}

fn has_header(compiler: &mut Command) -> bool {
    let probe = compiler.args(["-include", "amqp.h", "-fsyntax-only", "-x", "c", "/dev/null"]);
    probe.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
