//! The tables of an outbox and of an inbox. They are part of the interface: programs may read and write them.
//!
//! Each list has a migration for each version, from an empty database on. One that has been released is never changed.

use crate::error::StoreError;

/// What the tables are called in `coney_versions`.
pub(crate) const OUTBOX: &str = "outbox";
pub(crate) const INBOX: &str = "inbox";

/// Which version each of them has.
pub(crate) const VERSIONS: &str =
    "CREATE TABLE IF NOT EXISTS coney_versions (name TEXT PRIMARY KEY, version BIGINT NOT NULL);";

/// The migrations that tables of version `found` lack. Tables that are newer than all of them are an error.
pub(crate) fn missing<'v>(found: i64, versions: &'v [&'v str]) -> Result<&'v [&'v str], StoreError> {
    let lacking = versions.get(usize::try_from(found).unwrap_or_default()..);
    lacking.ok_or(StoreError::Version { found, known: latest(versions) })
}

/// The version that the last of these migrations makes.
pub(crate) fn latest(versions: &[&str]) -> i64 {
    i64::try_from(versions.len()).unwrap_or(i64::MAX)
}

/// `state` is 0 while a message waits, 1 when it was refused (`reason`), 2 when it was sent and is kept. Times are in milliseconds
/// since 1970. `properties` is the property list of AMQP's content header, from the flags on (AMQP 0-9-1, section 4.2.6.1); where
/// it is NULL the message is persistent and has `content_type` and `message_id` alone.
#[cfg(feature = "outbox-sqlite")]
pub(crate) const SQLITE_OUTBOX: &[&str] = &["
CREATE TABLE coney_outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id TEXT NOT NULL,
    ordering_key TEXT NOT NULL DEFAULT '',
    exchange TEXT NOT NULL,
    routing_key TEXT NOT NULL,
    content_type TEXT,
    properties BLOB,
    body BLOB NOT NULL,
    stored_at INTEGER NOT NULL,
    state INTEGER NOT NULL DEFAULT 0,
    reason TEXT,
    settled_at INTEGER
);
CREATE INDEX coney_outbox_pending ON coney_outbox (id) WHERE state = 0;
CREATE INDEX coney_outbox_settled ON coney_outbox (state, settled_at) WHERE state <> 0;
CREATE TABLE coney_outbox_totals (pending INTEGER NOT NULL, bytes INTEGER NOT NULL, refused INTEGER NOT NULL);
INSERT INTO coney_outbox_totals VALUES (0, 0, 0);
CREATE TRIGGER coney_outbox_inserted AFTER INSERT ON coney_outbox BEGIN
    UPDATE coney_outbox_totals SET
        pending = pending + (NEW.state = 0),
        bytes = bytes + (NEW.state = 0) * length(NEW.body),
        refused = refused + (NEW.state = 1);
END;
CREATE TRIGGER coney_outbox_deleted AFTER DELETE ON coney_outbox BEGIN
    UPDATE coney_outbox_totals SET
        pending = pending - (OLD.state = 0),
        bytes = bytes - (OLD.state = 0) * length(OLD.body),
        refused = refused - (OLD.state = 1);
END;
CREATE TRIGGER coney_outbox_changed AFTER UPDATE OF state ON coney_outbox BEGIN
    UPDATE coney_outbox_totals SET
        pending = pending + (NEW.state = 0) - (OLD.state = 0),
        bytes = bytes + (NEW.state = 0) * length(NEW.body) - (OLD.state = 0) * length(OLD.body),
        refused = refused + (NEW.state = 1) - (OLD.state = 1);
END;
"];

/// One row for each message that a consumer has handled.
#[cfg(feature = "outbox-sqlite")]
pub(crate) const SQLITE_INBOX: &[&str] = &["
CREATE TABLE coney_inbox (
    consumer TEXT NOT NULL,
    message_id TEXT NOT NULL,
    handled_at INTEGER NOT NULL,
    PRIMARY KEY (consumer, message_id)
) WITHOUT ROWID;
CREATE INDEX coney_inbox_handled ON coney_inbox (handled_at);
"];

/// The same, in PostgreSQL.
#[cfg(feature = "outbox-postgres")]
pub(crate) const POSTGRES_OUTBOX: &[&str] = &["
CREATE TABLE coney_outbox (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message_id TEXT NOT NULL,
    ordering_key TEXT COLLATE \"C\" NOT NULL DEFAULT '',
    exchange TEXT NOT NULL,
    routing_key TEXT NOT NULL,
    content_type TEXT,
    properties BYTEA,
    body BYTEA NOT NULL,
    stored_at BIGINT NOT NULL,
    state SMALLINT NOT NULL DEFAULT 0,
    reason TEXT,
    settled_at BIGINT
);
CREATE INDEX coney_outbox_pending ON coney_outbox (ordering_key, id) WHERE state = 0;
CREATE INDEX coney_outbox_settled ON coney_outbox (state, settled_at) WHERE state <> 0;
"];

#[cfg(feature = "outbox-postgres")]
pub(crate) const POSTGRES_INBOX: &[&str] = &["
CREATE TABLE coney_inbox (
    consumer TEXT NOT NULL,
    message_id TEXT NOT NULL,
    handled_at BIGINT NOT NULL,
    PRIMARY KEY (consumer, message_id)
);
CREATE INDEX coney_inbox_handled ON coney_inbox (handled_at);
"];
