//! Text for operators: errors with their causes, words for a shell, what a terminal may be shown.

#![forbid(unsafe_code)]

mod error_chain;
mod printable;
mod shell;

pub use error_chain::{followed_by, with_causes};
pub use printable::*;
pub use shell::quote;
