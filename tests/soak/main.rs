//! The soak: faults at random under a steady load, and a ledger that has to balance at the end.
//!
//! ```text
//! scripts/soak MINUTES [SEED] [--tls]
//! ```
//!
//! A private RabbitMQ node behind the fault proxy; two threads that publish through a pool, one that borrows guards and
//! publishes asynchronously, a listener of each kind (plain, of batches, growing, paced, failing now and then, resting now and
//! then), two threads that call an RPC worker. The same seed brings the same faults in the same order; what they hit is a matter
//! of timing. Fails with a sentence for each rule that was violated.
//!
//! A program and not a test of the suite: only who asks for it by name waits for it.

#[path = "../it/authority.rs"]
mod authority;
mod faults;
#[path = "../held/mod.rs"]
mod held;
mod ledger;
mod load;
#[path = "../it/proxy/mod.rs"]
mod proxy;
mod report;

use std::error::Error;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

use self::faults::{Deck, Scene};
use self::ledger::Ledger;
use self::load::{CONSUMERS, Load, MESSAGES_PER_SECOND, QUEUE};
use self::report::{Held, MIB, Report, mib, progress};

/// How long after a fault all has to work again. A node that has just been killed is slow, and so may the machine be.
const RECOVERY: Duration = Duration::from_secs(60);
/// How long what remains at the end may take to be dealt with, and what has ended to be gone.
const QUIET: Duration = Duration::from_secs(30);
/// Between lines of progress.
const PROGRESS: Duration = Duration::from_secs(10);
/// A shorter run would show too little.
const FAULTS_PER_MINUTE: f64 = 5.0;
/// After so many faults every part has been torn down and set up, and memory should grow no more.
const WARM_UP: usize = 10;
/// How much larger the process may be at the end than it was warm, and at any time in between. It does not depend on the
/// length of the run: what grows with messages or faults passes it sooner or later, in two minutes at some 300 bytes for
/// each message, or 50 KiB for each connection. The one is for what the allocator keeps, the other also for what is in
/// flight while nothing passes. Both hold for an allocator with one arena, which scripts/soak asks for.
const GROWTH: u64 = 8 * MIB;
const PEAK_GROWTH: u64 = 24 * MIB;

