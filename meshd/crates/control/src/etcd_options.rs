//! Connection options for etcd: members, TLS, user. Reports all errors at once.

use std::{
    fmt, fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

/// Where etcd is and how to speak to it.
#[derive(Debug, Clone)]
pub struct EtcdOptions {
    /// Members, each `http://HOST:PORT`, `https://HOST:PORT` or `HOST:PORT` (https when `tls` is set, else http).
    pub endpoints: Vec<String>,
    /// File that `endpoints` were read from, see [`endpoints_in`]. Read again for each connection; a running daemon
    /// connects again when it changes.
    pub endpoints_file: Option<PathBuf>,
    /// Prefix of every key, `/meshd` by default; a slash at its end is dropped.
    pub prefix: String,
    /// TLS files. Read anew for each connection; one that has changed makes a running daemon connect anew.
    pub tls: TlsFiles,
    /// etcd user and password.
    pub user: Option<Credentials>,
    /// Allows plain http to members that are not on this machine.
    pub allow_plaintext: bool,
}

/// PEM files for TLS to etcd.
#[derive(Debug, Clone, Default)]
pub struct TlsFiles {
    /// Certificate authorities to trust. Works without a client certificate.
    pub ca: Option<PathBuf>,
    /// The client's certificate; needs `key`.
    pub cert: Option<PathBuf>,
    /// The client's private key; needs `cert`.
    pub key: Option<PathBuf>,
}

/// An etcd user. `Debug` does not print the password.
#[derive(Clone)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    password: Password,
}

#[derive(Clone)]
enum Password {
    Given(Zeroizing<String>),
    /// Read anew for each connection.
    InFile(PathBuf),
}

/// What is wrong with [`EtcdOptions`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EtcdOptionsError {
    /// No member was given.
    #[error("no etcd endpoint given (--etcd-endpoints)")]
    NoEndpoints,
    /// More members than anyone runs.
    #[error("{0} etcd endpoints given, at most 64 are allowed")]
    TooManyEndpoints(usize),
    /// Not a URL of a member.
    #[error("etcd endpoint {endpoint:?}: {reason}")]
    Endpoint {
        /// As it was given, without any credentials it held.
        endpoint: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// Plain http to another machine without leave.
    #[error(
        "etcd endpoint {0:?} is plain http to another machine, so anyone on the way could control the mesh: use \
         https, or set --etcd-allow-plaintext"
    )]
    Plaintext(String),
    /// Plain http although TLS files are given.
    #[error("etcd endpoint {0:?} is plain http, but TLS files are given: use https://")]
    PlaintextWithTls(String),
    /// One of certificate and key is missing.
    #[error("--etcd-certfile and --etcd-keyfile must be given together")]
    HalfIdentity,
    /// A prefix that is not a clean path.
    #[error(
        "etcd prefix {0:?}: must start with \"/\", contain no empty part and be at most 256 bytes of printable ASCII"
    )]
    Prefix(String),
}

/// A member that passed the checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdMember {
    url: String,
    tls: bool,
}

impl EtcdMember {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether it is reached over TLS.
    #[must_use]
    pub(crate) const fn is_tls(&self) -> bool {
        self.tls
    }
}

impl fmt::Display for EtcdMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl Credentials {
    /// A user and its password.
    #[must_use]
    pub fn new(user: impl Into<String>, password: impl Into<String>) -> Self {
        Self { user: user.into(), password: Password::Given(Zeroizing::new(password.into())) }
    }

    /// A user whose password stands in `file`, on one line, and is read anew for each connection.
    ///
    /// # Errors
    /// When it cannot be read now.
    pub fn in_file(user: impl Into<String>, file: PathBuf) -> io::Result<Self> {
        let credentials = Self { user: user.into(), password: Password::InFile(file) };
        credentials.password().map(|_| credentials)
    }

