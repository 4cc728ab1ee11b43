//! coney.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use coney::rpc::RpcClient;
use coney::{App, Encoding, Settings};

use super::{Work, on_threads};
use crate::cases::{IN_FLIGHT, Job, PATIENCE, POOL, PREFETCH, SHARERS};
use crate::measure::{Measure, Meter, Pace, Result};

pub fn run(work: &Work) -> Result<Measure> {
    let text = format!(
        "[broker]\nurl = {:?}\n[pools.publish]\nsize = {POOL}\n[pools.listen]\nsize = 1\nprefetch = {PREFETCH}",
        work.url
    );
    let app = App::from_settings(Settings::from_toml(&text)?)?;
    let measure = match work.job {
        Job::PublishAsync => publish_async(&app, work),
        Job::PublishBatch => publish_batch(&app, work),
        Job::PublishSync => publish_sync(&app, work),
        Job::PublishPool => publish_pool(&app, work),
        Job::Consume => consume(&app, work),
        Job::Get => get(&app, work),
        Job::RpcSequential => rpc(&app, work, 1),
        Job::RpcThreads => rpc(&app, work, IN_FLIGHT),
        Job::RpcAsync => rpc_async(&app, work),
        Job::Checkout => checkout(&app, work),
    }?;
    app.shutdown(PATIENCE)?;
    Ok(measure)
}

fn publish_async(app: &App, work: &Work) -> Result<Measure> {
    let (connection, body) = (app.publish_pool().connection()?, work.body());
    let failed = Arc::new(AtomicUsize::new(0));
    let meter = Meter::start();
    for _ in 0..work.count {
        let failed = Arc::clone(&failed);
        connection.publish_async("", &work.queue, body.as_slice(), move |outcome| {
            failed.fetch_add(usize::from(outcome.is_err()), Ordering::Relaxed);
        });
    }
    connection.flush(PATIENCE)?;
    let measure = meter.stop(work.count, Vec::new())?;
    match failed.load(Ordering::Relaxed) {
        0 => Ok(measure),
        failed => Err(format!("{failed} were not confirmed").into()),
    }
}

fn publish_batch(app: &App, work: &Work) -> Result<Measure> {
    let (connection, body) = (app.publish_pool().connection()?, work.body());
    let meter = Meter::start();
    connection.publish_batch((0..work.count).map(|_| ("", &work.queue, body.as_slice())))?;
    meter.stop(work.count, Vec::new())
}

fn publish_sync(app: &App, work: &Work) -> Result<Measure> {
    let (connection, body) = (app.publish_pool().connection()?, work.body());
    let meter = Meter::start();
    let mut pace = Pace::new(work.count, work.limit());
    while let Some(begin) = pace.next() {
        connection.publish("", &work.queue, body.as_slice())?;
        pace.took(begin);
    }
    meter.stop(pace.latencies.len(), pace.latencies)
}

fn publish_pool(app: &App, work: &Work) -> Result<Measure> {
    // All connections are open when it begins; their channels come with the first publish.
    let pool = app.publish_pool();
    let connections = (0..POOL).map(|_| pool.connection()).collect::<coney::Result<Vec<_>>>()?;
    drop(connections);
    let body = work.body();
    let meter = Meter::start();
    let latencies = on_threads(SHARERS, || {
        let mut pace = Pace::new(work.count / SHARERS, work.limit());
        while let Some(begin) = pace.next() {
            pool.publish("", &work.queue, body.as_slice())?;
            pace.took(begin);
        }
        Ok(pace.latencies)
    })?;
    meter.stop(latencies.len(), latencies)
}

fn consume(app: &App, work: &Work) -> Result<Measure> {
    drop(app.listen_pool().connection()?);
    let (done, all) = mpsc::channel();
    let (left, size) = (AtomicUsize::new(work.count), work.size);
    let meter = Meter::start();
    let listener = app.spawn_listener(&work.queue, move |_, delivery| {
        if delivery.body().len() != size {
            return Err("not what was published".to_owned());
        }
        match left.fetch_sub(1, Ordering::Relaxed) {
            1 => done.send(()).map_err(|gone| gone.to_string()),
            _ => Ok(()),
        }
    })?;
    all.recv_timeout(PATIENCE)?;
    listener.stop()?;
    meter.stop(work.count, Vec::new())
}

fn get(app: &App, work: &Work) -> Result<Measure> {
    let connection = app.listen_pool().connection()?;
    let meter = Meter::start();
    let mut pace = Pace::new(work.count, work.limit());
    while let Some(begin) = pace.next() {
        connection.get_and_ack(&work.queue)?.ok_or("the queue is empty")?;
        pace.took(begin);
    }
    meter.stop(pace.latencies.len(), pace.latencies)
}

fn client(app: &App, work: &Work) -> Result<(RpcClient, String)> {
    let (client, text) = (RpcClient::new(app)?.with_encoding(Encoding::Json), work.text());
    // The first call opens its channel, which the others have when they begin.
    client.call::<_, String>(&work.queue, &text)?;
    Ok((client, text))
}

fn rpc(app: &App, work: &Work, threads: usize) -> Result<Measure> {
    let (client, text) = client(app, work)?;
    let meter = Meter::start();
    let latencies = on_threads(threads, || {
        let mut pace = Pace::new(work.count / threads, work.limit());
        while let Some(begin) = pace.next() {
            if client.call::<_, String>(&work.queue, &text)? != text {
                return Err("an answer that is none".into());
            }
            pace.took(begin);
        }
        Ok(pace.latencies)
    })?;
    let measure = meter.stop(latencies.len(), latencies)?;
    client.close();
    Ok(measure)
}

fn rpc_async(app: &App, work: &Work) -> Result<Measure> {
    let (client, text) = client(app, work)?;
    let (answered, answers) = mpsc::channel();
    let meter = Meter::start();
    let mut pace = Pace::new(work.count, work.limit());
    let (mut sent, mut open) = (0, 0);
    let answer = |open: &mut usize| -> Result<()> {
        let answer: coney::Result<String> = answers.recv_timeout(PATIENCE)?;
        *open -= 1;
        if answer? == text { Ok(()) } else { Err("an answer that is none".into()) }
    };
    while pace.next().is_some() {
        if open == IN_FLIGHT {
            answer(&mut open)?;
        }
        let answered = answered.clone();
        client.call_async(&work.queue, &text, move |answer| drop(answered.send(answer)));
        (sent, open) = (sent + 1, open + 1);
    }
    while open > 0 {
        answer(&mut open)?;
    }
    let measure = meter.stop(sent, Vec::new())?;
    client.close();
    Ok(measure)
}

fn checkout(app: &App, work: &Work) -> Result<Measure> {
    let pool = app.publish_pool();
    drop(pool.connection()?);
    let meter = Meter::start();
    for _ in 0..work.count {
        drop(pool.connection()?);
    }
    meter.stop(work.count, Vec::new())
}
