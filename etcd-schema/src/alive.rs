//! `alive/ID`: a daemon that runs; feeds status and the detection of clones only.

use serde_json::Map;

use crate::{
    Violations,
    document::{Limits, read},
    fields::{Expected, Fields, Writer},
    violation::Report,
};

/// Value of `alive/ID`: `{"bootId", "startCount", "incarnation"}`. Unknown fields are ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alive {
    /// The kernel's boot id (equal for containers on one machine and for snapshots).
    pub boot_id: String,
    /// How often this state directory was started.
    pub start_count: u64,
    /// Random, one per process.
    pub incarnation: u64,
}

pub(crate) const KNOWN: [&str; 3] = ["bootId", "startCount", "incarnation"];

/// Longest `bootId`, in bytes.
const MAX_BOOT_ID: usize = 64;

impl Alive {
    /// The sign of life that `value` holds, in JSON or YAML.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn parse(value: &[u8]) -> Result<Self, Violations> {
        let mut fields = Fields::root(read(value, Limits::RECORD)?);
        let mut report = Report::default();
        let boot_id = fields.required(&mut report, "bootId", "write the kernel's boot id", boot_id);
        let mut number = |name: &str| {
            if !fields.has(name) {
                report.add(name, "missing", "write a whole number");
            }
            fields.integer(&mut report, name, 0..=u64::MAX, "")
        };
        let (start_count, incarnation) = (number("startCount"), number("incarnation"));
        fields.rest(&mut report, &KNOWN);
        let alive = (|| Some(Self { boot_id: boot_id?, start_count: start_count?, incarnation: incarnation? }))();
        report.finish(alive)
    }

    /// The value as JSON.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.put("bootId", self.boot_id.as_str())
            .put("startCount", self.start_count)
            .put("incarnation", self.incarnation);
        out.json(&Map::new())
    }
}

fn boot_id(text: &str) -> Result<String, Expected> {
    let plain = (1..=MAX_BOOT_ID).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    if plain {
        Ok(text.to_owned())
    } else {
        Err(format!("must be 1 to {MAX_BOOT_ID} printable characters, as in /proc/sys/kernel/random/boot_id").into())
    }
}
