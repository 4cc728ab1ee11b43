//! The guide: one page for each thing one wants to do, and one for each thing that can go wrong.
//!
//! The same pages are files in `docs/` of the repository.

#[doc = include_str!("../docs/pools.md")]
pub mod pools {}

#[doc = include_str!("../docs/publishing.md")]
pub mod publishing {}

#[doc = include_str!("../docs/listeners.md")]
pub mod listeners {}

#[doc = include_str!("../docs/retry.md")]
pub mod retry {}

#[doc = include_str!("../docs/topology.md")]
pub mod topology {}

#[doc = include_str!("../docs/partitions.md")]
pub mod partitions {}

#[doc = include_str!("../docs/outbox.md")]
pub mod outbox {}

#[doc = include_str!("../docs/workers.md")]
pub mod workers {}

#[doc = include_str!("../docs/testing.md")]
pub mod testing {}

#[doc = include_str!("../docs/releases.md")]
pub mod releases {}

#[doc = include_str!("../docs/settings.md")]
pub mod settings {}

#[doc = include_str!("../docs/errors.md")]
pub mod errors {}

#[doc = include_str!("../docs/operating.md")]
pub mod operating {}

#[doc = include_str!("../docs/security.md")]
pub mod security {}
