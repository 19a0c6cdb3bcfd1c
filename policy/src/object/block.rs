//! Address blocks.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
};

use etcd_schema::reading::{Report, quoted};
use ipnet::IpNet;

use super::reader::ObjectFields;

/// A block of addresses with holes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Block {
    /// The block, without host bits.
    pub cidr: IpNet,
    /// The holes: each inside the block, none inside another, sorted.
    pub except: Box<[IpNet]>,
}

impl Block {
    /// The block without those of the holes that another one holds.
    #[must_use]
    pub fn new(cidr: IpNet, except: impl IntoIterator<Item = IpNet>) -> Self {
        let cidr = cidr.trunc();
        let mut holes: Vec<IpNet> = except.into_iter().map(|hole| hole.trunc()).collect();
        holes.sort_unstable();
        // Sorted by address, then length: a containing block precedes the contained one.
        holes.dedup_by(|inner, outer| outer.contains(&*inner));
        Self { cidr, except: holes.into() }
    }

    /// Whether `address` is in the block and in none of its holes. The families never mix.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.cidr.contains(&address) && !self.is_excepted(address)
    }

    /// Whether `address` is in one of the holes.
    #[must_use]
    pub(crate) fn is_excepted(&self, address: IpAddr) -> bool {
        // Disjoint and sorted: only the last hole that begins at or before the address can hold it.
        let behind = self.except.partition_point(|hole| hole.network() <= address);
        behind.checked_sub(1).is_some_and(|last| self.except[last].contains(&address))
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cidr)?;
        for (i, hole) in self.except.iter().enumerate() {
            write!(f, "{}{hole}", if i == 0 { " except " } else { ", " })?;
        }
        Ok(())
    }
}

/// Why text is no block of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// Not `ADDRESS/LENGTH`.
    #[error("must be ADDRESS/LENGTH")]
    Form,
    /// `::ffff:…`: which family it means differs between readers.
    #[error("an IPv4-mapped block: write it as IPv4")]
    Mapped,
}

/// The block that `text` names, its host bits cleared.
///
/// # Errors
/// When it is not `ADDRESS/LENGTH` in the plain form, without leading zeros.
pub(crate) fn parse_cidr(text: &str) -> Result<IpNet, BlockError> {
    let (address, length) = text.split_once('/').ok_or(BlockError::Form)?;
    let digits = length.bytes().all(|b| b.is_ascii_digit()) && (length == "0" || !length.starts_with('0'));
    if !digits {
        return Err(BlockError::Form);
    }
    let address: IpAddr = address.parse().map_err(|_| BlockError::Form)?;
    if let IpAddr::V6(v6) = address
        && is_mapped(v6)
    {
        return Err(BlockError::Mapped);
    }
    let length = length.parse().map_err(|_| BlockError::Form)?;
    Ok(IpNet::new(address, length).map_err(|_| BlockError::Form)?.trunc())
}

/// `parse_cidr` as the API server reads the blocks of NetworkPolicies: numbers may have leading zeros, and are decimal.
///
/// # Errors
/// As `parse_cidr`.
fn parse_lenient_cidr(text: &str) -> Result<IpNet, BlockError> {
    let (address, length) = text.split_once('/').ok_or(BlockError::Form)?;
    let plain = |number: &str| match number.trim_start_matches('0') {
        "" if !number.is_empty() => "0".to_owned(),
        rest => rest.to_owned(),
    };
    let address = match address.contains(':') {
        true => address.to_owned(),
        false => address.split('.').map(plain).collect::<Vec<_>>().join("."),
    };
    parse_cidr(&format!("{address}/{}", plain(length)))
}

const fn is_mapped(address: Ipv6Addr) -> bool {
    address.to_ipv4_mapped().is_some()
}

/// Reads an `ipBlock`. `escaped` is set if an exception is outside the block, which is refused although its meaning is
/// clear.
pub(super) fn read(fields: &ObjectFields<'_>, report: &mut Report, escaped: &mut usize) -> Option<Block> {
    fields.only(&["cidr", "except"], report);
    let cidr = match fields.get("cidr") {
        Some(at) => at.text(report).and_then(|text| lenient_cidr(&at.path, text, report)),
        None => {
            report.add(fields.path("cidr"), "missing", "write the block, ADDRESS/LENGTH");
            None
        }
    };
    let mut holes = Vec::new();
    for at in fields.list("except", report) {
        let Some(hole) = at.text(report).and_then(|text| lenient_cidr(&at.path, text, report)) else { continue };
        if let Some(cidr) = cidr
            && !(cidr.contains(&hole) && cidr != hole)
        {
            report.add(&at.path, quoted(&hole.to_string()), format!("must be inside {cidr} and smaller"));
            *escaped += 1;
            continue;
        }
        holes.push(hole);
    }
    cidr.map(|cidr| Block::new(cidr, holes))
}

/// The block that `text` at `path` names; a mistake is noted.
pub(super) fn cidr(path: &str, text: &str, report: &mut Report) -> Option<IpNet> {
    parse_cidr(text).map_err(|error| report.add(path, quoted(text), error.to_string())).ok()
}

/// The same of a NetworkPolicy.
fn lenient_cidr(path: &str, text: &str, report: &mut Report) -> Option<IpNet> {
    parse_lenient_cidr(text).map_err(|error| report.add(path, quoted(text), error.to_string())).ok()
}
