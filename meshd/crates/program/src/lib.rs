//! What every long-running program of the mesh has alike.

pub mod etcd_flags;
pub mod log;
