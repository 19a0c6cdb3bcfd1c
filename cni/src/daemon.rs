//! Protocol between plugin and node daemon over `RUN/meshd.sock`: HTTP/1 with JSON.
//!
//! ```text
//! POST   /v1/attachments/CONTAINER/IFNAME   BeginAdd → Begun     ADD begins: the daemon records it, allocates addresses
//! PUT    /v1/attachments/CONTAINER/IFNAME   Attach → 204         addresses are known; returns once policy is in force
//! DELETE /v1/attachments/CONTAINER/IFNAME   → 204                also if it does not exist; frees its addresses
//! GET    /v1/attachments/CONTAINER/IFNAME   → Attached
//! GET    /v1/attachments                    → [Attached]
//! GET    /v1/attachments-ready              → Network            as for BeginAdd, and policy is programmed
//! POST   /v1/attachments-ready              AddressRequest → Network     and such addresses are free
//! ```
//!
//! If the daemon does not answer, DEL leaves a tombstone beside the attachment's file, which the daemon processes
//! later: [`DaemonClient::forget`].
//!
//! Every error response carries a [`Refusal`]. Readers ignore unknown fields, and writers keep all fields of earlier
//! versions: during an upgrade, daemon and plugin may have different versions.

mod protocol;

use std::{
    io::{self, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use atomic_file::{FileError, Folder};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    environment::AttachmentName,
    error::{CniError, Code},
    http,
};

pub use protocol::{
    AddressRange, AddressRequest, Attach, Attached, Begin, BeginAdd, Begun, Network, PodReference, Refusal,
    RefusalReason,
};

/// Name of the daemon's socket in its run directory.
pub const SOCKET: &str = "meshd.sock";
/// Name of the folder in the run directory where the daemon keeps a file per attachment.
pub const RECORDS: &str = "attachments";
/// Begins the name of a tombstone in that folder. No container id begins with a dot.
const TOMBSTONE: &str = ".deleted@";
/// How long the daemon may wait for policy to be in force before it answers `PUT`.
pub const ENFORCEMENT: Duration = Duration::from_secs(10);
/// The deadline of a request: longer than the daemon itself waits.
const DEADLINE: Duration = Duration::from_secs(15);
/// How long a daemon that starts again is waited for.
const RESTART: Duration = Duration::from_secs(3);
/// How often a daemon may end while it works on a request that is made again then.
const RESTARTS: u32 = 2;
/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(50);
/// Longest answer that is read.
const MAX_ANSWER: usize = 16 << 20;

/// Speaks to the daemon, one connection a request.
#[derive(Debug, Clone)]
pub struct DaemonClient {
    socket: PathBuf,
    run_dir: PathBuf,
    patience: Duration,
}

/// A failed or refused request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// Nobody listens.
    #[error("the daemon is not reachable at {socket}: {source}")]
    Unreachable {
        /// The socket.
        socket: String,
        /// The system's error.
        source: io::Error,
    },
    /// The connection broke, or there was no answer in time.
    #[error("the daemon at {socket} did not answer: {source}")]
    Broken {
        /// The socket.
        socket: String,
        /// The system's error.
        source: io::Error,
    },
    /// The daemon refused the request.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// The response cannot be parsed.
    #[error("the daemon's answer is not understood: {0}")]
    Malformed(String),
}

impl From<DaemonError> for CniError {
    fn from(error: DaemonError) -> Self {
        let message = error.to_string();
        let (code, details) = match &error {
            DaemonError::Unreachable { .. } => {
                (Code::DaemonUnreachable, "check that `meshd run` is up and that runDir is its --run-dir")
            }
            DaemonError::Broken { .. } => (Code::DaemonUnreachable, "see the daemon's log"),
            DaemonError::Malformed(_) => (Code::DaemonDiffers, "check that meshd and meshd-cni have the same version"),
            DaemonError::Refused(refusal) => match refusal.code {
                RefusalReason::Invalid | RefusalReason::Denied => (Code::InvalidConfig, ""),
                RefusalReason::NotFound => (Code::UnknownContainer, ""),
                RefusalReason::NoSubnet => (Code::NoSubnet, "see `meshctl status`"),
                RefusalReason::NoAddress => (Code::NoAddress, "DEL of containers, or GC, frees addresses"),
                RefusalReason::NotInForce | RefusalReason::Conflict => (Code::TryAgainLater, "see `meshctl status`"),
                RefusalReason::Failed => (Code::TryAgainLater, "see the daemon's log"),
                RefusalReason::Other => (Code::DaemonDiffers, "check that meshd and meshd-cni have the same version"),
            },
        };
        Self::new(code, message).details(details)
    }
}

