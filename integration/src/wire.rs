//! Frames on an interface, byte by byte.

use std::{io, time::Duration};

use crate::{
    Namespace,
    sys::{FrameSocket, Slots},
};

/// Longest frame that is received whole.
const ROOM: usize = 2048;

/// One interface, from which frames are sent as they are, and on which all that come in are received.
pub struct Wire {
    socket: FrameSocket,
    slots: Slots,
}

impl Wire {
    /// The interface of this name.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    #[track_caller]
    pub fn on(place: &Namespace, interface: &str) -> Self {
        match place.enter(|| FrameSocket::open(Some(interface))) {
            Ok(socket) => Self { socket, slots: Slots::new(ROOM) },
            Err(error) => panic!("{}: {interface}: {error}", place.name()),
        }
    }

    /// Sends frames, from the Ethernet header on.
    pub fn send(&self, frames: &[Vec<u8>]) {
        self.socket.send(frames);
    }

    /// What has come since; waits for it, at most `limit`.
    ///
    /// # Errors
    /// When the interface is gone.
    pub fn receive(&mut self, limit: Duration) -> io::Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        if self.socket.await_readable(limit)? {
            while self.socket.receive(&mut self.slots)? {
                frames.extend(self.slots.frames().map(|frame| frame.bytes.to_vec()));
            }
        }
        Ok(frames)
    }
}
