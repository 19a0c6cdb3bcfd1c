//! The client, for `meshctl`: one blocking request per connection.

use std::{
    io::{self, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cni::http;
use serde::de::DeserializeOwned;
use text::printable;

/// How long a write may take, and an answer that depends on the daemon alone.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long an answer may take that depends on others'. The daemon ends a connection after a minute.
const SLOW: Duration = Duration::from_secs(58);
/// Longest answer that is read; 5,000 peers need about 2 MB.
const MAX_ANSWER: usize = 64 << 20;

/// Speaks to the daemon's socket.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens.
    #[error("the daemon is not reachable at {socket}: {source}; is `meshd run` up, with the same --run-dir?")]
    Unreachable {
        /// The socket.
        socket: String,
        /// The system's error.
        source: io::Error,
    },
    /// The socket is not for this user.
    #[error(
        "permission denied on {0}: use sudo, or add the user to the group meshd (usermod -aG meshd USER) and log in \
         again"
    )]
    NotAllowed(String),
    /// This user may look, and change nothing.
    #[error("permission denied: {0}")]
    Denied(String),
    /// The connection broke.
    #[error("the daemon at {socket} did not answer: {source}")]
    Broken {
        /// The socket.
        socket: String,
        /// The system's error.
        source: io::Error,
    },
    /// The daemon has no such object.
    #[error("{0}")]
    NotFound(String),
    /// The daemon refused the request as malformed.
    #[error("{0}")]
    Invalid(String),
    /// The response is not HTTP/1.1 200 with JSON.
    #[error("the daemon's answer is not understood ({0}); are meshd and meshctl of one version?")]
    Malformed(String),
}

impl Client {
    /// A client of the daemon that has `run_dir`.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        Self { socket: run_dir.join(super::SOCKET) }
    }

    /// `GET path`, as JSON.
    ///
    /// # Errors
    /// When there is no such answer.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        Self::read(&self.get_text(path)?)
    }

    /// [`get`](Self::get) with a longer deadline, for requests that make the daemon query others.
    ///
    /// # Errors
    /// When there is no such answer.
    pub fn get_slowly<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        Self::read(&self.get_text_within(path, SLOW)?)
    }

    fn read<T: DeserializeOwned>(text: &str) -> Result<T, ClientError> {
        serde_json::from_str(text).map_err(|error| ClientError::Malformed(error.to_string()))
    }

    /// `GET path`, as it is.
    ///
    /// # Errors
    /// When there is no such answer.
    pub fn get_text(&self, path: &str) -> Result<String, ClientError> {
        self.get_text_within(path, TIMEOUT)
    }

    /// `POST path` without a body.
    ///
    /// # Errors
    /// When it was not done, or there is no answer.
    pub fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        Self::read(&self.request("POST", path, TIMEOUT)?)
    }

    fn get_text_within(&self, path: &str, patience: Duration) -> Result<String, ClientError> {
        self.request("GET", path, patience)
    }

    fn request(&self, method: &str, path: &str, patience: Duration) -> Result<String, ClientError> {
        let socket = || self.socket.display().to_string();
        let mut stream = UnixStream::connect(&self.socket).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::NotAllowed(socket()),
            _ => ClientError::Unreachable { socket: socket(), source },
        })?;
        let broken = |source| ClientError::Broken { socket: socket(), source };
        stream.set_write_timeout(Some(TIMEOUT)).map_err(broken)?;
        stream.write_all(http::request(method, path, None).as_bytes()).map_err(broken)?;
        let answer = http::read_until(&mut stream, Instant::now() + patience, MAX_ANSWER).map_err(broken)?;
        let answer = http::parse(&answer).ok_or_else(|| ClientError::Malformed("no header".to_owned()))?;
        let told = || printable(answer.body.trim_end()).into_owned();
        match answer.code {
            "200" => Ok(answer.body.to_owned()),
            "400" => Err(ClientError::Invalid(told())),
            "403" => Err(ClientError::Denied(told())),
            "404" => Err(ClientError::NotFound(told())),
            _ => Err(ClientError::Malformed(printable(answer.status).into_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        os::unix::{fs::symlink, net::UnixListener},
        thread,
    };

    use super::*;

    /// The user `meshd` can put a link in the socket's place, and `meshctl` may run as root.
    #[test]
    fn a_link_gets_the_fixed_request_alone_and_its_answer_is_escaped() {
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("other.sock");
        symlink(&other, folder.path().join(super::super::SOCKET)).unwrap();
        let listener = UnixListener::bind(&other).unwrap();
        let server = thread::spawn(move || -> Vec<String> {
            let answers = ["HTTP/1.1 400 x\r\n\r\n\x1b[2J\u{202e}owned", "HTTP/1.1 \x1b[2J x\r\n\r\n", "\x1b[2J"];
            let ask = |answer: &str| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut asked = Vec::new();
                while !asked.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    asked.extend(byte);
                }
                stream.write_all(answer.as_bytes()).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                // Nothing follows the request.
                stream.read_to_end(&mut asked).unwrap();
                String::from_utf8(asked).unwrap()
            };
            answers.map(ask).to_vec()
        });
        let client = Client::new(folder.path());
        let errors: Vec<ClientError> = vec![
            client.get_text("/v1/status").unwrap_err(),
            client.get_slowly::<()>("/v1/doctor").unwrap_err(),
            client.post::<()>("/v1/etcd/accept").unwrap_err(),
        ];
        let asked = |line: &str| format!("{line} HTTP/1.0\r\nHost: meshd\r\n\r\n");
        assert_eq!(server.join().unwrap(), ["GET /v1/status", "GET /v1/doctor", "POST /v1/etcd/accept"].map(asked),);
        for error in errors {
            let text = error.to_string();
            assert_eq!(printable(&text), text);
        }
    }
}
