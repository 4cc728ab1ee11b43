//! Serves what coney counts to Prometheus, and how it fares to Kubernetes.
//!
//! ```text
//! cargo run -p coney-metrics [ADDRESS]        # 127.0.0.1:9464 unless said otherwise
//! curl http://127.0.0.1:9464/metrics          # what is counted and measured
//! curl http://127.0.0.1:9464/ready            # 200 or 503, and one line that says why
//! curl http://127.0.0.1:9464/live             # 200 for as long as the program answers
//! ```
//!
//! Publishes ten messages a second to the queue `metrics-example` and listens for them, on the broker of app.toml, which is
//! the embedded one unless CONEY_PROFILE or CONEY_BROKER__URL say otherwise. Prints its address; Ctrl-C ends it.
//!
//! The server is as small as can be, for the sake of the example: one request at a time, and of its headers none is read.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use coney::{App, Outcome, Queue};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

const QUEUE: &str = "metrics-example";
/// How long a client may take with its request, so that a silent one does not keep the others waiting.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("warn"));
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("metrics: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    // Before the app: what is made before the recorder is installed reports to nobody.
    let metrics = PrometheusBuilder::new().install_recorder()?;
    coney::metrics::describe();

    let app = App::from_file("app.toml")?;
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:9464".to_owned());
    let server = TcpListener::bind(address)?;
    println!("http://{}/metrics", server.local_addr()?);
    let probed = app.clone();
    thread::spawn(move || serve(&server, &metrics, &probed));

    app.publish_pool().connection()?.queue_declare(&Queue::new(QUEUE))?;
    app.spawn_listener(QUEUE, |_, delivery| if delivery.redelivered() { Outcome::Reject } else { Outcome::Ack })?
        .detach();
    let publisher = app.publish_pool().clone();
    thread::spawn(move || {
        // Ends with the program, or once the pool is closed.
        while publisher.publish("", QUEUE, "tick").is_ok() || !publisher.is_closed() {
            thread::sleep(Duration::from_millis(100));
        }
    });
    app.run()?;
    Ok(())
}

fn serve(server: &TcpListener, metrics: &PrometheusHandle, app: &App) {
    for client in server.incoming().flatten() {
        // A client that goes away in the middle is no concern of ours.
        let _ = answer(client, metrics, app);
    }
}

fn answer(mut client: TcpStream, metrics: &PrometheusHandle, app: &App) -> std::io::Result<()> {
    client.set_read_timeout(Some(REQUEST_TIMEOUT))?;
    let mut request = BufReader::new(client.try_clone()?).lines();
    let first = request.next().transpose()?.unwrap_or_default();
    // To the empty line at the end of the headers.
    while request.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let (status, body) = match first.split(' ').nth(1) {
        Some("/metrics") => {
            metrics.run_upkeep();
            ("200 OK", metrics.render())
        }
        Some("/ready") => {
            let health = app.check(Duration::from_secs(1));
            (if health.is_ready() { "200 OK" } else { "503 Service Unavailable" }, format!("{health}\n"))
        }
        Some("/live") => ("200 OK", "alive\n".to_owned()),
        _ => ("404 Not Found", "/metrics, /ready or /live\n".to_owned()),
    };
    let len = body.len();
    write!(client, "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len}\r\n")?;
    write!(client, "Connection: close\r\n\r\n{body}")
}
