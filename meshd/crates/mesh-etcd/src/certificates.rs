//! The authority of this etcd, and the certificates that it signs.

use std::{collections::BTreeSet, net::IpAddr};

use etcd_schema::Cluster;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use time::{Duration, OffsetDateTime};

/// Common name of the members' certificate.
pub(crate) const SERVER: &str = "meshd-etcd";
/// Common name of etcd's user with all rights.
pub(crate) const ROOT: &str = "root";
/// Common name of the daemons' user.
pub(crate) const NODE: &str = "meshd-node";

const AUTHORITY_VALIDITY: Duration = Duration::days(3650);
const VALIDITY: Duration = Duration::days(365);
/// A certificate with less time left is renewed.
const RENEWAL: Duration = Duration::days(120);
/// Clocks of members and clients differ.
const CLOCK_SKEW: Duration = Duration::hours(1);

/// A certificate and its private key, both PEM.
#[derive(Clone)]
pub(crate) struct KeyedCertificate {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// What signs.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// PEM.
    pub(crate) certificate: String,
}

/// What a certificate is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Subject {
    pub(crate) common_name: String,
    /// Addresses and names of servers; of clients, none.
    pub(crate) names: BTreeSet<String>,
}

impl Subject {
    /// A client: a user of etcd.
    pub(crate) fn client(common_name: impl Into<String>) -> Self {
        Self { common_name: common_name.into(), names: BTreeSet::new() }
    }

    /// meshd-sync of a cluster.
    pub(crate) fn sync(cluster: &Cluster) -> Self {
        Self::client(format!("meshd-sync-{cluster}"))
    }

    /// All members together: clients reach them by address, each member reaches itself by loopback.
    pub(crate) fn members(names: impl IntoIterator<Item = String>) -> Self {
        let here = ["127.0.0.1", "::1", "localhost"].map(str::to_owned);
        Self { common_name: SERVER.to_owned(), names: names.into_iter().chain(here).collect() }
    }
}

impl Authority {
    /// A new authority.
    pub(crate) fn new(now: OffsetDateTime) -> Result<(Self, KeyedCertificate), rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = authority_params();
        (params.not_before, params.not_after) = (now - CLOCK_SKEW, now + AUTHORITY_VALIDITY);
        let certificate = params.self_signed(&key)?.pem();
        let keyed = KeyedCertificate { certificate: certificate.clone(), key: key.serialize_pem() };
        Ok((Self { issuer: Issuer::new(params, key), certificate }, keyed))
    }

    /// The authority that was kept.
    pub(crate) fn of(keyed: KeyedCertificate) -> Result<Self, rcgen::Error> {
        let issuer = Issuer::new(authority_params(), KeyPair::from_pem(&keyed.key)?);
        Ok(Self { issuer, certificate: keyed.certificate })
    }

    /// A certificate for `subject` from `now` on, and when it ends.
    pub(crate) fn issue(
        &self,
        subject: &Subject,
        now: OffsetDateTime,
    ) -> Result<(KeyedCertificate, OffsetDateTime), rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name.remove(DnType::CommonName);
        params.distinguished_name.push(DnType::CommonName, subject.common_name.as_str());
        for name in &subject.names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into()?),
            });
        }
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if !subject.names.is_empty() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let ends = now + VALIDITY;
        (params.not_before, params.not_after) = (now - CLOCK_SKEW, ends);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok((KeyedCertificate { certificate, key: key.serialize_pem() }, ends))
    }
}

/// Equal for every run: only the key makes an authority.
fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, "meshd-etcd-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params
}

/// Whether a certificate for `names` until `ends` still serves for the `wanted` ones.
pub(crate) fn serves(
    names: &BTreeSet<String>,
    wanted: &BTreeSet<String>,
    ends: OffsetDateTime,
    now: OffsetDateTime,
) -> bool {
    wanted.is_subset(names) && ends - now > RENEWAL
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    /// By what another implementation says of them.
    fn openssl(args: &[&str]) -> String {
        let output = Command::new("openssl").args(args).output().unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }

    #[test]
    fn certificates_verify_before_and_after_the_authority_was_kept() {
        let now = OffsetDateTime::now_utc();
        let (authority, kept) = Authority::new(now).unwrap();
        let again = Authority::of(kept.clone()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        fs::write(path("ca"), &kept.certificate).unwrap();
        let members = Subject::members(["192.0.2.1".to_owned(), "fd00::1".to_owned(), "etcd.example".to_owned()]);
        for (authority, name) in [(&authority, "before"), (&again, "after")] {
            let (issued, ends) = authority.issue(&members, now).unwrap();
            assert!(ends - now == VALIDITY && issued.key.contains("PRIVATE KEY"));
            fs::write(path(name), issued.certificate).unwrap();
            for purpose in ["sslserver", "sslclient"] {
                let said = openssl(&["verify", "-purpose", purpose, "-CAfile", &path("ca"), &path(name)]);
                assert!(said.ends_with(": OK\n"), "{said}");
            }
            let said = openssl(&["x509", "-in", &path(name), "-noout", "-text"]);
            for wanted in ["CN = meshd-etcd", "IP Address:192.0.2.1", "DNS:etcd.example", "DNS:localhost"] {
                assert!(said.contains(wanted), "{wanted}: {said}");
            }
        }
        let (client, _) = again.issue(&Subject::client(NODE), now).unwrap();
        fs::write(path("client"), client.certificate).unwrap();
        let verify = |purpose| openssl(&["verify", "-purpose", purpose, "-CAfile", &path("ca"), &path("client")]);
        assert!(verify("sslclient").ends_with(": OK\n"));
        assert!(!verify("sslserver").ends_with(": OK\n"), "a client is no server");
    }

    #[test]
    fn a_certificate_is_renewed_in_time_and_for_new_names() {
        let now = OffsetDateTime::now_utc();
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<BTreeSet<_>>();
        assert!(serves(&names(&["a", "b"]), &names(&["a"]), now + VALIDITY, now));
        assert!(!serves(&names(&["a"]), &names(&["a", "b"]), now + VALIDITY, now), "another name");
        assert!(!serves(&names(&["a"]), &names(&["a"]), now + RENEWAL, now), "near its end");
    }
}
