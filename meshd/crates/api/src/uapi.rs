//! WireGuard's cross-platform userspace API, read-only: for `wg show` and `wg showconf`.
//!
//! A stream socket takes `get=1` and an empty line and answers with `key=value` lines, keys in hexadecimal, `errno=0`
//! and an empty line (wireguard.com/xplatform). `set=1` gets EPERM, because etcd is the source of truth for peers. Only
//! root gets secrets.

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::{interval, timeout},
};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::source::{Device, Source};

/// Where WireGuard's tools look.
const DIRECTORY: &str = "/var/run/wireguard";
/// Most connections at one time.
const CONNECTIONS: usize = 16;
/// How long one may last.
const LIFETIME: Duration = Duration::from_secs(10);
/// Most bytes of one request: `wg setconf` with some ten thousand prefixes is read to its end before it is refused.
const REQUEST: u64 = 1 << 20;
/// How often the socket is looked for: `wg` removes one that refuses a connection.
const LOOK: Duration = Duration::from_secs(5);

/// Answers for the device `interface` until `stop`; `tell` hears why it cannot, and `None` once it can. A socket that a
/// live process answers at is left alone: namespaces share the file system.
pub fn wireguard(
    interface: &str,
    source: Arc<dyn Source>,
    stop: CancellationToken,
    tell: impl Fn(Option<io::Error>) + Send + 'static,
) {
    let path = Path::new(DIRECTORY).join(format!("{interface}.sock"));
    tokio::spawn(async move {
        let free = Arc::new(Semaphore::new(CONNECTIONS));
        let mut look = interval(LOOK);
        let mut socket: Option<Socket> = None;
        loop {
            let accepted = async {
                match &socket {
                    Some(socket) => socket.listener.accept().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                _ = look.tick() => {
                    if socket.as_ref().is_none_or(|socket| !socket.is_there()) {
                        let made = Socket::make(&path);
                        tell(made.as_ref().err().map(|error| io::Error::new(error.kind(), error.to_string())));
                        socket = made.ok();
                    }
                }
                accepted = accepted => {
                    let (Ok((stream, _)), Ok(place)) = (accepted, Arc::clone(&free).acquire_owned().await) else {
                        // Out of files, most likely: the next check creates the socket again.
                        socket = None;
                        continue;
                    };
                    let source = Arc::clone(&source);
                    tokio::spawn(async move {
                        // Slow clients are dropped, and a client that went away needs no answer.
                        let _ = timeout(LIFETIME, serve(stream, &*source)).await;
                        drop(place);
                    });
                }
            }
        }
    });
}

/// The socket in the file system; it goes with its value, if it is still this one.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Socket {
    fn make(path: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY)?;
        match fs::symlink_metadata(path) {
            Ok(there) if !there.file_type().is_socket() => {
                return Err(io::Error::other(format!("{} exists and is not a socket", path.display())));
            }
            Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
                return Err(io::Error::other(format!("{} is in use by another process", path.display())));
            }
            _ => {}
        }
        // Bound beside and renamed, so that the socket has its mode once it is visible.
        let beside = path.with_extension("new");
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&beside)?;
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o660))?;
        fs::rename(&beside, path)?;
        Ok(Self { listener, path: path.to_owned(), inode: fs::symlink_metadata(path)?.ino() })
    }

    fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|there| there.ino() == self.inode)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.is_there() {
            // Should it stay, the next process replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

async fn serve(stream: UnixStream, source: &dyn Source) -> io::Result<()> {
    let is_root = stream.peer_cred().is_ok_and(|peer| peer.uid() == 0);
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    while let Some(request) = Request::read(&mut read).await? {
        let reply = match request {
            Request::Get => reply(&source.device(), is_root),
            Request::Set => refusal(libc::EPERM),
            Request::Unknown => refusal(libc::EINVAL),
        };
        write.write_all(reply.as_bytes()).await?;
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
enum Request {
    Get,
    Set,
    Unknown,
}

impl Request {
    /// Reads up to the empty line that ends a request; `None` at the end of the stream.
    async fn read(stream: &mut BufReader<impl AsyncRead + Unpin>) -> io::Result<Option<Self>> {
        let mut first: Option<Self> = None;
        let mut bounded = stream.take(REQUEST);
        let mut line = Zeroizing::new(Vec::new());
        loop {
            line.clear();
            if bounded.read_until(b'\n', &mut line).await? == 0 {
                return match bounded.limit() {
                    0 => Err(io::ErrorKind::InvalidData.into()),
                    _ => Ok(first),
                };
            }
            match (line.strip_suffix(b"\n").unwrap_or(&line), &first) {
                (b"", Some(_)) => return Ok(first),
                (b"", None) => {}
                (b"get=1", None) => first = Some(Self::Get),
                (b"set=1", None) => first = Some(Self::Set),
                (_, None) => first = Some(Self::Unknown),
                // `get` has no arguments; those of `set` are ignored.
                (_, Some(Self::Get)) => first = Some(Self::Unknown),
                (_, Some(_)) => {}
            }
        }
    }
}

/// wireguard-go gives error numbers their sign as the kernel does, and `wg` reads them so.
fn refusal(errno: i32) -> Zeroizing<String> {
    Zeroizing::new(format!("errno=-{errno}\n\n"))
}

fn reply(device: &Device, with_secrets: bool) -> Zeroizing<String> {
    // Roomy enough that secrets are not copied about as it grows.
    let prefixes: usize = device.peers.iter().map(|peer| peer.allowed.len()).sum();
    let mut text = Zeroizing::new(String::with_capacity(256 + device.peers.len() * 512 + prefixes * 64));
    // Writing to a string does not fail.
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(text, "{name}={value}");
    };
    if let Some(key) = device.private_key.as_ref().filter(|_| with_secrets) {
        line("private_key", &*hex(&Zeroizing::new(key.secret().to_bytes())));
    }
    line("listen_port", &device.listen_port);
    if device.mark != 0 {
        line("fwmark", &device.mark);
    }
    for peer in &device.peers {
        line("public_key", &*hex(peer.public_key.as_bytes()));
        if let Some(key) = peer.preshared_key.as_ref().filter(|_| with_secrets) {
            line("preshared_key", &*hex(key.secret_bytes()));
        }
        line("protocol_version", &1);
        if let Some(endpoint) = peer.endpoint {
            line("endpoint", &endpoint);
        }
        let handshake = peer.latest_handshake.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        line("last_handshake_time_sec", &handshake.as_secs());
        line("last_handshake_time_nsec", &handshake.subsec_nanos());
        line("tx_bytes", &peer.tx_bytes);
        line("rx_bytes", &peer.rx_bytes);
        line("persistent_keepalive_interval", &peer.keepalive.map_or(0, |every| every.as_secs()));
        for net in &peer.allowed {
            line("allowed_ip", net);
        }
    }
    line("errno", &0);
    text.push('\n');
    text
}

fn hex(bytes: &[u8; 32]) -> Zeroizing<String> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = Zeroizing::new(String::with_capacity(64));
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

#[cfg(test)]
mod tests {
    use etcd_schema::PublicKey;
    use keys::PrivateKey;

    use super::*;
    use crate::source::DevicePeer;

    fn device() -> Device {
        Device {
            private_key: Some(PrivateKey::from_bytes([0xab; 32])),
            listen_port: 51820,
            mark: 0,
            peers: vec![DevicePeer {
                public_key: PublicKey::from_bytes([0x12; 32]),
                preshared_key: None,
                endpoint: Some("[fd00::1]:51820".parse().unwrap()),
                latest_handshake: Some(UNIX_EPOCH + Duration::from_millis(1_500)),
                rx_bytes: 7,
                tx_bytes: 8,
                keepalive: Some(Duration::from_secs(25)),
                allowed: vec!["10.244.1.0/24".parse().unwrap(), "fd42::/64".parse().unwrap()],
            }],
        }
    }

    #[test]
    fn the_private_key_goes_to_root_alone() {
        let secret = "ab".repeat(32);
        assert!(reply(&device(), true).starts_with(&format!("private_key={secret}\nlisten_port=51820\n")));
        assert!(!reply(&device(), false).contains(&secret));
        assert!(reply(&device(), false).starts_with("listen_port=51820\n"));
    }

    #[test]
    fn a_peer_is_told_as_wg_reads_it() {
        let key = "12".repeat(32);
        let expected = format!(
            "listen_port=51820\npublic_key={key}\nprotocol_version=1\nendpoint=[fd00::1]:51820\n\
             last_handshake_time_sec=1\nlast_handshake_time_nsec=500000000\ntx_bytes=8\nrx_bytes=7\n\
             persistent_keepalive_interval=25\nallowed_ip=10.244.1.0/24\nallowed_ip=fd42::/64\nerrno=0\n\n"
        );
        assert_eq!(*reply(&device(), false), expected);
    }

    #[tokio::test]
    async fn requests_end_with_an_empty_line() {
        let text: &[u8] = b"get=1\n\nset=1\nprivate_key=00\n\n\nget=1\nmore=2\n\nwhat\n\nget=1";
        let mut stream = BufReader::new(text);
        for expected in [Request::Get, Request::Set, Request::Unknown, Request::Unknown, Request::Get] {
            assert_eq!(Request::read(&mut stream).await.unwrap(), Some(expected));
        }
        assert_eq!(Request::read(&mut stream).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_request_without_an_end_is_given_up() {
        let endless = tokio::io::repeat(b'x');
        assert!(Request::read(&mut BufReader::new(endless)).await.is_err());
    }
}
