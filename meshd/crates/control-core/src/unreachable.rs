//! The cause and remedy of a missing etcd connection.

use std::time::Duration;

use etcd_schema::NodeId;
use mesh::problem::{Problem, ProblemCode};

use crate::types::{EtcdFailure, FailureKind};

/// How long the differences of an audit are reported.
pub(crate) const LOST_CHANGES_SHOWN: Duration = Duration::from_secs(24 * 3600);

/// The problem of a missing connection, by the error of the last attempt.
pub fn etcd_unreachable(endpoint: &str, error: &EtcdFailure) -> Problem {
    Problem {
        code: ProblemCode::EtcdUnreachable,
        key: None,
        cause: format!("etcd unreachable: {endpoint}: {error}"),
        remedy: remedy(error.kind, endpoint),
    }
}

/// The problem of an etcd that refuses the writes of `node`.
pub(crate) fn etcd_refuses(reason: &EtcdFailure, node: &NodeId) -> Problem {
    let remedy = match reason.kind {
        FailureKind::Rights => {
            format!("meshctl etcd-roles {node} # prints the commands that grant this node's etcd user its rights")
        }
        FailureKind::Quota => {
            "etcdctl compact $(etcdctl endpoint status -w json | grep -o '\"revision\":[0-9]*' | head -n 1 | cut -d : -f 2) \
             && etcdctl defrag --cluster && etcdctl alarm disarm # etcd has reached its quota (etcdctl alarm list); a \
             larger one is --quota-backend-bytes"
                .into()
        }
        _ => "etcdctl endpoint health --cluster; etcdctl alarm list # see also etcd's log".into(),
    };
    Problem {
        code: ProblemCode::EtcdRefuses,
        key: None,
        cause: format!("etcd refuses this node's writes: {reason}; the current state stays in force"),
        remedy,
    }
}

/// The problem of a watch that did not bring everything.
pub(crate) fn watch_lost_changes(differences: u64) -> Problem {
    Problem {
        code: ProblemCode::WatchLostChanges,
        key: None,
        cause: format!(
            "audits found {differences} changed keys that the etcd watch had missed; they have been applied"
        ),
        remedy: "compare the members (etcdctl endpoint status --cluster, endpoint hashkv --cluster): replace one that \
                 lags or differs; if all agree, report this as a bug with the log lines that contain `audit`"
            .into(),
    }
}

/// The remedy for a failure in reaching `endpoint`.
pub fn remedy(kind: FailureKind, endpoint: &str) -> String {
    match kind {
        FailureKind::TlsFiles => {
            "meshd run --check # checks the files: the private key must be RSA, ECDSA P-256 or P-384, \
                           or Ed25519, and match the certificate; openssl genpkey -algorithm EC -pkeyopt \
                           ec_paramgen_curve:P-256 generates one"
                .into()
        }
        FailureKind::NotTls => {
            let plain = endpoint.replacen("https://", "http://", 1);
            format!(
                "etcd at {endpoint} does not seem to speak TLS: give it a certificate, or use {plain} in \
                 --etcd-endpoints (beyond this machine only with --etcd-allow-plaintext)"
            )
        }
        FailureKind::Tls => {
            "check that --etcd-cafile is the CA of etcd's certificate, that the certificate names the endpoint's host \
             and is valid by this machine's clock (date; timedatectl set-ntp true), and that --etcd-certfile and \
             --etcd-keyfile are set if etcd requires a client certificate"
                .into()
        }
        FailureKind::File => "make the file readable for meshd, or correct its flag".into(),
        FailureKind::User => {
            "check --etcd-username and the content of --etcd-password-file (etcdctl user get, auth status)".into()
        }
        FailureKind::Rights => "grant the node's etcd user the right to read and write below the prefix (etcdctl role \
                         grant-permission ROLE readwrite PREFIX/ --prefix)"
            .into(),
        FailureKind::Refused => format!(
            "systemctl start etcd # on {endpoint}, which refuses connections; if it is gone for good, remove it from \
             etcd-endpoints"
        ),
        FailureKind::UnknownHost => {
            "the host name does not resolve: correct --etcd-endpoints, or this machine's name servers".into()
        }
        FailureKind::Silent => format!(
            "check that {endpoint} is reachable from here (firewalls, routes) and that etcd has a leader (etcdctl \
             endpoint health)"
        ),
        FailureKind::Other | FailureKind::Quota if endpoint.starts_with("http://") => format!(
            "check etcd at {endpoint} (etcdctl endpoint health) and --etcd-endpoints: https:// if etcd speaks TLS"
        ),
        FailureKind::Other | FailureKind::Quota => {
            format!("check etcd at {endpoint} (etcdctl endpoint health) and --etcd-endpoints")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_goes_with_the_kind() {
        let silent = EtcdFailure::new(FailureKind::Silent, "etcd did not answer: no answer within 5s");
        let problem = etcd_unreachable("https://etcd:2379", &silent);
        assert!(problem.cause.contains("https://etcd:2379: ") && problem.remedy.contains("https://etcd:2379"));
        let node: NodeId = "0123456789abcdef0123456789abcdef".parse().unwrap();
        let refused = |kind| etcd_refuses(&EtcdFailure::new(kind, "no"), &node).remedy;
        assert!(refused(FailureKind::Quota).starts_with("etcdctl compact "));
        assert!(refused(FailureKind::Rights).contains(&format!("etcd-roles {node}")));
        assert_ne!(refused(FailureKind::Other), refused(FailureKind::Quota));
    }
}
