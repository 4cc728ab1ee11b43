//! A word of warning, for examples that are of use only beside another program.

use coney::App;

/// Says on stderr that no other program meets this one, if its broker is `memory://`.
pub fn warn(app: &App) {
    let endpoints = &app.listen_pool().settings().broker.endpoints;
    if endpoints.iter().any(|endpoint| endpoint.memory_name().is_some()) {
        eprintln!(
            "memory:// is a broker of this process alone; for two programs: `cargo run --features cli -- broker`, then \
             CONEY_PROFILE=rabbitmq, or CONEY_BROKER__URL"
        );
    }
}