    pub(crate) fn password(&self) -> io::Result<Zeroizing<String>> {
        match &self.password {
            Password::Given(password) => Ok(password.clone()),
            Password::InFile(file) => {
                let text = fs::read_to_string(file).map(Zeroizing::new)?;
                Ok(Zeroizing::new(text.trim_end_matches(['\r', '\n']).to_owned()))
            }
        }
    }

    /// The file that the password stands in.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match &self.password {
            Password::Given(_) => None,
            Password::InFile(file) => Some(file),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// The members in a file, separated by commas or white space.
///
/// # Errors
/// When it cannot be read.
pub fn endpoints_in(file: &Path) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(file)?;
    let endpoints = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|endpoint| !endpoint.is_empty());
    Ok(endpoints.map(str::to_owned).collect())
}

impl EtcdOptions {
    /// The options with the members that the file has now; with the ones known, if it is unreadable or has a mistake.
    #[must_use]
    pub fn reread(&self) -> Self {
        let file = self.endpoints_file.as_deref();
        let read = file.and_then(|file| Some(Self { endpoints: endpoints_in(file).ok()?, ..self.clone() }));
        read.filter(|read| read.check().is_ok()).unwrap_or_else(|| self.clone())
    }

    /// The members and the prefix (without a slash at its end), checked.
    ///
    /// # Errors
    /// Everything that is wrong, not only the first.
    pub fn check(&self) -> Result<(Vec<EtcdMember>, String), Vec<EtcdOptionsError>> {
        let mut errors = Vec::new();
        let mut members = Vec::new();
        if self.endpoints.is_empty() {
            errors.push(EtcdOptionsError::NoEndpoints);
        }
        if self.endpoints.len() > 64 {
            errors.push(EtcdOptionsError::TooManyEndpoints(self.endpoints.len()));
        }
        for endpoint in &self.endpoints {
            match self.check_endpoint(endpoint) {
                Ok(member) if members.contains(&member) => {}
                Ok(member) => members.push(member),
                Err(error) => errors.push(error),
            }
        }
        if self.tls.cert.is_some() != self.tls.key.is_some() {
            errors.push(EtcdOptionsError::HalfIdentity);
        }
        let prefix = check_prefix(&self.prefix).map_err(|error| errors.push(error));
        match prefix {
            Ok(prefix) if errors.is_empty() => Ok((members, prefix)),
            _ => Err(errors),
        }
    }

    fn check_endpoint(&self, endpoint: &str) -> Result<EtcdMember, EtcdOptionsError> {
        let has_tls = self.tls.ca.is_some() || self.tls.cert.is_some() || self.tls.key.is_some();
        let bad = |reason| EtcdOptionsError::Endpoint {
            // What stands before an `@` could be a password.
            endpoint: endpoint.rsplit('@').next().unwrap_or_default().chars().take(80).collect(),
            reason,
        };
        let (tls, rest) = match endpoint.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            Some(_) => return Err(bad("the scheme must be http or https")),
            None => (has_tls, endpoint),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains('@') {
            return Err(bad("must not contain credentials: use --etcd-username and --etcd-password-file"));
        }
        if rest.contains(['/', '?', '#']) {
            return Err(bad("a path is not allowed"));
        }
        let (host, port) =
            split_host_port(rest).ok_or_else(|| bad("must be HOST:PORT, with an IPv6 address in brackets"))?;
        if port.parse::<u16>().map_or(true, |port| port == 0) {
            return Err(bad("the port must be 1 to 65535"));
        }
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let named = !host.is_empty()
            && host.len() <= 253
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.' || b == b'_');
        if address.is_err() && !named {
            return Err(bad("the host is neither an IP address nor a DNS name"));
        }
        let here = address.map_or(host == "localhost", |address| address.to_canonical().is_loopback());
        let url = format!("{}://{rest}", if tls { "https" } else { "http" });
        if !tls && has_tls {
            return Err(EtcdOptionsError::PlaintextWithTls(url));
        }
        if !tls && !here && !self.allow_plaintext {
            return Err(EtcdOptionsError::Plaintext(url));
        }
        Ok(EtcdMember { url, tls })
    }
}

