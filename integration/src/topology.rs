//! Topologies that several scenarios share.

mod mesh;
mod star;
mod two_sites;

pub use mesh::{CONFIG, Mesh};
pub use star::Star;
pub use two_sites::{Site, TwoSites};
