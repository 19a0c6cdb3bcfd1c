//! Parts that all long-running programs of the mesh share.

pub mod etcd_flags;
pub mod log;

/// The version, with the commit that `make build` was run at.
pub const VERSION: &str = match option_env!("MESHD_BUILD") {
    Some(build) => build,
    None => env!("CARGO_PKG_VERSION"),
};
