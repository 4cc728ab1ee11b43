//! Where the sources of coney are, for the tests that read them.

use std::path::{Path, PathBuf};

/// A file or directory of the repository.
pub fn path(of: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(of).canonicalize().expect("a file of the repository")
}
