//! An outbox in SQLite: one file, in WAL mode, synced before a commit returns.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use rusqlite::types::ToSql;
use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, TransactionBehavior, params};

use super::store::{Entry, EntryState, Forwarding, Limits, Listed, Status, Store, Stored, TAKEN_BYTES};
use super::{OutboxTransaction, age, ago, lock, now, properties, schema};
use crate::error::StoreError;

/// How long a lock of another connection is waited for.
const BUSY: Duration = Duration::from_secs(5);

/// Beside the database is a file with this ending, which is locked by the process that forwards.
const LOCK_SUFFIX: &str = "-forwarder";

const INSERT: &str = "INSERT INTO coney_outbox
    (message_id, ordering_key, exchange, routing_key, properties, body, stored_at)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";

const COLUMNS: &str = "id, ordering_key, exchange, routing_key, message_id, properties, body, content_type";

/// Opens a database as an outbox or an inbox needs it.
pub(crate) fn open(path: &Path) -> Result<Connection, StoreError> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    // The answer is a row. A database in memory stays as it is.
    connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
    connection.execute_batch("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")?;
    Ok(connection)
}

/// Brings the tables of `name` up to the last of these versions.
pub(crate) fn migrate(connection: &mut Connection, name: &str, versions: &[&str]) -> Result<(), StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(schema::VERSIONS)?;
    let query = "SELECT version FROM coney_versions WHERE name = ?1";
    let found: i64 = transaction.query_row(query, [name], |row| row.get(0)).optional()?.unwrap_or(0);
    let missing = schema::missing(found, versions)?;
    for migration in missing {
        transaction.execute_batch(migration)?;
    }
    if !missing.is_empty() {
        let update = "INSERT INTO coney_versions (name, version) VALUES (?1, ?2)
            ON CONFLICT (name) DO UPDATE SET version = excluded.version";
        transaction.execute(update, params![name, schema::latest(versions)])?;
    }
    Ok(transaction.commit()?)
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> StoreError {
        let text = error.to_string();
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Locked(text),
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => StoreError::Corrupt(text),
            Some(ErrorCode::DiskFull) => StoreError::DiskFull(text),
            Some(ErrorCode::CannotOpen | ErrorCode::SystemIoFailure) => StoreError::Disconnected(text),
            _ => StoreError::Other(text),
        }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Sqlite {
    path: PathBuf,
    connection: Mutex<Connection>,
}

impl Sqlite {
    pub(super) fn open(path: &Path) -> Result<Sqlite, StoreError> {
        let mut connection = open(path)?;
        migrate(&mut connection, schema::OUTBOX, schema::SQLITE_OUTBOX)?;
        Ok(Sqlite { path: path.to_owned(), connection: Mutex::new(connection) })
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // A transaction that a panic has left is rolled back with its guard.
        lock(&self.connection)
    }

    /// Changes refused messages.
    fn change(&self, statement: &str, ids: Option<&[i64]>) -> Result<u64, StoreError> {
        let mut connection = self.connection();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let changed = match ids {
            None => transaction.execute(statement, [])?,
            Some(ids) => {
                let mut one = transaction.prepare(&format!("{statement} AND id = ?1"))?;
                ids.iter().try_fold(0, |changed, id| one.execute([id]).map(|one| changed + one))?
            }
        };
        transaction.commit()?;
        Ok(changed as u64)
    }
}

fn status(connection: &Connection) -> Result<Status, StoreError> {
    let totals = "SELECT pending, bytes, refused FROM coney_outbox_totals";
    let (pending, bytes, refused) = connection
        .prepare_cached(totals)?
        .query_row([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?)))?;
    let oldest = "SELECT stored_at FROM coney_outbox WHERE state = 0 ORDER BY id LIMIT 1";
    let oldest: Option<i64> = connection.prepare_cached(oldest)?.query_row([], |row| row.get(0)).optional()?;
    let count = |number: i64| u64::try_from(number).unwrap_or_default();
    Ok(Status { pending: count(pending), bytes: count(bytes), refused: count(refused), oldest: oldest.map(age) })
}

/// Stores messages, within the transaction that the connection is in.
fn insert(connection: &Connection, entries: &[Entry], limits: &Limits) -> Result<(), StoreError> {
    let bytes = entries.iter().map(Entry::bytes).sum();
    limits.check(&status(connection)?, entries.len() as u64, bytes)?;
    let (mut statement, now) = (connection.prepare_cached(INSERT)?, now());
    for Entry { exchange, routing_key, ordering_key, message } in entries {
        let id = message.message_id().unwrap_or_default();
        let properties = properties::write(message);
        statement.execute(params![id, ordering_key, exchange, routing_key, properties, message.body(), now])?;
    }
    Ok(())
}

fn stored(row: &Row<'_>) -> rusqlite::Result<Result<Stored, StoreError>> {
    let properties: Option<Vec<u8>> = row.get(5)?;
    let content_type: Option<String> = row.get(7)?;
    let (id, message_id, body): (i64, String, Vec<u8>) = (row.get(0)?, row.get(4)?, row.get(6)?);
    let (ordering_key, exchange, routing_key) = (row.get(1)?, row.get(2)?, row.get(3)?);
    let message = properties::read(properties.as_deref(), content_type, &message_id, body);
    Ok(message.map(|message| Stored::new(id, Entry { exchange, routing_key, ordering_key, message })))
}

