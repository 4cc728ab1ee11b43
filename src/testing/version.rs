//! Which version of RabbitMQ a node is.

use std::fmt;

/// A version of RabbitMQ, as a node tells it. See [`RabbitMq::version`](super::RabbitMq::version).
///
/// ```
/// use coney::testing::Version;
///
/// assert!(Version::new(3, 10, 8) < Version::new(4, 0, 0));
/// assert_eq!(Version::new(4, 0, 5).to_string(), "4.0.5");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// 4 of 4.0.5.
    pub major: u32,
    /// 0 of 4.0.5.
    pub minor: u32,
    /// 5 of 4.0.5.
    pub patch: u32,
}

impl Version {
    /// A version to compare with.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// What a node says, which may have more behind: `4.1.0-rc.1`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(['.', '-', '+']).map(|part| part.parse().ok());
        let (major, minor) = (parts.next()??, parts.next()??);
        Some(Self { major, minor, patch: parts.next().flatten().unwrap_or(0) })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::Version;

    #[test]
    fn versions_are_read_and_compared() {
        for (text, version) in [("3.10.8", (3, 10, 8)), ("4.1.0-rc.1", (4, 1, 0)), ("4.2", (4, 2, 0))] {
            let (major, minor, patch) = version;
            assert_eq!(Version::parse(text), Some(Version::new(major, minor, patch)), "{text}");
        }
        for text in ["", "4", "x.y.z", "4.x"] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
        assert!(Version::new(3, 9, 29) < Version::new(3, 10, 0));
    }
}