impl DaemonClient {
    /// A client of the daemon that has `run_dir`. It waits for a daemon that is just being started again.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        Self { socket: run_dir.join(SOCKET), run_dir: run_dir.to_owned(), patience: RESTART }
    }

    /// A client that does not wait for a restarting daemon.
    #[must_use]
    pub fn impatient(self) -> Self {
        Self { patience: Duration::ZERO, ..self }
    }

    /// Begins an ADD.
    ///
    /// # Errors
    /// When there is no such answer.
    pub fn begin(&self, name: &AttachmentName, begin: &BeginAdd) -> Result<Begun, DaemonError> {
        self.call("POST", &path(name), Some(begin))
    }

    /// Ends an ADD. The daemon puts policy in force for it while the caller goes on, until it needs the answer.
    ///
    /// # Errors
    /// When there is no JSON for it.
    pub fn attach(&self, name: &AttachmentName, attach: &Attach) -> Result<Attaching<'_>, DaemonError> {
        Ok(Attaching(self.ask("PUT", &path(name), Some(attach))?))
    }

    /// Withdraws an attachment; one that is not there is no error.
    ///
    /// # Errors
    /// When there is no such answer.
    pub fn detach(&self, name: &AttachmentName) -> Result<(), DaemonError> {
        self.request("DELETE", &path(name), None::<&()>).map(drop)
    }

    /// Withdraws an attachment without the daemon: removes its file, and leaves a tombstone for a daemon that has read
    /// it already, or has only stopped answering. Without the daemon's folder there is nothing to withdraw.
    ///
    /// # Errors
    /// When the tombstone cannot be written, or the file cannot be removed; also when a link or anything else is in the
    /// place of the folder or the tombstone.
    pub fn forget(&self, name: &AttachmentName) -> Result<(), FileError> {
        let records = match Folder::open(&self.run_dir).map_err(FileError::from).and_then(|run| run.folder(RECORDS)) {
            Err(error) if error.is_not_found() => return Ok(()),
            records => records?,
        };
        records.open_or_create(&tombstone_file(name), 0o600)?;
        records.remove(&record_file(name))?;
        Ok(())
    }

    /// Reads one attachment.
    ///
    /// # Errors
    /// When there is no such answer.
    pub fn attachment(&self, name: &AttachmentName) -> Result<Attached, DaemonError> {
        self.call("GET", &path(name), None::<&()>)
    }

    /// All attachments.
    ///
    /// # Errors
    /// When there is no such answer.
    pub fn attachments(&self) -> Result<Vec<Attached>, DaemonError> {
        self.call("GET", "/v1/attachments", None::<&()>)
    }

    /// Whether an ADD would be taken now.
    ///
    /// # Errors
    /// When there is no such answer: the reason why not.
    pub fn ready(&self) -> Result<Network, DaemonError> {
        self.call("GET", "/v1/attachments-ready", None::<&()>)
    }

    /// Whether an ADD that needs these addresses would be taken now.
    ///
    /// # Errors
    /// When there is no such answer: the reason why not.
    pub fn ready_with(&self, request: &AddressRequest) -> Result<Network, DaemonError> {
        self.call("POST", "/v1/attachments-ready", Some(request))
    }

    fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, DaemonError> {
        let answer = self.request(method, path, body)?;
        serde_json::from_str(&answer).map_err(|error| DaemonError::Malformed(error.to_string()))
    }

    fn request(&self, method: &str, path: &str, body: Option<&impl Serialize>) -> Result<String, DaemonError> {
        self.ask(method, path, body)?.answer()
    }

    /// Sends a request. If the connection fails before the daemon takes it, the error says so.
    fn ask(&self, method: &str, path: &str, body: Option<&impl Serialize>) -> Result<Asked<'_>, DaemonError> {
        let body = match body {
            Some(body) => serde_json::to_string(body).map_err(|error| DaemonError::Malformed(error.to_string()))?,
            None => String::new(),
        };
        let (text, end) = (http::request(method, path, Some(&body)), Instant::now() + DEADLINE);
        let sent = self.send(&text);
        Ok(Asked { client: self, text, end, sent })
    }

    fn send(&self, text: &str) -> Result<UnixStream, DaemonError> {
        let mut stream = self.connect()?;
        let written = stream.set_write_timeout(Some(DEADLINE)).and_then(|()| stream.write_all(text.as_bytes()));
        written.map_err(|error| self.broken(error))?;
        Ok(stream)
    }

    fn receive(&self, mut stream: UnixStream, end: Instant) -> Result<String, DaemonError> {
        let answer = http::read_until(&mut stream, end, MAX_ANSWER).map_err(|error| self.broken(error))?;
        let answer = http::parse(&answer).ok_or_else(|| self.broken(io::ErrorKind::UnexpectedEof.into()))?;
        match answer.code {
            "200" | "204" => Ok(answer.body.to_owned()),
            _ => Err(serde_json::from_str(answer.body)
                .map_or_else(|_| DaemonError::Malformed(answer.status.to_owned()), DaemonError::Refused)),
        }
    }

    fn broken(&self, source: io::Error) -> DaemonError {
        DaemonError::Broken { socket: self.socket.display().to_string(), source }
    }

    fn connect(&self) -> Result<UnixStream, DaemonError> {
        let end = Instant::now() + self.patience;
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => return Ok(stream),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
                        && Instant::now() < end =>
                {
                    std::thread::sleep(PAUSE);
                }
                Err(source) => {
                    return Err(DaemonError::Unreachable { socket: self.socket.display().to_string(), source });
                }
            }
        }
    }
}

