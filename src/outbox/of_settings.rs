//! The outbox that the settings of an app name.

use super::Outbox;
use crate::app::App;
use crate::error::{Error, Result};

impl App {
    /// Opens the outbox that `[outbox]` of the settings names. Keep it, and clone it for others: each call opens it anew.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// let app = coney::App::from_file("app.toml")?; // [outbox] store = "sqlite:outbox.db"
    /// let outbox = app.outbox()?;
    /// outbox.forward(&app)?;
    /// outbox.publish("", "orders", "stored")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if the settings name none; else those of [`Builder::sqlite`](super::Builder::sqlite).
    pub fn outbox(&self) -> Result<Outbox> {
        let Some(settings) = self.outbox_settings() else {
            return Err(Error::invalid(
                "outbox",
                "the settings have none; expected [outbox] with store = \"sqlite:PATH\"",
            ));
        };
        let path = settings.path().map_err(|problem| Error::invalid("outbox.store", problem))?;
        let mut builder = Outbox::builder();
        if let Some(rows) = settings.max_rows {
            builder = builder.max_rows(rows);
        }
        if let Some(bytes) = settings.max_bytes {
            builder = builder.max_bytes(bytes);
        }
        if let Some(age) = settings.max_age {
            builder = builder.max_age(age);
        }
        if let Some(keep) = settings.keep_sent {
            builder = builder.keep_sent(keep);
        }
        if let Some(age) = settings.ready_within {
            builder = builder.ready_within(age);
        }
        builder.sqlite(path)
    }
}
