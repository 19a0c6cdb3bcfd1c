//! The cause and remedy of a missing etcd connection.

use std::time::Duration;

use etcd_schema::NodeId;
use mesh::problem::{Problem, ProblemCode};

/// How long the differences of an audit are reported.
pub(crate) const LOST_CHANGES_SHOWN: Duration = Duration::from_secs(24 * 3600);

/// The kind of failure, recognized by an error's text: the client crate keeps only the text of errors from the TLS
/// library, the system and etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FailureKind {
    TlsFiles,
    NotTls,
    Tls,
    File,
    User,
    Rights,
    Refused,
    Unknown,
    Silent,
    Other,
}

/// The beginning of an error's text about unusable TLS files.
const TLS_FILES: &str = "TLS files rejected";

/// In this order: a certificate that is refused often breaks the connection too.
const WORDS: [(FailureKind, &[&str]); 9] = [
    (FailureKind::TlsFiles, &[TLS_FILES]),
    (FailureKind::NotTls, &["tls handshake eof", "corrupt message"]),
    (FailureKind::File, &["cannot read "]),
    (
        FailureKind::Tls,
        &[
            "certificate",
            "UnknownIssuer",
            "NotValidForName",
            "fatal alert",
            "handshake",
            "tls",
            "InvalidMessage",
            "DecryptError",
        ],
    ),
    (
        FailureKind::User,
        &[
            "authentication failed",
            "user name is empty",
            "invalid user",
            "auth token",
            "authentication is not enabled",
            "password",
        ],
    ),
    (FailureKind::Rights, &["permission denied"]),
    (FailureKind::Refused, &["refused (os error", "Connection refused"]),
    (FailureKind::Unknown, &["dns error", "failed to lookup", "Name or service not known"]),
    (FailureKind::Silent, &["no answer within", "timed out", "no sign of life", "went without an answer", "deadline"]),
];

/// The problem of a missing connection, by the error of the last attempt.
pub fn etcd_unreachable(endpoint: &str, error: &str) -> Problem {
    Problem {
        code: ProblemCode::EtcdUnreachable,
        key: None,
        cause: format!("etcd unreachable: {endpoint}: {error}"),
        remedy: remedy_of_etcd_error(endpoint, error),
    }
}

/// The problem of an etcd that refuses the writes of `node`.
pub(crate) fn etcd_refuses(reason: &str, node: &NodeId) -> Problem {
    let remedy = if reason.contains("database space exceeded") {
        "etcdctl compact $(etcdctl endpoint status -w json | grep -o '\"revision\":[0-9]*' | head -n 1 | cut -d : -f 2) && \
         etcdctl defrag --cluster && etcdctl alarm disarm # etcd has reached its quota (etcdctl alarm list); a larger one is \
         --quota-backend-bytes"
            .into()
    } else if kind(reason) == FailureKind::Rights {
        format!("meshctl etcd-roles {node} # prints the commands that grant this node's etcd user its rights")
    } else {
        "etcdctl endpoint health --cluster; etcdctl alarm list # see also etcd's log".into()
    };
    Problem {
        code: ProblemCode::EtcdRefuses,
        key: None,
        cause: format!("etcd refuses this node's writes: {reason}; the current state stays in force"),
        remedy,
    }
}

/// The remedy for an error in reaching `endpoint`.
pub fn remedy_of_etcd_error(endpoint: &str, error: &str) -> String {
    remedy(kind(error), endpoint)
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

fn kind(error: &str) -> FailureKind {
    let known = WORDS.iter().find(|(_, words)| words.iter().any(|word| error.contains(word)));
    known.map_or(FailureKind::Other, |(kind, _)| *kind)
}

fn remedy(kind: FailureKind, endpoint: &str) -> String {
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
        FailureKind::Unknown => {
            "the host name does not resolve: correct --etcd-endpoints, or this machine's name servers".into()
        }
        FailureKind::Silent => format!(
            "check that {endpoint} is reachable from here (firewalls, routes) and that etcd has a leader (etcdctl \
             endpoint health)"
        ),
        FailureKind::Other if endpoint.starts_with("http://") => format!(
            "check etcd at {endpoint} (etcdctl endpoint health) and --etcd-endpoints: https:// if etcd speaks TLS"
        ),
        FailureKind::Other => format!("check etcd at {endpoint} (etcdctl endpoint health) and --etcd-endpoints"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_goes_with_the_cause() {
        for (error, expected) in [
            ("etcd did not answer: transport error: invalid peer certificate: UnknownIssuer", FailureKind::Tls),
            ("etcd did not answer: transport error: received fatal alert: CertificateRequired", FailureKind::Tls),
            ("TLS files rejected: invalid private key", FailureKind::TlsFiles),
            ("etcd did not answer: transport error: tls handshake eof", FailureKind::NotTls),
            ("cannot read /etc/etcd/tls.key: No such file or directory (os error 2)", FailureKind::File),
            ("etcd refused: etcdserver: authentication failed, invalid user ID or password", FailureKind::User),
            ("etcd refused: etcdserver: user name is empty", FailureKind::User),
            ("etcd refused: etcdserver: permission denied", FailureKind::Rights),
            (
                "etcd did not answer: transport error: tcp connect error: Connection refused (os error 111)",
                FailureKind::Refused,
            ),
            (
                "etcd did not answer: transport error: dns error: failed to lookup address information",
                FailureKind::Unknown,
            ),
            ("etcd did not answer: no answer within 5s", FailureKind::Silent),
            ("a call went without an answer", FailureKind::Silent),
            ("etcd did not answer: the watch ended", FailureKind::Other),
        ] {
            assert_eq!(kind(error), expected, "{error}");
        }
        let problem = etcd_unreachable("https://etcd:2379", "etcd did not answer: no answer within 5s");
        assert!(problem.cause.contains("https://etcd:2379: ") && problem.remedy.contains("https://etcd:2379"));
    }
}