/// An ADD whose end was sent to the daemon.
#[derive(Debug)]
#[must_use = "policy is in force only once the daemon has answered"]
pub struct Attaching<'a>(Asked<'a>);

impl Attaching<'_> {
    /// Returns once policy is in force.
    ///
    /// # Errors
    /// When there is no such answer.
    pub fn in_force(self) -> Result<(), DaemonError> {
        self.0.answer().map(drop)
    }
}

/// A request that waits for its answer.
#[derive(Debug)]
struct Asked<'a> {
    client: &'a DaemonClient,
    text: String,
    /// When it has taken too long.
    end: Instant,
    sent: Result<UnixStream, DaemonError>,
}

impl Asked<'_> {
    fn answer(self) -> Result<String, DaemonError> {
        let Self { client, text, end, mut sent } = self;
        let mut restarts = if client.patience.is_zero() { 0 } else { RESTARTS };
        loop {
            match sent.and_then(|stream| client.receive(stream, end)) {
                // Every request may be made twice.
                Err(DaemonError::Broken { source, .. }) if restarts > 0 && hung_up(&source) => restarts -= 1,
                answer => return answer,
            }
            sent = client.send(&text);
        }
    }
}

/// Name of the file that the daemon keeps an attachment in, below [`RECORDS`]. No container id has an `@`.
#[must_use]
pub fn record_file(name: &AttachmentName) -> String {
    format!("{}@{}", name.container_id, name.ifname)
}

/// The attachment that a file of this name would be the record of. Its parts need not be valid.
#[must_use]
pub fn recorded_by(file: &str) -> Option<AttachmentName> {
    let (container_id, ifname) = file.split_once('@')?;
    Some(AttachmentName { container_id: container_id.to_owned(), ifname: ifname.to_owned() })
}

/// Name of the tombstone by which a DEL without the daemon withdraws an attachment, below [`RECORDS`].
#[must_use]
pub fn tombstone_file(name: &AttachmentName) -> String {
    format!("{TOMBSTONE}{}", record_file(name))
}

