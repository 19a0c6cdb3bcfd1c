//! Segmentation offloads of a network device: splitting super-packets into segments, merging segments into
//! super-packets, and checksums. Pure: bytes in, bytes out.
//!
//! A super-packet is one IP packet that represents many: it has one set of headers and up to 64 KiB of payload, to be
//! split into segments of [`gso_size`](super::vnet::Vnet::gso_size) bytes each (the last may be shorter), every one with
//! its own headers. The kernel passes such packets to a TUN device that announces support, and accepts them from it.

pub(super) mod checksum;
pub(super) mod merge;
#[cfg(test)]
pub(super) mod packets;
pub(super) mod split;
pub(super) mod switch;

pub(super) use merge::{Joinable, Merger};
pub(super) use split::Segments;
pub(super) use switch::Switches;
pub use switch::{OffloadSetting, OffloadSettings, OffloadState, OffloadStatus};
