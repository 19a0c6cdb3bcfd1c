//! `alive/ID`: the liveness record of a running daemon; feeds status, clone detection and `meshd-sync` only.

use serde_json::Map;

use super::{KindInfo, KindRules, Reader};
use crate::{
    NodeId, Violations,
    document::{DocumentLimits, read},
    fields::{Expected, Fields, Writer},
    violation::Report,
};

/// Value of `alive/ID`: `{"bootId", "startCount", "startRevision", "incarnation", "reads", "ready", "reason"}`. Unknown
/// fields are ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alive {
    /// The kernel's boot id (equal for containers on one machine and for snapshots).
    pub boot_id: String,
    /// How often this state directory was started.
    pub start_count: u64,
    /// etcd's revision when this process first read it. Older daemons do not write it.
    pub start_revision: Option<u64>,
    /// Random, one per process.
    pub incarnation: u64,
    /// Directories of keys that this daemon acts on and that version 0.1.0 did not know: [`Self::KUBERNETES`]. Older
    /// daemons do not write it. It is not part of `nodes/ID`, whose unknown fields an older daemon keeps.
    pub reads: Vec<String>,
    /// Whether pods' packets go as they should here; `None`: an older daemon, or one that has just started.
    pub readiness: Option<Readiness>,
}

/// Whether a node's pods are connected and protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// They are.
    Ready,
    /// They are not.
    NotReady {
        /// Why, for people.
        reason: String,
    },
}

pub(super) const KIND: KindInfo =
    KindInfo { place: "alive/", is_flat: true, rules: KindRules { reader: Reader::Mesh, class: None }, fields: KNOWN };

const KNOWN: &[&str] = &["bootId", "startCount", "startRevision", "incarnation", "reads", "ready", "reason"];

/// Most entries of `reads`.
const MAX_READS: usize = 64;

/// Longest `bootId`, in bytes.
const MAX_BOOT_ID: usize = 64;

impl Alive {
    /// In `reads`: objects of Kubernetes below `k8s/CLUSTER/`.
    pub const KUBERNETES: &'static str = "k8s";

    /// The sign of life that `value` holds, in JSON or YAML.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn parse(value: &[u8]) -> Result<Self, Violations> {
        let mut fields = Fields::root(read(value, DocumentLimits::RECORD)?);
        let mut report = Report::default();
        let boot_id = fields.required(&mut report, "bootId", "write the kernel's boot id", boot_id);
        let mut number = |name: &str| {
            if !fields.has(name) {
                report.add(name, "missing", "write a whole number");
            }
            fields.integer(&mut report, name, 0..=u64::MAX, "")
        };
        let (start_count, incarnation) = (number("startCount"), number("incarnation"));
        let start_revision = fields.integer(&mut report, "startRevision", 0..=u64::MAX, "");
        let reads = fields.texts(&mut report, "reads", MAX_READS, |text| Ok(text.to_owned())).unwrap_or_default();
        let (ready, reason) = (fields.boolean(&mut report, "ready"), fields.text(&mut report, "reason"));
        let readiness = ready.map(|ready| match ready {
            true => Readiness::Ready,
            false => Readiness::NotReady { reason: reason.unwrap_or_default() },
        });
        fields.rest(&mut report, KNOWN);
        let alive = (|| {
            Some(Self {
                boot_id: boot_id?,
                start_count: start_count?,
                start_revision,
                incarnation: incarnation?,
                reads,
                readiness,
            })
        })();
        report.finish(alive)
    }

    /// The value as JSON.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.put("bootId", self.boot_id.as_str())
            .put("startCount", self.start_count)
            .maybe("startRevision", self.start_revision)
            .put("incarnation", self.incarnation)
            .texts("reads", &self.reads);
        match &self.readiness {
            None => {}
            Some(Readiness::Ready) => {
                out.put("ready", true);
            }
            Some(Readiness::NotReady { reason }) => {
                out.put("ready", false).put("reason", reason.as_str());
            }
        }
        out.json(&Map::new())
    }

    /// Whether this record's process started before the one of `other`. Decides which of two clones keeps the identity:
    /// it is a function of the two records alone, so both come to the same answer.
    ///
    /// etcd's revision at the start is a clock that both share. Where one of them does not say it, or it is the same,
    /// the start counts decide: that of a copied state directory is at least one higher. The incarnation breaks ties.
    #[must_use]
    pub fn started_before(&self, other: &Self) -> bool {
        match (self.start_revision, other.start_revision) {
            (Some(own), Some(others)) if own != others => own < others,
            _ => (self.start_count, self.incarnation) < (other.start_count, other.incarnation),
        }
    }

    /// A one-line summary for operators.
    pub(super) fn summary(&self, id: &NodeId) -> String {
        format!("node {id} is alive, start {}", self.start_count)
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
