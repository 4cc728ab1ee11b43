//! An outbox in PostgreSQL: several processes share the work, each with the ordering keys whose oldest message it has locked.

use std::sync::Mutex;
use std::time::{Duration, Instant, UNIX_EPOCH};

use postgres::{Client, Config, NoTls, Row, Transaction};

use super::store::{Entry, EntryState, Forwarding, Limits, Listed, Status, Store, Stored, TAKEN_BYTES};
use super::{OutboxTransaction, age, ago, lock, now, properties, schema};
use crate::error::StoreError;

/// How long connecting, a lock and a statement may take; and how long a process may be silent that has taken messages.
const CONNECT: Duration = Duration::from_secs(5);
const SILENT: Duration = Duration::from_secs(10);
const TIMEOUTS: &str =
    "SET lock_timeout = '5s'; SET statement_timeout = '30s'; SET idle_in_transaction_session_timeout = '60s'";

/// How old the numbers may be that limits are checked by.
const COUNTED_FOR: Duration = Duration::from_secs(1);

/// How many ordering keys are taken at a time.
const KEYS: i64 = 256;

const COLUMNS: &str = "id, ordering_key, exchange, routing_key, message_id, properties, body, content_type";

/// Where a database is, without the password.
pub(crate) fn name(config: &Config) -> String {
    let hosts: Vec<String> = config
        .get_hosts()
        .iter()
        .zip(config.get_ports().iter().copied().chain(std::iter::repeat(5432)))
        .map(|(host, port)| match host {
            postgres::config::Host::Tcp(host) => format!("{host}:{port}"),
            #[cfg(unix)]
            postgres::config::Host::Unix(path) => path.display().to_string(),
        })
        .collect();
    format!("{}/{}", hosts.join(","), config.get_dbname().or(config.get_user()).unwrap_or_default())
}

/// Reads a URL, or a text of keys and values.
pub(crate) fn config(url: &str) -> Result<Config, StoreError> {
    // The text of the error may quote what is wrong, which may be the password.
    let mut config: Config = url.parse().map_err(|_| {
        StoreError::Other(
            "expected the URL of a PostgreSQL database, such as postgresql://user@localhost/shop".to_owned(),
        )
    })?;
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(SILENT);
    }
    Ok(config)
}

pub(crate) fn connect(config: &Config) -> Result<Client, StoreError> {
    let mut client = config.connect(NoTls)?;
    client.batch_execute(TIMEOUTS)?;
    Ok(client)
}

/// Brings the tables of `name` up to the last of these versions.
pub(crate) fn migrate(client: &mut Client, name: &str, versions: &[&str]) -> Result<(), StoreError> {
    let mut transaction = client.transaction()?;
    // Two programs that begin at the same time do this one after another; the number is of no other use.
    transaction.execute("SELECT pg_advisory_xact_lock(5016452738)", &[])?;
    transaction.batch_execute(schema::VERSIONS)?;
    let query = "SELECT version FROM coney_versions WHERE name = $1";
    let found: i64 = transaction.query_opt(query, &[&name])?.map_or(0, |row| row.get(0));
    let missing = schema::missing(found, versions)?;
    for migration in missing {
        transaction.batch_execute(migration)?;
    }
    if !missing.is_empty() {
        let update = "INSERT INTO coney_versions (name, version) VALUES ($1, $2)
            ON CONFLICT (name) DO UPDATE SET version = excluded.version";
        transaction.execute(update, &[&name, &schema::latest(versions)])?;
    }
    Ok(transaction.commit()?)
}