impl Store for Sqlite {
    fn append(&self, entries: &[Entry], limits: &Limits) -> Result<(), StoreError> {
        let mut connection = self.connection();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        insert(&transaction, entries, limits)?;
        Ok(transaction.commit()?)
    }

    fn forwarding(&self) -> Result<Option<Box<dyn Forwarding>>, StoreError> {
        let mut name = self.path.clone().into_os_string();
        name.push(LOCK_SUFFIX);
        let cannot = |error: std::io::Error| StoreError::Other(format!("{}: {error}", name.display()));
        let lock = File::options().create(true).truncate(false).write(true).open(&name).map_err(cannot)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(cannot(error)),
        }
        Ok(Some(Box::new(SqliteForwarding { connection: open(&self.path)?, _lock: lock })))
    }

    fn status(&self) -> Result<Status, StoreError> {
        status(&self.connection())
    }

    fn list(&self, state: EntryState, most: usize) -> Result<Vec<Listed>, StoreError> {
        let connection = self.connection();
        let query =
            format!("SELECT {COLUMNS}, reason, stored_at FROM coney_outbox WHERE state = ?1 ORDER BY id LIMIT ?2");
        let mut statement = connection.prepare(&query)?;
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let rows = statement.query_map(params![state.code(), most], |row| {
            let at: i64 = row.get(9)?;
            let stored_at = UNIX_EPOCH + Duration::from_millis(u64::try_from(at).unwrap_or_default());
            let reason = row.get(8)?;
            Ok(stored(row)?.map(|stored| Listed { stored, state, reason, stored_at }))
        })?;
        rows.map(|row| row?).collect()
    }

    fn retry(&self, ids: Option<&[i64]>) -> Result<u64, StoreError> {
        self.change("UPDATE coney_outbox SET state = 0, reason = NULL, settled_at = NULL WHERE state = 1", ids)
    }

    fn discard(&self, ids: Option<&[i64]>) -> Result<u64, StoreError> {
        self.change("DELETE FROM coney_outbox WHERE state = 1", ids)
    }
}

/// What forwards has a connection of its own, so that storing need not wait for it.
struct SqliteForwarding {
    connection: Connection,
    /// Locked for as long as it is there, also against other threads of this process.
    _lock: File,
}

impl Forwarding for SqliteForwarding {
    fn take(&mut self, most: usize, except: &[String]) -> Result<Vec<Stored>, StoreError> {
        let not_these = match except {
            [] => String::new(),
            keys => format!("AND ordering_key NOT IN ({})", vec!["?"; keys.len()].join(", ")),
        };
        let query = format!("SELECT {COLUMNS} FROM coney_outbox WHERE state = 0 {not_these} ORDER BY id LIMIT {most}");
        let mut statement = self.connection.prepare_cached(&query)?;
        let keys = except.iter().map(|key| key as &dyn ToSql).collect::<Vec<_>>();
        let mut rows = statement.query(keys.as_slice())?;
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(row) = rows.next()? {
            let stored = stored(row)??;
            bytes += stored.entry.bytes();
            taken.push(stored);
            if bytes >= TAKEN_BYTES {
                break;
            }
        }
        Ok(taken)
    }

    fn settle(&mut self, sent: &[i64], refused: &[(i64, String)], keep: Option<Duration>) -> Result<(), StoreError> {
        let now = now();
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut note =
                transaction.prepare_cached("UPDATE coney_outbox SET state = 2, settled_at = ?2 WHERE id = ?1")?;
            let mut delete = transaction.prepare_cached("DELETE FROM coney_outbox WHERE id = ?1")?;
            for id in sent {
                match keep {
                    None => delete.execute([id])?,
                    Some(_) => note.execute(params![id, now])?,
                };
            }
            let mut refuse = transaction
                .prepare_cached("UPDATE coney_outbox SET state = 1, reason = ?2, settled_at = ?3 WHERE id = ?1")?;
            for (id, reason) in refused {
                refuse.execute(params![id, reason, now])?;
            }
            let before = keep.map_or(i64::MAX, ago);
            let mut forget =
                transaction.prepare_cached("DELETE FROM coney_outbox WHERE state = 2 AND settled_at < ?1")?;
            forget.execute([before])?;
        }
        Ok(transaction.commit()?)
    }
}

impl super::sealed::Sealed for &rusqlite::Connection {}
impl OutboxTransaction for &rusqlite::Connection {
    fn store(&mut self, entry: &Entry, limits: &Limits) -> Result<(), StoreError> {
        insert(self, std::slice::from_ref(entry), limits)
    }
}

impl super::sealed::Sealed for &rusqlite::Transaction<'_> {}
impl OutboxTransaction for &rusqlite::Transaction<'_> {
    fn store(&mut self, entry: &Entry, limits: &Limits) -> Result<(), StoreError> {
        let mut connection: &Connection = self;
        connection.store(entry, limits)
    }
}
