//! HTTP/1.0 as a client on a Unix socket: one request and one answer a connection, which ends the answer.

use std::{
    io::{self, Read as _},
    os::unix::net::UnixStream,
    time::Instant,
};

/// A request, with a body of JSON or without one. An answer to HTTP/1.0 is never chunked.
#[must_use]
pub fn request(method: &str, path: &str, body: Option<&str>) -> String {
    let head = format!("{method} {path} HTTP/1.0\r\nHost: meshd\r\n");
    match body {
        None => head + "\r\n",
        Some(body) => {
            let length = body.len();
            format!("{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
        }
    }
}

/// Reads to the end of the stream, but not longer than until `end` nor more than `most` bytes.
///
/// # Errors
/// When it fails, takes longer, is larger, or is no text.
pub fn read_until(stream: &mut UnixStream, end: Instant, most: usize) -> io::Result<String> {
    let mut answer = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer) {
            Ok(0) => return String::from_utf8(answer).map_err(|_| io::ErrorKind::InvalidData.into()),
            Ok(read) => answer.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if answer.len() > most {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

/// An answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer<'a> {
    /// The first line.
    pub status: &'a str,
    /// The three digits in it.
    pub code: &'a str,
    /// What follows the header.
    pub body: &'a str,
}

/// The parts of an answer; `None` if its header does not end.
#[must_use]
pub fn parse(answer: &str) -> Option<Answer<'_>> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.lines().next().unwrap_or_default();
    Some(Answer { status, code: status.split(' ').nth(1).unwrap_or_default(), body })
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, time::Duration};

    use super::*;

    #[test]
    fn an_answer_ends_with_the_connection_in_time_and_within_bounds() {
        let read = |bytes: &[u8], most: usize, patience: Duration, ends: bool| {
            let (mut one, mut other) = UnixStream::pair().unwrap();
            other.write_all(bytes).unwrap();
            let other = (!ends).then_some(other);
            let answer = read_until(&mut one, Instant::now() + patience, most).map_err(|error| error.kind());
            drop(other);
            answer
        };
        let minute = Duration::from_secs(60);
        assert_eq!(read(b"HTTP/1.1 200 OK\r\n\r\n[]", 99, minute, true).as_deref(), Ok("HTTP/1.1 200 OK\r\n\r\n[]"));
        assert_eq!(read(b"12345", 4, minute, true), Err(io::ErrorKind::InvalidData));
        assert_eq!(read(&[0xff], 9, minute, true), Err(io::ErrorKind::InvalidData));
        assert_eq!(read(b"12345", 9, Duration::ZERO, false), Err(io::ErrorKind::TimedOut));
        let answer = parse("HTTP/1.1 404 Not Found\r\nA: b\r\n\r\nx\r\n\r\ny").unwrap();
        assert_eq!(answer, Answer { status: "HTTP/1.1 404 Not Found", code: "404", body: "x\r\n\r\ny" });
        assert_eq!(parse("HTTP/1.1 200 OK\r\n"), None);
        assert_eq!(request("GET", "/v1/status", None), "GET /v1/status HTTP/1.0\r\nHost: meshd\r\n\r\n");
        assert!(request("PUT", "/x", Some("{}")).ends_with("Content-Length: 2\r\n\r\n{}"));
    }
}