fn main() -> ExitCode {
    env_logger::init();
    let (options, arguments): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
    let tls = options == ["--tls"];
    let mut arguments = arguments.into_iter();
    let minutes = arguments.next().and_then(|minutes| minutes.parse::<f64>().ok()).filter(|minutes| *minutes > 0.0);
    let seed = arguments.next().map_or_else(|| Some(fastrand::u64(..1_000_000)), |seed| seed.parse().ok());
    let (Some(minutes), Some(seed), None, true) = (minutes, seed, arguments.next(), tls || options.is_empty()) else {
        eprintln!("usage: scripts/soak MINUTES [SEED] [--tls]");
        return ExitCode::from(2);
    };
    match soak(minutes, seed, tls) {
        Ok(violations) if violations.is_empty() => {
            println!("the ledger balances");
            ExitCode::SUCCESS
        }
        Ok(violations) => {
            violations.iter().for_each(|violation| println!("VIOLATED: {violation}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("soak: seed {seed}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn soak(minutes: f64, seed: u64, tls: bool) -> Result<Vec<String>, Box<dyn Error>> {
    let length = Duration::from_secs_f64(minutes * 60.0);
    eprintln!("soak: {:.0} s, seed {seed}{}", length.as_secs_f64(), if tls { ", with TLS" } else { "" });
    let scene = Scene::set(tls)?;
    let ledger = Arc::new(Ledger::new(length.as_secs() as usize * MESSAGES_PER_SECOND));
    held::settled();
    let mut report = Report::new(seed, held_now());
    let load = Load::start(&scene.broker(), seed, &ledger)?;

    let doing = Mutex::new("beginning".to_owned());
    let start = Instant::now();
    thread::scope(|scope| {
        let (stop, stopped) = bounded(0);
        let (doing, ledger) = (&doing, &ledger);
        scope.spawn(move || tell(start, length, doing, ledger, &stopped));
        let result = suffer(&scene, length, ledger, doing, &mut report);
        drop::<crossbeam_channel::Sender<()>>(stop);
        result
    })?;
    report.ran = start.elapsed();
    eprintln!("soak: the faults are over");

    scene.heal()?;
    end(&scene, load, &ledger, &mut report);
    ledger.balance();
    report.sums = ledger.sums();
    report.errors = ledger.errors();
    report.longest = ledger.longest();
    println!("{report}");
    Ok(ledger.violations())
}

/// Ends the load in order, and looks for what it has left behind.
fn end(scene: &Scene, mut load: Load, ledger: &Ledger, report: &mut Report) {
    load.cease();
    within(QUIET, || ledger.is_caught_up() && scene.queue_depth(QUEUE) == Some(0));
    let left = scene.queue_depth(QUEUE);
    if left != Some(0) {
        ledger.violated("the queue was not emptied", || format!("{left:?} messages are left in it"));
    }
    // A pool notices idle connections that have died when they are to be lent. A listener may be waiting still to come back.
    let agrees = |(connections, _, consumers)| connections <= load.connections().1 && consumers == CONSUMERS;
    let do_agree = within(QUIET, || scene.held_by_broker().is_some_and(agrees));
    let (opened, ours) = load.connections();
    if !do_agree {
        let (broker, names, pools) = (scene.held_by_broker(), scene.connection_names(), load.pools());
        ledger.violated("broker and pools do not agree", || {
            format!(
                "connections, channels, consumers: {broker:?} ({names:?}); the pools have {ours} connections, {CONSUMERS} \
                 consumers ({pools})"
            )
        });
    }
    (report.opened, report.recoveries) = (opened, load.recoveries());
    load.end();
    // The other half of silent connections lives until the proxy lets go.
    scene.proxy.cut(proxy::Cut::Reset);
    let before = (report.before.threads, report.before.descriptors);
    if !within(QUIET, || scene.held_by_broker() == Some((0, 0, 0)) && held::held() == before) {
        let (broker, held) = (scene.held_by_broker(), held::held());
        ledger.violated("something was left behind", || {
            format!(
                "threads, descriptors: {held:?}, not {before:?}; connections, channels, consumers: {broker:?}, not none"
            )
        });
    }
    report.after = held_now();
    report.peak = held::peak();
    let warm = report.warm.memory;
    if report.after.memory > warm + GROWTH || report.peak > warm + PEAK_GROWTH {
        let (warm, peak, after) = (mib(warm), mib(report.peak), mib(report.after.memory));
        ledger.violated("memory grew", || format!("from {warm:.1} MiB to {after:.1}, at most {peak:.1}"));
    }
}

/// One fault after another, each once all has recovered from the one before.
fn suffer(
    scene: &Scene,
    length: Duration,
    ledger: &Ledger,
    doing: &Mutex<String>,
    report: &mut Report,
) -> Result<(), Box<dyn Error>> {
    let say = |what: String| *doing.lock().unwrap_or_else(PoisonError::into_inner) = what;
    let mut deck = Deck::new(report.seed);
    let start = Instant::now();
    let at_least = WARM_UP + 1;
    let at_least = at_least.max((length.as_secs_f64() / 60.0 * FAULTS_PER_MINUTE).ceil() as usize);
    ledger.lifted();
    if ledger.recovered(RECOVERY).is_none() {
        return Err("the load did not get going".into());
    }
    while start.elapsed() < length || report.count() < at_least {
        // Some work in between, so that there is something to hit.
        thread::sleep(deck.millis(300..2_000));
        let fault = deck.draw();
        say(format!("fault {}: {fault}", report.count() + 1));
        let begun = Instant::now();
        scene.suffer(fault, &mut deck).map_err(|error| format!("{fault}: {error}"))?;
        let lasted = begun.elapsed();
        ledger.lifted();
        let Some(recovery) = ledger.recovered(RECOVERY) else {
            ledger.violated("it did not recover", || {
                format!("within {RECOVERY:?} after fault {}, {fault}", report.count() + 1)
            });
            return Ok(());
        };
        report.add(fault, lasted, recovery);
        if report.count() == WARM_UP {
            report.warm = held_now();
            held::forget_peak();
        }
    }
    Ok(())
}

/// Tells how it goes until `stopped` ends.
fn tell(start: Instant, length: Duration, doing: &Mutex<String>, ledger: &Ledger, stopped: &Receiver<()>) {
    while stopped.recv_timeout(PROGRESS) == Err(RecvTimeoutError::Timeout) {
        let doing = doing.lock().unwrap_or_else(PoisonError::into_inner).clone();
        eprintln!("{}", progress(start.elapsed(), length, &doing, ledger, held_now()));
    }
}

fn held_now() -> Held {
    let (threads, descriptors) = held::held();
    Held { threads, descriptors, memory: held::memory() }
}

/// Waits until `condition` holds; whether it does.
fn within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !condition() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::park_timeout(Duration::from_millis(50));
    }
    true
}