fn split_host_port(text: &str) -> Option<(&str, &str)> {
    let (host, port) = text.rsplit_once(':')?;
    let bracketed = host.starts_with('[') && host.ends_with(']');
    (bracketed || !host.contains(':')).then_some((host, port))
}

/// The prefix without a slash at its end, if it can be one.
///
/// # Errors
/// [`EtcdOptionsError::Prefix`].
pub fn check_prefix(given: &str) -> Result<String, EtcdOptionsError> {
    let prefix = given.strip_suffix('/').unwrap_or(given);
    if is_prefix(prefix) {
        Ok(prefix.to_owned())
    } else {
        Err(EtcdOptionsError::Prefix(given.chars().take(80).collect()))
    }
}

fn is_prefix(prefix: &str) -> bool {
    prefix.len() <= 256
        && prefix.strip_prefix('/').is_some_and(|rest| rest.split('/').all(|part| !part.is_empty()))
        && prefix.bytes().all(|b| b.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(endpoints: &[&str]) -> EtcdOptions {
        EtcdOptions {
            endpoints: endpoints.iter().map(|&e| e.to_owned()).collect(),
            endpoints_file: None,
            prefix: "/meshd/".into(),
            tls: TlsFiles::default(),
            user: None,
            allow_plaintext: false,
        }
    }

    #[test]
    fn plain_http_leaves_the_machine_only_with_leave() {
        for here in ["http://127.0.0.1:2379", "localhost:2379", "http://[::1]:2379/", "http://[::ffff:127.0.0.1]:2379"]
        {
            assert!(options(&[here]).check().is_ok(), "{here}");
        }
        let mut far = options(&["http://10.0.0.1:2379"]);
        assert!(matches!(far.check().unwrap_err()[..], [EtcdOptionsError::Plaintext(_)]));
        far.allow_plaintext = true;
        assert!(far.check().is_ok());
        assert!(options(&["https://etcd.example:2379"]).check().is_ok());
    }

    #[test]
    fn tls_files_make_https_the_default_and_refuse_http() {
        let mut tls = options(&["10.0.0.1:2379"]);
        tls.tls.ca = Some("/ca.pem".into());
        let (members, prefix) = tls.check().unwrap();
        assert_eq!(members[0].url(), "https://10.0.0.1:2379");
        assert_eq!(prefix, "/meshd");
        tls.endpoints = vec!["http://127.0.0.1:1".into()];
        assert!(matches!(tls.check().unwrap_err()[..], [EtcdOptionsError::PlaintextWithTls(_)]));
    }

    #[test]
    fn the_file_of_members_is_read_again_and_a_mistake_in_it_changes_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut options = options(&["https://a:1"]);
        options.endpoints_file = Some(file.path().to_owned());
        for (text, members) in [
            ("https://a:1,https://b:2\n", &["https://a:1", "https://b:2"][..]),
            ("https://c:3\nhttps://[fd00::1]:4\n", &["https://c:3", "https://[fd00::1]:4"]),
            ("https://d:4,nonsense", &["https://a:1"]),
            (" \n", &["https://a:1"]),
        ] {
            fs::write(file.path(), text).unwrap();
            assert_eq!(options.reread().endpoints, members, "{text:?}");
        }
        drop(file);
        assert_eq!(options.reread().endpoints, ["https://a:1"]);
    }

    #[test]
    fn every_mistake_is_reported_and_no_password_is_printed() {
        let mut all = options(&["ftp://x:1", "http://user:secret@h:1", "h", "http://fe80::1:2379", "h:0"]);
        all.tls.key = Some("/key.pem".into());
        all.prefix = "meshd".into();
        let errors = all.check().unwrap_err();
        assert_eq!(errors.len(), 7, "{errors:?}");
        assert!(!format!("{errors:?}").contains("secret"));
        let user = Credentials::new("root", "secret");
        assert!(!format!("{user:?}").contains("secret"));
    }
}
