//! Checks each etcd member separately.

use std::sync::Arc;

use api_types::{Finding, Severity};
use control::{etcd_options::EtcdMember, session::Dialer};
use control_core::{types::EtcdFailure, unreachable::remedy};
use mesh::problem::ProblemCode;
use tokio::{runtime::Handle, task::JoinSet};

use super::ApiState;

/// The oldest etcd version with the required transactions and watch progress.
const OLDEST: (u64, u64) = (3, 4);

impl ApiState {
    /// Versions of the members that answer; the others are findings.
    pub(super) fn etcd(&self, findings: &mut Vec<Finding>) -> Vec<String> {
        // They were taken at the start, so that they hold.
        let Ok(dialer) = Dialer::new(&self.etcd).map(Arc::new) else { return Vec::new() };
        let answers = Handle::current().block_on(async {
            let mut asked = JoinSet::new();
            for member in dialer.members() {
                let (dialer, member) = (Arc::clone(&dialer), member.clone());
                asked.spawn(async move {
                    let answer = version(&dialer, &member).await;
                    (member.to_string(), answer)
                });
            }
            asked.join_all().await
        });
        let mut versions = Vec::new();
        for (member, answer) in answers {
            match answer {
                Ok(version) => {
                    if release(&version).is_some_and(|release| release < OLDEST) {
                        findings.push(Finding::new(
                            Severity::Error,
                            ProblemCode::EtcdTooOld,
                            format!("etcd at {member} is {version}; the oldest supported version is 3.4"),
                            "apt-get install etcd-server # on one member after another; see \
                             https://etcd.io/docs/v3.4/upgrades",
                        ));
                    }
                    versions.push(format!("{member} {version}"));
                }
                Err(error) => findings.push(unreachable(&member, &error)),
            }
        }
        versions.sort();
        versions
    }
}

async fn version(dialer: &Dialer, member: &EtcdMember) -> Result<String, EtcdFailure> {
    let session = dialer.open(member, 0).await.map_err(|error| EtcdFailure::from(&error))?;
    session.version().await.map_err(|error| EtcdFailure::from(&error))
}

fn unreachable(member: &str, error: &EtcdFailure) -> Finding {
    Finding::new(
        Severity::Warning,
        ProblemCode::EtcdMemberUnreachable,
        format!("etcd at {member} does not answer: {error}"),
        remedy(error.kind, member),
    )
}

fn release(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.split('.').map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        assert_eq!(release("3.4.23"), Some((3, 4)));
        assert!(release("3.3.9").unwrap() < OLDEST);
        assert_eq!(release("x"), None);
    }
}
