//! Checks of `meshd run --check` beyond the settings themselves: the interface, and the files that they name, with the
//! permissions of the service.

use std::{
    ffi::CString,
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use control::session::Dialer;
use control_core::{types::EtcdFailure, unreachable::remedy};
use nix::{
    net::if_::if_nametoindex,
    unistd::{Gid, Uid, User, geteuid, getgrouplist},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

use super::Settings;

/// Who runs the unit that the package brings.
const SERVICE_USER: &str = "meshd";

/// What came of trying the settings out.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Trial {
    /// What would keep the daemon from reaching etcd.
    pub mistakes: Vec<String>,
    /// What may be as it should: it can change until the daemon starts.
    pub warnings: Vec<String>,
}

/// A user, as the kernel decides by.
struct FileReader {
    name: String,
    uid: Uid,
    groups: Vec<Gid>,
}

#[derive(Clone, Copy)]
enum Content {
    Certificates,
    PrivateKey,
    /// What the settings have been read from already.
    Text,
}

impl Settings {
    /// Opens the files that these settings name, and looks for the interface.
    #[must_use]
    pub fn try_out(&self) -> Trial {
        // Root can open everything, and the service is not root. Another user asks for itself.
        let reader = if geteuid().is_root() { FileReader::named(SERVICE_USER) } else { None };
        let tls = &self.etcd.tls;
        let password = self.etcd.user.as_ref().and_then(|user| user.file());
        let files = [
            ("--config", self.file.as_deref(), Content::Text),
            ("--etcd-cafile", tls.ca.as_deref(), Content::Certificates),
            ("--etcd-certfile", tls.cert.as_deref(), Content::Certificates),
            ("--etcd-keyfile", tls.key.as_deref(), Content::PrivateKey),
            ("--etcd-password-file", password, Content::Text),
            ("--etcd-endpoints-file", self.etcd.endpoints_file.as_deref(), Content::Text),
        ];
        let mut trial = Trial { warnings: self.obsolete.iter().map(ToString::to_string).collect(), ..Trial::default() };
        let mut usable = true;
        for (flag, file, content) in files {
            let Some(file) = file else { continue };
            let fault = content.fault(file);
            usable &= fault.is_none();
            let fault = fault.or_else(|| reader.as_ref()?.fault(file));
            trial.mistakes.extend(fault.map(|fault| format!("{flag} {}: {fault}", file.display())));
        }
        if usable && let Some(fault) = self.tls_fault() {
            trial.mistakes.push(format!("--etcd-cafile, --etcd-certfile, --etcd-keyfile: {fault}"));
        }
        if let Some(iface) = self.iface.as_ref().filter(|iface| if_nametoindex(iface.as_str()).is_err()) {
            trial.warnings.push(format!(
                "--iface {iface}: no such interface at the moment; this node cannot reach others until it exists (ip \
                 link lists interfaces)"
            ));
        }
        trial
    }
}

impl Settings {
    /// Why the daemon could not open a TLS session with the files, in its own words and what to do.
    fn tls_fault(&self) -> Option<String> {
        let dialer = Dialer::new(&self.etcd).ok()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
        let error = EtcdFailure::from(&runtime.block_on(dialer.try_tls()).err()?);
        Some(format!("{error}\n  remedy  {}", remedy(error.kind, dialer.members().first()?.url())))
    }
}

impl Content {
    /// What is wrong with the file, and what to do.
    fn fault(self, file: &Path) -> Option<String> {
        let bytes = match fs::read(file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Some(format!(
                    "{error}: make it readable for the user that runs meshd, or run this check with \
                                     sudo"
                ));
            }
            Err(error) => return Some(format!("{error}: create the file, or correct the setting")),
        };
        match self {
            Self::Certificates => match CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>() {
                Ok(found) if found.is_empty() => {
                    Some("contains no certificate: a line \"-----BEGIN CERTIFICATE-----\" (PEM) is required".to_owned())
                }
                Ok(_) => None,
                Err(error) => Some(format!("not valid PEM ({error}): copy the file again")),
            },
            Self::PrivateKey => PrivateKeyDer::from_pem_slice(&bytes).err().map(|error| {
                format!(
                    "contains no private key ({error}): a line \"-----BEGIN PRIVATE KEY-----\" (PEM, unencrypted) \
                         is required"
                )
            }),
            Self::Text => None,
        }
    }
}

impl FileReader {
    /// `None` where there is no such user, as in a container.
    fn named(name: &str) -> Option<Self> {
        let user = User::from_name(name).ok()??;
        let groups = getgrouplist(&CString::new(name).ok()?, user.gid).ok()?;
        Some(Self { name: user.name, uid: user.uid, groups })
    }

    /// Whether owner, group and mode let this user do what `bit` (4 reads, 1 searches) stands for.
    fn may(&self, data: &Metadata, bit: u32) -> bool {
        let mode = data.mode();
        let class = if data.uid() == self.uid.as_raw() {
            mode >> 6
        } else if self.groups.iter().any(|group| group.as_raw() == data.gid()) {
            mode >> 3
        } else {
            mode
        };
        class & bit != 0
    }

