//! Opens sessions, with TLS and user.

use std::{fs, io, os::unix::fs::MetadataExt as _, path::Path, sync::Arc, time::SystemTime};

use control_core::{
    types::{CallError, EtcdFailure, FailureKind},
    unreachable::remedy,
};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use zeroize::Zeroizing;

use super::{
    CALL_DEADLINE, Session,
    failure::{bounded, classify},
};
use crate::etcd_options::{Credentials, EtcdMember, EtcdOptions, EtcdOptionsError, TlsFiles};

/// Where certificate authorities are kept when the operator names none.
const SYSTEM_CA_BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Opens sessions: checked options.
#[derive(Debug, Clone)]
pub struct Dialer {
    options: EtcdOptions,
    members: Vec<EtcdMember>,
    prefix: Arc<str>,
}

/// The files of a dialer as they were at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConnectionFiles(Vec<Option<(u64, SystemTime, u64)>>);

/// Why a session could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A TLS file, or that of the password, could not be read.
    #[error("cannot read {path}: {source}")]
    File {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The TLS library does not take what is in the files.
    #[error("TLS files rejected: {0}")]
    Tls(String),
    /// The member did not answer, or refused.
    #[error(transparent)]
    Call(#[from] CallError),
}

impl From<&OpenError> for EtcdFailure {
    fn from(error: &OpenError) -> Self {
        let kind = match error {
            OpenError::File { .. } => FailureKind::File,
            OpenError::Tls(_) => FailureKind::TlsFiles,
            OpenError::Call(error) => return error.into(),
        };
        Self::new(kind, error.to_string())
    }
}

/// No member answers, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{member}: {error}")]
pub struct NoMember {
    /// The last one that was tried.
    member: EtcdMember,
    error: EtcdFailure,
    remedy: String,
}

impl NoMember {
    /// What to do.
    #[must_use]
    pub fn remedy(&self) -> &str {
        &self.remedy
    }
}

impl Dialer {
    /// A dialer for these options.
    ///
    /// # Errors
    /// Everything that is wrong with them.
    pub fn new(options: &EtcdOptions) -> Result<Self, Vec<EtcdOptionsError>> {
        let (members, prefix) = options.check()?;
        Ok(Self { options: options.clone(), members, prefix: prefix.into() })
    }

    /// Reads the file of the members again, if they came from one. Whether there are others now.
    pub fn reread_members(&mut self) -> bool {
        let options = self.options.reread();
        let Ok((members, _)) = options.check() else { return false };
        self.options = options;
        let changed = members != self.members;
        self.members = members;
        changed
    }

    /// The members, at least one.
    #[must_use]
    pub fn members(&self) -> &[EtcdMember] {
        &self.members
    }

    /// The prefix of every key, without a slash at its end.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Connects to `member` and authenticates; `generation` is only handed on.
    ///
    /// # Errors
    /// When a file cannot be read or the member does not answer in time.
    pub async fn open(&self, member: &EtcdMember, generation: u64) -> Result<Session, OpenError> {
        let mut options = self.connect_options(member).await?;
        if let Some(user) = &self.options.user {
            let password = user.password().map_err(|source| OpenError::File {
                path: user.file().map_or_else(String::new, |file| file.display().to_string()),
                source,
            })?;
            options = options.with_user(user.user.clone(), password.as_str());
        }
        let client = connect(member, options).await?;
        Ok(Session { client, member: member.clone(), prefix: Arc::clone(&self.prefix), generation })
    }

    /// Reads the TLS files and builds from them what a session is opened with; sends nothing.
    ///
    /// # Errors
    /// When a file cannot be read, or the TLS library does not take what is in it.
    pub async fn try_tls(&self) -> Result<(), OpenError> {
        let Some(member) = self.members.iter().find(|member| member.is_tls()) else { return Ok(()) };
        // Without a user nothing is asked of the member.
        connect(member, self.connect_options(member).await?).await.map(|_| ())
    }

    async fn connect_options(&self, member: &EtcdMember) -> Result<ConnectOptions, OpenError> {
        let options = ConnectOptions::new().with_connect_timeout(CALL_DEADLINE).with_require_leader(true);
        Ok(if member.is_tls() { options.with_tls(tls_options(&self.options.tls).await?) } else { options })
    }

    /// Changes when one of the files that a session is opened with does.
    pub(crate) fn files(&self) -> ConnectionFiles {
        let tls = &self.options.tls;
        let files = [&tls.ca, &tls.cert, &tls.key, &self.options.endpoints_file].map(|file| file.as_deref());
        let password = self.options.user.as_ref().and_then(Credentials::file);
        let stamp = |file: &Path| {
            let data = fs::metadata(file).ok()?;
            // A renewed file has another number where it is renamed into place, and another time where it is rewritten.
            Some((data.ino(), data.modified().ok()?, data.len()))
        };
        ConnectionFiles(files.into_iter().chain([password]).map(|file| file.and_then(stamp)).collect())
    }

    /// A session with the first member that answers, for a tool that makes a few calls and ends.
    ///
    /// # Errors
    /// When none answers: what came of the last one.
    pub async fn open_any(&self) -> Result<Session, NoMember> {
        let mut last = None;
        for member in &self.members {
            let answered = async {
                let session = self.open(member, 0).await?;
                session.list_below("config").await?;
                Ok::<_, OpenError>(session)
            };
            match answered.await {
                Ok(session) => return Ok(session),
                Err(error) => last = Some((member.clone(), EtcdFailure::from(&error))),
            }
        }
        let (member, error) = last.unwrap_or_else(|| unreachable!("checked options have a member"));
        let remedy = remedy(error.kind, member.url());
        Err(NoMember { member, error, remedy })
    }
}

async fn connect(member: &EtcdMember, options: ConnectOptions) -> Result<Client, OpenError> {
    let connected = bounded(Client::connect([member.url()], Some(options))).await;
    connected.map_err(|failure| match failure.of_tls_files() {
        Some(reason) => OpenError::Tls(reason),
        None => classify(failure).into(),
    })
}

async fn tls_options(files: &TlsFiles) -> Result<TlsOptions, OpenError> {
    let mut options = TlsOptions::new();
    match &files.ca {
        Some(path) => options = options.ca_certificate(Certificate::from_pem(read(path).await?)),
        None => {
            for path in SYSTEM_CA_BUNDLES.map(Path::new) {
                if let Ok(bundle) = tokio::fs::read(path).await {
                    options = options.ca_certificate(Certificate::from_pem(bundle));
                    break;
                }
            }
        }
    }
    if let (Some(cert), Some(key)) = (&files.cert, &files.key) {
        let key = Zeroizing::new(read(key).await?);
        options = options.identity(Identity::from_pem(read(cert).await?, key.as_slice()));
    }
    Ok(options)
}

async fn read(path: &Path) -> Result<Vec<u8>, OpenError> {
    tokio::fs::read(path).await.map_err(|source| OpenError::File { path: path.display().to_string(), source })
}
