//! What a kernel leaves to a device: cutting super-packets into segments, joining segments into super-packets, and
//! checksums. Pure: bytes in, bytes out.
//!
//! A super-packet is one IP packet that stands for many: it has one set of headers and up to 64 KiB of payload, and is
//! to be cut into segments of [`Vnet::gso_size`] bytes of payload each (the last may have less), every one with headers
//! of its own. The kernel gives such packets to a TUN device that says it can cut them, and takes such packets from it.

pub(super) mod checksum;
pub(super) mod merge;
#[cfg(test)]
pub(super) mod packets;
pub(super) mod split;
pub(super) mod switch;
pub(super) mod vnet;

pub(super) use merge::{Joinable, Merger};
pub(super) use split::Segments;
pub(super) use switch::Switches;
pub use switch::{OffloadSetting, OffloadSettings, OffloadState, OffloadStatus};
pub(super) use vnet::{VNET_HEADER, Vnet};