impl From<postgres::Error> for StoreError {
    fn from(error: postgres::Error) -> StoreError {
        let Some(from_server) = error.as_db_error() else {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            return StoreError::Disconnected(format!("{error}{cause}"));
        };
        let text = format!("{} ({})", from_server.message(), from_server.code().code());
        match from_server.code().code() {
            "53100" => StoreError::DiskFull(text),
            "55P03" | "57014" | "40001" | "40P01" => StoreError::Locked(text),
            "XX001" | "XX002" => StoreError::Corrupt(text),
            "53300" | "57P01" | "57P02" | "57P03" | "25P03" => StoreError::Disconnected(text),
            code if code.starts_with("08") => StoreError::Disconnected(text),
            _ => StoreError::Other(text),
        }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Postgres {
    config: Config,
    /// `None` after it was lost.
    client: Mutex<Option<Connected>>,
    /// What limits are checked by, and when it was counted; a leaf among locks.
    counted: Mutex<Option<(Instant, Status)>>,
}

/// A client, which has nothing to show.
struct Connected(Client);

impl std::fmt::Debug for Connected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl Postgres {
    pub(super) fn open(config: Config) -> Result<Postgres, StoreError> {
        let mut client = connect(&config)?;
        migrate(&mut client, schema::OUTBOX, schema::POSTGRES_OUTBOX)?;
        Ok(Postgres { config, client: Mutex::new(Some(Connected(client))), counted: Mutex::default() })
    }

    /// Does something in a transaction. A connection that was lost before it is opened again.
    fn transact<T>(&self, work: impl FnOnce(&mut Transaction<'_>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut held = lock(&self.client);
        loop {
            let is_new = held.is_none();
            let client = match &mut *held {
                Some(client) => client,
                empty => empty.insert(Connected(connect(&self.config)?)),
            };
            let error = match client.0.transaction() {
                Ok(mut transaction) => {
                    let done = work(&mut transaction)?;
                    transaction.commit()?;
                    return Ok(done);
                }
                Err(error) => error,
            };
            *held = None;
            if is_new {
                return Err(error.into());
            }
        }
    }

    /// How it stands, or has stood a moment ago.
    fn about(&self) -> Result<Status, StoreError> {
        if let Some((at, status)) = *lock(&self.counted)
            && at.elapsed() < COUNTED_FOR
        {
            return Ok(status);
        }
        self.status()
    }

    fn change(&self, statement: &str, ids: Option<&[i64]>) -> Result<u64, StoreError> {
        self.transact(|transaction| {
            Ok(match ids {
                None => transaction.execute(statement, &[])?,
                Some(ids) => transaction.execute(&format!("{statement} AND id = ANY($1)"), &[&ids])?,
            })
        })
    }
}

/// Stores messages, within a transaction, in their order.
fn insert(transaction: &mut Transaction<'_>, entries: &[Entry]) -> Result<(), StoreError> {
    let statement = "INSERT INTO coney_outbox
        (message_id, ordering_key, exchange, routing_key, properties, body, stored_at)
        SELECT message_id, ordering_key, exchange, routing_key, properties, body, $7
        FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::bytea[]) WITH ORDINALITY
            AS given (message_id, ordering_key, exchange, routing_key, properties, body, place)
        ORDER BY place";
    let text = |of: fn(&Entry) -> &str| entries.iter().map(of).collect::<Vec<&str>>();
    let properties: Vec<Vec<u8>> = entries.iter().map(|entry| properties::write(&entry.message)).collect();
    let bodies: Vec<&[u8]> = entries.iter().map(|entry| entry.message.body()).collect();
    transaction.execute(
        statement,
        &[
            &text(|entry| entry.message.message_id().unwrap_or_default()),
            &text(|entry| &entry.ordering_key),
            &text(|entry| &entry.exchange),
            &text(|entry| &entry.routing_key),
            &properties,
            &bodies,
            &now(),
        ],
    )?;
    Ok(())
}

fn stored(row: &Row) -> Result<Stored, StoreError> {
    let (properties, body): (Option<Vec<u8>>, Vec<u8>) = (row.try_get(5)?, row.try_get(6)?);
    let (message_id, content_type): (String, Option<String>) = (row.try_get(4)?, row.try_get(7)?);
    let message = properties::read(properties.as_deref(), content_type, &message_id, body)?;
    let (ordering_key, exchange, routing_key) = (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
    Ok(Stored::new(row.try_get(0)?, Entry { exchange, routing_key, ordering_key, message }))
}

impl Store for Postgres {
    fn append(&self, entries: &[Entry], limits: &Limits) -> Result<(), StoreError> {
        let (rows, bytes) = (entries.len() as u64, entries.iter().map(Entry::bytes).sum());
        limits.check(&self.about()?, rows, bytes)?;
        self.transact(|transaction| insert(transaction, entries))?;
        if let Some((_, status)) = &mut *lock(&self.counted) {
            status.pending += rows;
            status.bytes += bytes;
        }
        Ok(())
    }

    fn forwarding(&self) -> Result<Option<Box<dyn Forwarding>>, StoreError> {
        let client = connect(&self.config)?;
        Ok(Some(Box::new(PostgresForwarding { client, has_taken: false, after: String::new() })))
    }

    fn status(&self) -> Result<Status, StoreError> {
        let query = "SELECT count(*) FILTER (WHERE state = 0),
            coalesce(sum(length(body)) FILTER (WHERE state = 0), 0)::bigint,
            count(*) FILTER (WHERE state = 1), min(stored_at) FILTER (WHERE state = 0)
            FROM coney_outbox WHERE state < 2";
        let row = self.transact(|transaction| Ok(transaction.query_one(query, &[])?))?;
        let count = |column: usize| u64::try_from(row.get::<_, i64>(column)).unwrap_or_default();
        let oldest: Option<i64> = row.get(3);
        let status = Status { pending: count(0), bytes: count(1), refused: count(2), oldest: oldest.map(age) };
        *lock(&self.counted) = Some((Instant::now(), status));
        Ok(status)
    }

    fn list(&self, state: EntryState, most: usize) -> Result<Vec<Listed>, StoreError> {
        let query =
            format!("SELECT {COLUMNS}, reason, stored_at FROM coney_outbox WHERE state = $1 ORDER BY id LIMIT $2");
        let (code, most) = (i16::try_from(state.code()).unwrap_or_default(), i64::try_from(most).unwrap_or(i64::MAX));
        let rows = self.transact(|transaction| Ok(transaction.query(&query, &[&code, &most])?))?;
        let listed = |row: &Row| {
            let at: i64 = row.try_get(9)?;
            let stored_at = UNIX_EPOCH + Duration::from_millis(u64::try_from(at).unwrap_or_default());
            Ok(Listed { stored: stored(row)?, state, reason: row.try_get(8)?, stored_at })
        };
        rows.iter().map(listed).collect()
    }

    fn retry(&self, ids: Option<&[i64]>) -> Result<u64, StoreError> {
        self.change("UPDATE coney_outbox SET state = 0, reason = NULL, settled_at = NULL WHERE state = 1", ids)
    }

    fn discard(&self, ids: Option<&[i64]>) -> Result<u64, StoreError> {
        self.change("DELETE FROM coney_outbox WHERE state = 1", ids)
    }
}

/// What forwards has a connection of its own, and a transaction that is open from taking messages until they are settled: the locks of
/// that say whose they are, and go with the connection.
struct PostgresForwarding {
    client: Client,
    has_taken: bool,
    /// The last ordering key that was taken, so that the next ones have their turn.
    after: String,
}

impl PostgresForwarding {
    /// The ordering keys behind this one that have messages, and the oldest message of each.
    fn heads(&mut self, after: &str, except: &[String]) -> Result<Vec<i64>, StoreError> {
        // One step in the index for each key, however many messages it has.
        let query = "WITH RECURSIVE keys (key) AS (
                (SELECT ordering_key FROM coney_outbox WHERE state = 0 AND ordering_key >= $1 ORDER BY ordering_key LIMIT 1)
                UNION ALL
                SELECT (SELECT ordering_key FROM coney_outbox WHERE state = 0 AND ordering_key > key
                    ORDER BY ordering_key LIMIT 1)
                FROM keys WHERE key IS NOT NULL
            )
            SELECT (SELECT id FROM coney_outbox WHERE state = 0 AND ordering_key = key ORDER BY id LIMIT 1)
            FROM keys WHERE key IS NOT NULL AND NOT key = ANY($2) LIMIT $3";
        let rows = self.client.query(query, &[&after, &except, &KEYS])?;
        Ok(rows.iter().filter_map(|row| row.get(0)).collect())
    }

    /// Locks what no other process has. Returns the ordering keys.
    fn lock(&mut self, heads: &[i64]) -> Result<Vec<String>, StoreError> {
        let query = "SELECT ordering_key FROM coney_outbox WHERE id = ANY($1) AND state = 0 FOR UPDATE SKIP LOCKED";
        let mut keys: Vec<String> = self.client.query(query, &[&heads])?.iter().map(|row| row.get(0)).collect();
        keys.sort_unstable();
        Ok(keys)
    }
}

impl Forwarding for PostgresForwarding {
    fn take(&mut self, most: usize, except: &[String]) -> Result<Vec<Stored>, StoreError> {
        if std::mem::take(&mut self.has_taken) {
            self.client.batch_execute("ROLLBACK")?;
        }
        let after = std::mem::take(&mut self.after);
        let mut heads = self.heads(&format!("{after}\u{1}"), except)?;
        if heads.is_empty() {
            heads = self.heads("", except)?;
        }
        if heads.is_empty() {
            return Ok(Vec::new());
        }
        self.client.batch_execute("BEGIN")?;
        self.has_taken = true;
        let keys = self.lock(&heads)?;
        let query = format!(
            "SELECT {COLUMNS} FROM (
                SELECT *, sum(length(body)) OVER (ORDER BY id) - length(body) AS before FROM (
                    SELECT * FROM coney_outbox WHERE state = 0 AND ordering_key = ANY($1) ORDER BY id LIMIT $2
                ) AS oldest
            ) AS counted WHERE before < $3 ORDER BY id"
        );
        let (most, bytes) = (i64::try_from(most).unwrap_or(i64::MAX), i64::try_from(TAKEN_BYTES).unwrap_or(i64::MAX));
        let rows = self.client.query(&query, &[&keys, &most, &bytes])?;
        if rows.is_empty() {
            self.client.batch_execute("COMMIT")?;
            self.has_taken = false;
        }
        self.after = keys.last().cloned().unwrap_or_default();
        rows.iter().map(stored).collect()
    }

    fn settle(&mut self, sent: &[i64], refused: &[(i64, String)], keep: Option<Duration>) -> Result<(), StoreError> {
        if !std::mem::replace(&mut self.has_taken, true) {
            self.client.batch_execute("BEGIN")?;
        }
        let now = now();
        let before = match keep {
            None => {
                self.client.execute("DELETE FROM coney_outbox WHERE id = ANY($1)", &[&sent])?;
                i64::MAX
            }
            Some(keep) => {
                let note = "UPDATE coney_outbox SET state = 2, settled_at = $2 WHERE id = ANY($1)";
                self.client.execute(note, &[&sent, &now])?;
                ago(keep)
            }
        };
        for (id, reason) in refused {
            let note = "UPDATE coney_outbox SET state = 1, reason = $2, settled_at = $3 WHERE id = $1";
            self.client.execute(note, &[id, reason, &now])?;
        }
        self.client.execute("DELETE FROM coney_outbox WHERE state = 2 AND settled_at < $1", &[&before])?;
        self.client.batch_execute("COMMIT")?;
        self.has_taken = false;
        Ok(())
    }
}

impl super::sealed::Sealed for &mut Transaction<'_> {}
impl OutboxTransaction for &mut Transaction<'_> {
    fn store(&mut self, entry: &Entry, _: &Limits) -> Result<(), StoreError> {
        insert(self, std::slice::from_ref(entry))
    }
}
