//! What is installed, and how: the Debian package on machines with systemd, the documentation followed on them, the
//! alerts.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

mod alerts;
mod containers;
mod debian;
mod docs;
mod kubernetes;
mod package;
mod upgrade;

use std::time::Duration;

/// For whatever comes up by itself, on a busy machine.
const SOON: Duration = Duration::from_secs(60);
