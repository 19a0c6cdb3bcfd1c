//! `meshctl doctor`.

use api::{Client, ClientError};
use api_types::{Diagnosis, Finding, Severity};
use clap::Args;
use mesh::problem::ProblemCode;
use meshd::doctor::{
    filters::{self, WantedFlows},
    host::{self, Interfaces},
};
use serde::{Deserialize, Serialize};

use crate::{
    exit::{DEGRADED, NOT_REACHABLE},
    output::{Output, Tone, print, toned},
};

#[derive(Args)]
pub(crate) struct Doctor {
    /// Name of the TUN device, used if the daemon is not reachable
    #[arg(long, env = "MESHD_INTERFACE", default_value = "meshd0")]
    interface: String,
    /// UDP port of the tunnel, used if the daemon is not reachable
    #[arg(long, env = "MESHD_LISTEN_PORT", default_value_t = 51820)]
    listen_port: u16,
}

/// The output with `-o json`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Examined {
    /// Whether the daemon has answered.
    daemon: bool,
    /// Versions of the etcd members that answer it.
    etcd: Vec<String>,
    /// The worst first.
    findings: Vec<Finding>,
}

#[cfg(test)]
impl Examined {
    /// The findings of the daemon alone.
    pub(crate) fn of(diagnosis: &Diagnosis) -> Self {
        Self { daemon: true, etcd: diagnosis.etcd.clone(), findings: diagnosis.findings.clone() }
    }
}

impl Doctor {
    pub(crate) fn run(&self, output: Output, client: &Client) -> anyhow::Result<u8> {
        let examined = self.examine(client);
        print(output, &examined, text)?;
        let ill = examined.findings.iter().any(|finding| finding.severity != Severity::Note);
        Ok(match (examined.daemon, ill) {
            (false, _) => NOT_REACHABLE,
            (true, true) => DEGRADED,
            (true, false) => 0,
        })
    }

    fn examine(&self, client: &Client) -> Examined {
        let asked: Result<Diagnosis, ClientError> = client.get_slowly("/v1/doctor");
        let (interfaces, mut findings) = match &asked {
            Ok(diagnosis) => (
                Interfaces {
                    tun: diagnosis.interface.clone(),
                    underlay: diagnosis.underlay.clone(),
                    families: diagnosis.families,
                },
                diagnosis.findings.clone(),
            ),
            Err(error) => (
                Interfaces { tun: self.interface.clone(), ..Interfaces::default() },
                vec![Finding::new(
                    Severity::Error,
                    ProblemCode::DaemonNotReachable,
                    error.to_string(),
                    "systemctl status meshd; journalctl -u meshd -n 50",
                )],
            ),
        };
        let mut seen = host::findings(&interfaces);
        if asked.is_ok() {
            // The daemon has named some of them.
            seen.retain(|found| !findings.contains(found));
            // A bridge concerns the mesh only when its pods are on it, which the daemon knows.
            seen.retain(|found| !found.is(ProblemCode::BridgeNotFiltered));
        } else {
            seen.extend(filters::findings(&WantedFlows::unknown(self.listen_port)));
        }
        findings.extend(seen);
        findings.sort_by_key(|finding| finding.severity);
        Examined {
            daemon: asked.is_ok(),
            etcd: asked.map_or_else(|_| Vec::new(), |diagnosis| diagnosis.etcd),
            findings,
        }
    }
}

pub(crate) fn text(examined: &Examined) -> String {
    let mut text = String::new();
    for finding in &examined.findings {
        let (word, tone) = match finding.severity {
            Severity::Error => ("error", Tone::Bad),
            Severity::Warning => ("warning", Tone::Waiting),
            Severity::Note => ("note", Tone::Quiet),
        };
        text += &format!("{} {}: {}\n  remedy  {}\n", toned(word, tone), finding.code, finding.cause, finding.remedy);
    }
    for member in &examined.etcd {
        text += &format!("{} etcd: {member}\n", toned("ok", Tone::Good));
    }
    if examined.findings.iter().all(|finding| finding.severity == Severity::Note) {
        text += &format!("{} no connectivity problems found\n", toned("ok", Tone::Good));
    }
    text
}
