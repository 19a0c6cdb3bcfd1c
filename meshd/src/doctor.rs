//! Connectivity problems of this machine that any process can detect, even if the daemon is down. The daemon adds its
//! own findings through its API.

pub mod filters;
pub mod host;
pub mod routes;