/// The attachment that a file of this name is a tombstone of.
#[must_use]
pub fn withdrawn_by(file: &str) -> Option<AttachmentName> {
    recorded_by(file.strip_prefix(TOMBSTONE)?)
}

fn path(name: &AttachmentName) -> String {
    // An interface's name may have characters that mean something in a URL.
    let escaped: String = name
        .ifname
        .bytes()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect();
    format!("/v1/attachments/{}/{escaped}", name.container_id)
}

/// Whether the peer closed the connection, as a daemon does that is killed.
fn hung_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::unix::net::UnixListener};

    use super::*;

    fn name() -> AttachmentName {
        AttachmentName { container_id: "c1".to_owned(), ifname: "e#0".to_owned() }
    }

    /// A client that waits for as long as a busy machine may need.
    fn patient(run_dir: &Path) -> DaemonClient {
        DaemonClient { patience: Duration::from_secs(60), ..DaemonClient::new(run_dir) }
    }

    /// What a client makes of this answer, and what it asked.
    fn told(answer: &'static str) -> (Result<Attached, DaemonError>, String) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = vec![0; 4096];
            let read = stream.read(&mut asked).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&asked[..read]).into_owned()
        });
        let result = DaemonClient::new(dir.path()).impatient().attachment(&name());
        (result, server.join().unwrap())
    }

    #[test]
    fn an_answer_with_more_fields_than_known_is_read() {
        let (answer, asked) = told(
            "HTTP/1.1 200 OK\r\n\r\n{\"containerId\":\"c1\",\"ifname\":\"e#0\",\"network\":\"n\",\"netns\":\"/x\",\"bootId\":\"b\",\"new\":{}}",
        );
        assert_eq!(answer.unwrap().begin.network, "n");
        assert!(asked.starts_with("GET /v1/attachments/c1/e%230 HTTP/1.0\r\n"), "{asked}");
    }

    #[test]
    fn an_attachment_of_an_earlier_plugin_is_read_and_written_as_it_was() {
        let earlier = serde_json::json!({
            "pod": {"namespace": "shop", "name": "db"}, "addresses": ["10.244.3.7"], "interface": "v"
        });
        let attach: Attach = serde_json::from_value(earlier.clone()).unwrap();
        assert_eq!((attach.mac, &attach.allowed_sources[..]), (None, &[][..]));
        assert_eq!(serde_json::to_value(&attach).unwrap(), earlier);
        let now = Attach {
            mac: Some([2, 0, 0, 0, 0, 0xab]),
            allowed_sources: vec!["192.168.7.0/24".parse().unwrap()],
            ..attach
        };
        let written = serde_json::to_value(&now).unwrap();
        assert_eq!(
            (&written["mac"], &written["allowedSources"][0]),
            (&"02:00:00:00:00:ab".into(), &"192.168.7.0/24".into())
        );
        assert_eq!(serde_json::from_value::<Attach>(written).unwrap(), now);
    }

    #[test]
    fn refusals_become_codes() {
        let code = |answer| CniError::from(told(answer).0.unwrap_err()).code;
        let refused = "HTTP/1.1 503 x\r\n\r\n{\"code\":\"no_subnet\",\"message\":\"m\"}";
        assert_eq!(code(refused), Code::NoSubnet);
        assert_eq!(code("HTTP/1.1 503 x\r\n\r\n{\"code\":\"not_in_force\",\"message\":\"m\"}"), Code::TryAgainLater);
        assert_eq!(code("HTTP/1.1 503 x\r\n\r\n{\"code\":\"something new\",\"message\":\"m\"}"), Code::DaemonDiffers);
        // A daemon that does not know these requests yet.
        assert_eq!(code("HTTP/1.1 404 Not Found\r\n\r\n"), Code::DaemonDiffers);
        assert_eq!(code("HTTP/1.1 200 OK\r\n\r\n{}"), Code::DaemonDiffers);
        assert_eq!(code(""), Code::DaemonUnreachable);
    }

    #[test]
    fn a_request_that_a_dying_daemon_had_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let client = patient(dir.path());
        let asked = std::thread::spawn(move || client.attachments());
        for answer in [&b""[..], b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n[]"] {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]).unwrap();
            stream.write_all(answer).unwrap();
        }
        assert_eq!(asked.join().unwrap().unwrap(), []);
    }

    /// What a client may do between telling the end of an ADD and hearing that policy is in force.
    #[test]
    fn an_add_goes_on_before_the_answer_and_ends_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let client = patient(dir.path());
        let attach = Attach {
            pod: PodReference::default(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            interface: "v".to_owned(),
            mac: None,
            allowed_sources: Vec::new(),
        };
        let read = |stream: &mut UnixStream| {
            let mut asked = vec![0; 4096];
            let length = stream.read(&mut asked).unwrap();
            String::from_utf8_lossy(&asked[..length]).into_owned()
        };
        // Nobody has answered yet: one thread does both sides.
        let attaching = client.attach(&name(), &attach).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let first = read(&mut stream);
        assert!(first.starts_with("PUT /v1/attachments/c1/e%230 HTTP/1.0\r\n"), "{first}");
        // The daemon dies meanwhile, and the next one gets the whole request.
        drop(stream);
        let ended = std::thread::spawn({
            let listener = listener.try_clone().unwrap();
            move || {
                let (mut stream, _) = listener.accept().unwrap();
                let again = read(&mut stream);
                stream.write_all(b"HTTP/1.1 503 x\r\n\r\n{\"code\":\"not_in_force\",\"message\":\"m\"}").unwrap();
                again
            }
        });
        assert_eq!(CniError::from(attaching.in_force().unwrap_err()).code, Code::TryAgainLater);
        assert_eq!(ended.join().unwrap(), first);
        // A missing daemon is reported where the response is needed.
        drop(listener);
        let attaching = client.clone().impatient();
        let error = attaching.attach(&name(), &attach).unwrap().in_force().unwrap_err();
        assert_eq!(CniError::from(error).code, Code::DaemonUnreachable);
    }

    #[test]
    fn nobody_is_waited_for_in_vain() {
        let dir = tempfile::tempdir().unwrap();
        let error = DaemonClient::new(dir.path()).impatient().attachments().unwrap_err();
        assert_eq!(CniError::from(error).code, Code::DaemonUnreachable);
        assert!(DaemonClient::new(dir.path()).forget(&name()).is_ok());
    }

    #[test]
    fn a_tombstone_goes_through_no_link() {
        use std::{fs, os::unix::fs::symlink};
        let (outside, run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (target, client) = (outside.path().join("shadow"), DaemonClient::new(run.path()));
        fs::write(&target, "secret").unwrap();
        fs::create_dir(run.path().join(RECORDS)).unwrap();
        symlink(&target, run.path().join(RECORDS).join(tombstone_file(&name()))).unwrap();
        let error = client.forget(&name()).unwrap_err().to_string();
        assert!(error.contains("is a symbolic link"), "{error}");
        // Nor does a record outside of the run directory go.
        fs::remove_dir_all(run.path().join(RECORDS)).unwrap();
        let record = outside.path().join(record_file(&name()));
        fs::write(&record, "").unwrap();
        symlink(outside.path(), run.path().join(RECORDS)).unwrap();
        let error = client.forget(&name()).unwrap_err().to_string();
        assert!(error.contains("attachments is a symbolic link, not a directory"), "{error}");
        assert_eq!(fs::read_to_string(&target).unwrap(), "secret");
        assert!(record.exists() && fs::read_dir(outside.path()).unwrap().count() == 2);
        // A tombstone that is there already is one.
        fs::remove_file(run.path().join(RECORDS)).unwrap();
        fs::create_dir(run.path().join(RECORDS)).unwrap();
        client.forget(&name()).unwrap();
        client.forget(&name()).unwrap();
    }

    #[test]
    fn a_daemon_that_comes_back_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join(SOCKET);
        let client = patient(dir.path());
        let asked = std::thread::spawn(move || client.attachments());
        let listener = UnixListener::bind(socket).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n[]").unwrap();
        drop(stream);
        assert_eq!(asked.join().unwrap().unwrap(), []);
    }
}
