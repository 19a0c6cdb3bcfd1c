//! The node daemon `meshd` and the operator's tool `meshctl`.
//!
//! Data flows in one direction:
//!
//! ```text
//! etcd watch ─▶ control ─▶ Topology ─▶ plan ─▶ apply (kernel, tunnel)
//! TUN read ─▶ track flow ─▶ route ─▶ encrypt in batch ─▶ UDP send
//! UDP receive ─▶ decrypt ─▶ source is that peer's, destination is mine ─▶ judge ─▶ TUN write
//! ```

pub mod daemon;
pub mod doctor;
pub mod echo;
pub mod install_cni;
pub mod manual;
pub mod policy_tool;
pub mod settings;
pub mod subnet_env;
