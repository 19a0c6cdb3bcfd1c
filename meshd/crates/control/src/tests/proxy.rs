//! A TCP proxy in front of etcd that can cut connections or hang.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Forwards.
    Pass,
    /// Takes connections and bytes, forwards nothing.
    Hang,
    /// Closes every connection.
    Cut,
}

pub(super) struct Proxy {
    pub(super) url: String,
    pub(super) mode: watch::Sender<Mode>,
}

impl Proxy {
    /// A proxy to `http://ADDRESS`; lives as long as the test's runtime.
    pub(super) async fn to(url: &str) -> Self {
        let target: SocketAddr = url.trim_start_matches("http://").parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (mode, watched) = watch::channel(Mode::Pass);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let mut mode = watched.clone();
                tokio::spawn(async move {
                    if *mode.borrow() == Mode::Cut {
                        return;
                    }
                    let Ok(server) = TcpStream::connect(target).await else { return };
                    let (client_in, client_out) = client.into_split();
                    let (server_in, server_out) = server.into_split();
                    tokio::select! {
                        () = forward(client_in, server_out, mode.clone()) => {}
                        () = forward(server_in, client_out, mode.clone()) => {}
                        _ = mode.wait_for(|mode| *mode == Mode::Cut) => {}
                    }
                });
            }
        });
        Self { url, mode }
    }
}

async fn forward(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, mut mode: watch::Receiver<Mode>) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if mode.wait_for(|mode| *mode == Mode::Pass).await.is_err() || to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
