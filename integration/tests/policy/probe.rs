//! A server in a pod, and clients that try to reach it.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use integration::{Namespace, await_ok};

use crate::SOON;

/// How long a client waits for what should not come. What is allowed is tried again, so that it may be short.
const PATIENCE: Duration = Duration::from_millis(700);

/// Answers every TCP connection, and every UDP datagram, with what it got.
pub(crate) struct Server {
    pub(crate) at: SocketAddr,
    stop: Arc<AtomicBool>,
}

impl Server {
    #[track_caller]
    pub(crate) fn start(on: &Namespace, address: IpAddr, port: u16) -> Self {
        let at = SocketAddr::new(address, port);
        let (tcp, udp) = on.enter(|| (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap()));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        std::thread::spawn(move || {
            for stream in tcp.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::spawn(move || echo(stream));
            }
        });
        let stopped = Arc::clone(&stop);
        udp.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, from)) = udp.recv_from(&mut buffer) {
                    let _ = udp.send_to(&buffer[..length], from);
                }
            }
        });
        Self { at, stop }
    }

    /// The same server as others reach it.
    pub(crate) fn at_port(&self, address: IpAddr, port: u16) -> Self {
        Self { at: SocketAddr::new(address, port), stop: Arc::default() }
    }

    /// Whether a new connection from there gets an answer.
    pub(crate) fn tcp_answers(&self, from: &Namespace) -> bool {
        let at = self.at;
        from.enter(|| {
            let Ok(mut stream) = TcpStream::connect_timeout(&at, PATIENCE) else { return false };
            round_trip(&mut stream, PATIENCE)
        })
    }

    /// Whether a datagram from a new socket there gets an answer.
    pub(crate) fn udp_answers(&self, from: &Namespace) -> bool {
        let at = self.at;
        from.enter(|| {
            let any: IpAddr = if at.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = UdpSocket::bind((any, 0)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut buffer = [0; 16];
            socket.send_to(b"ping", at).is_ok() && socket.recv_from(&mut buffer).is_ok()
        })
    }

    /// A connection from there.
    #[track_caller]
    pub(crate) fn connect(&self, from: &Namespace) -> TcpStream {
        let at = self.at;
        from.enter(|| TcpStream::connect_timeout(&at, SOON)).unwrap()
    }

    #[track_caller]
    pub(crate) fn assert_reached(&self, from: &Namespace) {
        await_ok(&format!("{} to reach {}", from.name(), self.at), SOON, || {
            match (self.tcp_answers(from), self.udp_answers(from)) {
                (true, true) => Ok(()),
                (tcp, udp) => Err(format!("TCP answers: {tcp}, UDP answers: {udp}")),
            }
        });
    }

    #[track_caller]
    pub(crate) fn assert_not_reached(&self, from: &Namespace) {
        assert!(!self.tcp_answers(from), "{} reaches {} by TCP", from.name(), self.at);
        assert!(!self.udp_answers(from), "{} reaches {} by UDP", from.name(), self.at);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Whether what is sent comes back in time.
pub(crate) fn round_trip(stream: &mut TcpStream, patience: Duration) -> bool {
    let mut buffer = [0; 4];
    stream.set_read_timeout(Some(patience)).unwrap();
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut buffer).is_ok()
}

fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 2048];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}
