//! What of this machine keeps packets of the mesh from getting through, as anybody can see it, also while the daemon is
//! away. What the daemon knows comes on top of it, from its API.

pub mod filters;
pub mod host;
pub mod routes;
