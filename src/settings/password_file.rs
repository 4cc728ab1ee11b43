//! A password that is kept in a file of its own, as Docker and Kubernetes hand out secrets.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use super::environment::without_line_break;
use super::reader::{Given, Layer};
use super::{AuthMechanism, BrokerSettings, check};
use crate::error::ConnectError;
use crate::url::Secret;

impl BrokerSettings {
    /// These settings with the password that the file has now, if a file has it and it is needed.
    pub(crate) fn with_password(&self) -> Result<Cow<'_, BrokerSettings>, ConnectError> {
        match &self.password_file {
            Some(path) if self.auth != AuthMechanism::External => {
                let password =
                    read(path).map_err(|problem| ConnectError::PasswordFile { path: path.clone(), problem })?;
                Ok(Cow::Owned(BrokerSettings { password, ..self.clone() }))
            }
            _ => Ok(Cow::Borrowed(self)),
        }
    }
}

fn read(path: &Path) -> Result<Secret, String> {
    let text = fs::read(path).map_err(|error| error.to_string())?;
    // The error of the conversion is not told: it quotes what it could not convert.
    let text = String::from_utf8(text).map_err(|_| "it is not UTF-8".to_owned())?;
    let password = without_line_break(&text);
    if password.is_empty() {
        return Err("it is empty, expected the password".to_owned());
    }
    check::credential(password)?;
    Ok(Secret::new(password))
}

/// Which file the password is in after a section: the one that it names, unless it has the password itself in a later layer or
/// names another server.
pub(super) fn over(
    inherited: Option<&Path>,
    url: Option<(Layer, bool)>,
    password: Option<Layer>,
    file: Option<&Given<PathBuf>>,
) -> Option<PathBuf> {
    // A URL with a password in it counts for as much as the key.
    let written = url.and_then(|(layer, has_password)| has_password.then_some(layer)).max(password);
    match file {
        Some(file) if written.is_none_or(|written| file.layer >= written) => Some(file.value.clone()),
        Some(_) => None,
        None if url.is_some() || password.is_some() => None,
        None => inherited.map(Path::to_owned),
    }
}
