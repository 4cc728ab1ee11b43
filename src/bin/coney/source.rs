//! Which broker a command talks to: a URL, or the settings as every program of the library reads them.

use std::path::{Path, PathBuf};

use coney::settings::LISTEN_POOL;
use coney::{AmqpUrl, App, Pool, PoolSettings, Settings};
use log::LevelFilter;

use crate::exit::{Failure, Result, complain};
use crate::output;

/// The file that is read if it is there and no other is named.
const DEFAULT_FILE: &str = "app.toml";
/// The variable that counts beside a URL, so that no password need be in the list of processes.
const PASSWORD: &str = "CONEY_BROKER__PASSWORD";

/// What `--help` says of where the settings come from.
pub const SETTINGS: &str = "Settings, of which the last counts:
  1. the file of --config, or app.toml in the working directory if it is there
  2. its profile [profiles.NAME…] of --profile, or of the variable CONEY_PROFILE
  3. variables: CONEY_BROKER__URL, CONEY_BROKER__PASSWORD, CONEY_POOLS__PUBLISH__SIZE, …
With --url none of them counts, but for CONEY_BROKER__PASSWORD if the URL has no password.
With nothing at all it is amqp://guest:guest@localhost:5672/%2f. No output shows a password.";

/// The same before the command and after it.
#[derive(Debug, Default, PartialEq, clap::Args)]
#[command(next_help_heading = "Which broker")]
pub struct Source {
    /// The settings file. Defaults to app.toml, if there is one.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The profile in the settings file. Defaults to what CONEY_PROFILE says.
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
    /// This broker, in place of the settings: amqp://user@host:5672/vhost. See CONEY_BROKER__PASSWORD below.
    #[arg(long, value_name = "URL", conflicts_with_all = ["config", "profile"])]
    url: Option<String>,
    /// The pool of the settings whose broker and limits count.
    #[arg(long, value_name = "NAME")]
    pool: Option<String>,
    /// What is logged on stderr: off, error, warn, info, debug or trace. Defaults to warn.
    #[arg(long, value_name = "LEVEL")]
    log: Option<LevelFilter>,
}

/// Starts logging. The client below has nothing to add to our own errors.
fn log_at(level: LevelFilter) {
    let below = if level > LevelFilter::Warn { LevelFilter::Info } else { LevelFilter::Off };
    output::log_at(level, below);
}

impl Source {
    /// Takes over what stands before the command. What stands after it counts for more.
    pub fn inherit(&mut self, before: Source) {
        let Source { config, profile, url, pool, log } = before;
        if self.url.is_none() && self.config.is_none() && self.profile.is_none() {
            self.url = url;
        }
        if self.url.is_none() {
            self.config = self.config.take().or(config);
            self.profile = self.profile.take().or(profile);
        }
        self.pool = self.pool.take().or(pool);
        self.log = self.log.or(log);
    }

    /// The settings file that counts, if one does.
    pub fn file(&self) -> Option<&Path> {
        match (&self.url, &self.config) {
            (Some(_), _) => None,
            (None, Some(path)) => Some(path),
            (None, None) => Some(Path::new(DEFAULT_FILE)).filter(|path| path.exists()),
        }
    }

    /// The name of the pool that was asked for.
    pub fn pool_name(&self) -> Option<&str> {
        self.pool.as_deref()
    }

    pub fn is_url(&self) -> bool {
        self.url.is_some()
    }

    /// Starts logging and reads the settings.
    pub fn settings(&self) -> Result<Settings> {
        Ok(self.settings_or_mistakes()??)
    }

    /// The same for who has more to say about mistakes in the settings than a line.
    pub fn settings_or_mistakes(&self) -> Result<coney::Result<Settings>> {
        log_at(self.log.unwrap_or(LevelFilter::Warn));
        let mut loader = Settings::loader();
        if let Some(url) = &self.url {
            AmqpUrl::parse(url).map_err(|error| Failure::usage(format!("--url: {error}")))?;
            // A JSON string is a TOML string too.
            loader = loader.text(format!("[broker]\nurl = {}", serde_json::Value::from(url.as_str())));
            if let Ok(password) = std::env::var(PASSWORD)
                && !has_password(url)
            {
                loader = loader.environment([(PASSWORD, password)]);
            }
            return Ok(loader.load());
        }
        if let Some(file) = self.file() {
            loader = loader.file(file);
        }
        if let Some(profile) = &self.profile {
            loader = loader.profile(profile);
        }
        Ok(loader.process_environment().load())
    }

    /// Reads the settings, and makes an app of them once `adjust` has had its way with each pool.
    pub fn app(&self, adjust: impl FnMut(&mut PoolSettings)) -> Result<App> {
        let mut settings = self.settings()?;
        settings.pools.values_mut().for_each(adjust);
        Ok(App::from_settings(settings)?)
    }

    /// The same with the pool that was asked for as its listen pool, which is the one that listeners borrow from.
    pub fn app_listening_on_pool(&self, adjust: impl FnMut(&mut PoolSettings)) -> Result<App> {
        let mut settings = self.settings()?;
        settings.pools.values_mut().for_each(adjust);
        if let Some(name) = &self.pool {
            let Some(chosen) = settings.pools.get(name).cloned() else {
                let known = settings.pools.into_keys().collect();
                return Err(coney::Error::UnknownPool { name: name.clone(), known }.into());
            };
            settings.pools.insert(LISTEN_POOL.to_owned(), chosen);
        }
        Ok(App::from_settings(settings)?)
    }

    /// The pool that was asked for, or this one. If nobody else sees its broker, that is said.
    pub fn pool<'a>(&self, app: &'a App, default: &'a Pool) -> Result<&'a Pool> {
        let pool = self.any_pool(app, default)?;
        warn_if_alone(pool);
        Ok(pool)
    }

    /// The same for a command that is of use on a broker of its own.
    pub fn any_pool<'a>(&self, app: &'a App, default: &'a Pool) -> Result<&'a Pool> {
        match &self.pool {
            Some(name) => Ok(app.pool(name)?),
            None => Ok(default),
        }
    }
}

/// Says on stderr that no other program meets this one, if its broker is `memory://`.
pub fn warn_if_alone(pool: &Pool) {
    if pool.settings().broker.endpoints.iter().any(|endpoint| endpoint.memory_name().is_some()) {
        complain(
            "memory:// is a broker of this process alone; for two programs: `coney broker`, then --url amqp://localhost, or a \
             profile of the settings (--profile, CONEY_PROFILE) that names a server",
        );
    }
}

fn has_password(url: &str) -> bool {
    let authority = url.split_once("://").map_or("", |(_, rest)| rest.split(['/', '?']).next().unwrap_or(""));
    authority.rsplit_once('@').is_some_and(|(user, _)| user.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::has_password;

    #[test]
    fn a_url_has_a_password_or_has_none() {
        assert!(has_password("amqp://a:b@host/vhost"));
        assert!(has_password("amqp://a:@host"));
        assert!(!has_password("amqp://a@host:5672/v:h@"));
        assert!(!has_password("amqp://host:5672"));
    }
}