    /// What keeps this user from reading the file, and what to do.
    fn fault(&self, file: &Path) -> Option<String> {
        let name = &self.name;
        let file = fs::canonicalize(file).ok()?;
        for folder in file.ancestors().skip(1) {
            if !self.may(&fs::metadata(folder).ok()?, 1) {
                let folder = folder.display();
                return Some(format!("the service's user {name} cannot enter {folder}: chmod o+x {folder}"));
            }
        }
        let denied = !self.may(&fs::metadata(&file).ok()?, 4);
        denied.then(|| format!("the service's user {name} cannot read it: chown {name}: {}", file.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, path::PathBuf};

    use super::*;
    use crate::settings::parse_file;

    const TLS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/crates/control/src/tests/tls");

    fn try_out(text: &str) -> Trial {
        let (flags, mistakes) = parse_file(&format!("node = 'a'\netcd-endpoints = ['https://e:2379']\n{text}"));
        assert_eq!(mistakes, [""; 0]);
        Settings::check(flags, Vec::new()).unwrap().try_out()
    }

    fn copy(folder: &Path, name: &str, mode: u32) -> PathBuf {
        let to = folder.join(name);
        fs::copy(format!("{TLS}/{name}"), &to).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(mode)).unwrap();
        to
    }

    #[test]
    fn each_file_must_hold_what_it_is_for() {
        let tls = |ca: &str, cert: &str, key: &str| {
            try_out(&format!(
                "etcd-cafile = '{TLS}/{ca}'\netcd-certfile = '{TLS}/{cert}'\netcd-keyfile = '{TLS}/{key}'\n"
            ))
        };
        let faults =
            |trial: Trial| trial.mistakes.into_iter().filter(|fault| fault.contains("contains no")).collect::<Vec<_>>();
        assert_eq!(faults(tls("ca.pem", "client.pem", "client.key")), [""; 0]);
        let wrong = faults(tls("client.key", "client.key", "client.pem"));
        for (fault, words) in wrong.iter().zip([
            ["--etcd-cafile", "no certificate"],
            ["--etcd-certfile", "no certificate"],
            ["--etcd-keyfile", "no private key"],
        ]) {
            assert!(words.iter().all(|word| fault.contains(word)), "{fault}");
        }
        assert_eq!(wrong.len(), 3, "{wrong:?}");
    }

    #[test]
    fn an_interface_that_is_not_there_is_told_and_keeps_nobody_from_starting() {
        let trial = try_out("iface = 'nope0'");
        assert!(trial.mistakes.is_empty() && trial.warnings[0].starts_with("--iface nope0: "), "{trial:?}");
        assert_eq!(try_out("iface = 'lo'"), Trial::default());
    }

    #[test]
    fn a_file_that_the_service_cannot_read_is_told_with_the_command() {
        let folder = tempfile::tempdir().unwrap();
        let key = copy(folder.path(), "client.key", 0o600);
        let owner = fs::metadata(&key).unwrap();
        let reader = |uid: u32, gid: u32| FileReader {
            name: "meshd".to_owned(),
            uid: Uid::from_raw(uid),
            groups: vec![Gid::from_raw(gid)],
        };
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let stranger = reader(owner.uid() + 1, owner.gid() + 1);
        let fault = stranger.fault(&key).unwrap();
        assert!(fault.contains("cannot enter") && fault.contains("chmod o+x"), "the folder is 0700: {fault}");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let fault = stranger.fault(&key).unwrap();
        assert!(fault.ends_with(&format!("chown meshd: {}", key.display())), "{fault}");
        assert_eq!(reader(owner.uid(), owner.gid() + 1).fault(&key), None);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(reader(owner.uid() + 1, owner.gid()).fault(&key), None);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o044)).unwrap();
        assert!(reader(owner.uid(), owner.gid()).fault(&key).is_some(), "an owner has the owner's rights alone");
    }

    #[test]
    fn a_key_that_the_daemon_cannot_use_is_refused_as_it_would_be() {
        let folder = tempfile::tempdir().unwrap();
        let (key, cert) = (folder.path().join("p521.key"), folder.path().join("p521.pem"));
        let made = std::process::Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-521",
                "-nodes",
                "-subj",
                "/CN=a",
                "-keyout",
            ])
            .args([&key, Path::new("-out"), &cert])
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let tls = |cert: &Path, key: &Path| {
            let (cert, key) = (cert.display(), key.display());
            try_out(&format!("etcd-cafile = '{TLS}/ca.pem'\netcd-certfile = '{cert}'\netcd-keyfile = '{key}'\n"))
                .mistakes
        };
        let client = |name: &str| Path::new(TLS).join(name);
        let of_tls =
            |mistakes: Vec<String>| mistakes.into_iter().filter(|fault| fault.contains("rejected")).collect::<Vec<_>>();
        assert_eq!(of_tls(tls(&client("client.pem"), &client("client.key"))), [""; 0]);
        for (cert, key) in [(&cert, &key), (&cert, &client("client.key"))] {
            let refused = of_tls(tls(cert, key));
            assert!(refused.len() == 1 && refused[0].contains("P-256"), "{refused:?}");
        }
    }
}
