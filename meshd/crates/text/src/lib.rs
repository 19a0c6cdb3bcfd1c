//! Text for operators: error chains, shell quoting, and escaping for terminals.

#![forbid(unsafe_code)]

mod error_chain;
mod printable;
mod shell;

pub use error_chain::{followed_by, with_causes};
pub use printable::*;
pub use shell::quote;
