//! The flags that say how etcd is reached, and their variables: the same for every program that talks to it.

use std::path::PathBuf;

use clap::{Args, builder::BoolishValueParser};
use control::etcd_options::{Credentials, EtcdOptions, TlsFiles, endpoints_in};
use serde::Deserialize;

const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:2379";

/// How etcd is reached.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(default)]
#[group(skip)]
pub struct EtcdFlags {
    /// Members of the etcd cluster, tried one at a time in random order until one answers [default:
    /// http://127.0.0.1:2379]
    #[arg(long = "etcd-endpoints", env = "MESHD_ETCD_ENDPOINTS", value_name = "URL,URL", value_delimiter = ',')]
    #[serde(rename = "etcd-endpoints")]
    pub endpoints: Option<Vec<String>>,
    /// File with the members, in place of --etcd-endpoints; read again for each connection
    #[arg(long = "etcd-endpoints-file", env = "MESHD_ETCD_ENDPOINTS_FILE", value_name = "FILE")]
    #[serde(rename = "etcd-endpoints-file")]
    pub endpoints_file: Option<PathBuf>,
    /// Prefix of all keys of this mesh in etcd; the same on every node [default: /meshd]
    #[arg(long = "etcd-prefix", env = "MESHD_ETCD_PREFIX", value_name = "PREFIX")]
    #[serde(rename = "etcd-prefix")]
    pub prefix: Option<String>,
    /// CA certificates (PEM) to verify etcd's server certificate, for https
    #[arg(long = "etcd-cafile", env = "MESHD_ETCD_CAFILE", value_name = "FILE")]
    #[serde(rename = "etcd-cafile")]
    pub cafile: Option<PathBuf>,
    /// Client certificate (PEM) for etcd; needs --etcd-keyfile
    #[arg(long = "etcd-certfile", env = "MESHD_ETCD_CERTFILE", value_name = "FILE")]
    #[serde(rename = "etcd-certfile")]
    pub certfile: Option<PathBuf>,
    /// Private key (PEM) of the client certificate
    #[arg(long = "etcd-keyfile", env = "MESHD_ETCD_KEYFILE", value_name = "FILE")]
    #[serde(rename = "etcd-keyfile")]
    pub keyfile: Option<PathBuf>,
    /// etcd user; needs --etcd-password-file
    #[arg(long = "etcd-username", env = "MESHD_ETCD_USERNAME", value_name = "USER")]
    #[serde(rename = "etcd-username")]
    pub username: Option<String>,
    /// File with the etcd user's password and nothing else
    #[arg(long = "etcd-password-file", env = "MESHD_ETCD_PASSWORD_FILE", value_name = "FILE")]
    #[serde(rename = "etcd-password-file")]
    pub password_file: Option<PathBuf>,
    /// Allow plain http to etcd on other machines. Anyone who can change that traffic controls the mesh
    #[arg(
        long = "etcd-allow-plaintext", env = "MESHD_ETCD_ALLOW_PLAINTEXT", value_name = "true|false", value_parser = BoolishValueParser::new(),
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    #[serde(rename = "etcd-allow-plaintext")]
    pub allow_plaintext: Option<bool>,
}

impl EtcdFlags {
    /// Whether they say who it is that asks.
    #[must_use]
    pub const fn has_identity(&self) -> bool {
        self.certfile.is_some() || self.keyfile.is_some() || self.username.is_some() || self.password_file.is_some()
    }

    /// The same for no particular user.
    #[must_use]
    pub fn without_identity(self) -> Self {
        Self { certfile: None, keyfile: None, username: None, password_file: None, ..self }
    }

    /// These flags, and `below` where they say nothing.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        // The members come from one place.
        let (endpoints, endpoints_file) = match (self.endpoints, self.endpoints_file) {
            (None, None) => (below.endpoints, below.endpoints_file),
            given => given,
        };
        Self {
            endpoints,
            endpoints_file,
            prefix: self.prefix.or(below.prefix),
            cafile: self.cafile.or(below.cafile),
            certfile: self.certfile.or(below.certfile),
            keyfile: self.keyfile.or(below.keyfile),
            username: self.username.or(below.username),
            password_file: self.password_file.or(below.password_file),
            allow_plaintext: self.allow_plaintext.or(below.allow_plaintext),
        }
    }

    /// The members that they name, none where the file cannot be read.
    #[must_use]
    pub fn given_endpoints(&self) -> Vec<String> {
        let read = || endpoints_in(self.endpoints_file.as_deref()?).ok();
        self.endpoints.clone().or_else(read).unwrap_or_default()
    }

    /// What they say of etcd; each mistake is added to `mistakes`.
    pub fn check(self, mistakes: &mut Vec<String>) -> EtcdOptions {
        let endpoints = match (self.endpoints, &self.endpoints_file) {
            (Some(endpoints), None) => endpoints,
            (None, Some(file)) => endpoints_in(file).unwrap_or_else(|error| {
                mistakes.push(format!("--etcd-endpoints-file {}: {error}", file.display()));
                vec![DEFAULT_ENDPOINT.to_owned()]
            }),
            (None, None) => vec![DEFAULT_ENDPOINT.to_owned()],
            (Some(endpoints), Some(_)) => {
                mistakes.push("--etcd-endpoints and --etcd-endpoints-file: give one of them".to_owned());
                endpoints
            }
        };
        let user = match (self.username, self.password_file) {
            (Some(user), Some(file)) => match Credentials::in_file(user, file.clone()) {
                Ok(credentials) => Some(credentials),
                Err(error) => {
                    mistakes.push(format!("--etcd-password-file {}: {error}", file.display()));
                    None
                }
            },
            (None, None) => None,
            (Some(_), None) => {
                mistakes.push("--etcd-username: needs --etcd-password-file too".to_owned());
                None
            }
            (None, Some(_)) => {
                mistakes.push("--etcd-password-file: needs --etcd-username too".to_owned());
                None
            }
        };
        for (flag, file) in
            [("--etcd-cafile", &self.cafile), ("--etcd-certfile", &self.certfile), ("--etcd-keyfile", &self.keyfile)]
        {
            if let Some(file) = file.as_ref().filter(|file| !file.is_file()) {
                mistakes.push(format!("{flag} {}: no such file", file.display()));
            }
        }
        let options = EtcdOptions {
            endpoints: endpoints.iter().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()).collect(),
            endpoints_file: self.endpoints_file,
            prefix: self.prefix.unwrap_or_else(|| "/meshd".to_owned()),
            tls: TlsFiles { ca: self.cafile, cert: self.certfile, key: self.keyfile },
            user,
            allow_plaintext: self.allow_plaintext.unwrap_or_default(),
        };
        if let Err(errors) = options.check() {
            mistakes.extend(errors.iter().map(ToString::to_string));
        }
        options
    }
}
