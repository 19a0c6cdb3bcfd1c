//! An error chain as one line, without repetitions.

use std::error::Error;

/// The text of `error` and of its causes, without repetitions: many errors repeat what they wrap, and others, such as
/// "transport error", explain nothing alone.
#[must_use]
pub fn with_causes(error: &dyn Error) -> String {
    followed_by(error.to_string(), error.source())
}

/// Like [`with_causes`], with another text for the error itself.
#[must_use]
pub fn followed_by(mut text: String, mut cause: Option<&dyn Error>) -> String {
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use anyhow::{Context as _, Error};

    use super::*;

    #[test]
    fn what_the_system_said_is_told_once() {
        let bare = Error::from(io::Error::from(io::ErrorKind::NotFound)).context("file");
        assert_eq!(with_causes(bare.as_ref()), "file: entity not found");
        let repeated = Err::<(), _>(bare).context("meshd.toml: file: entity not found").unwrap_err();
        assert_eq!(with_causes(repeated.as_ref()), "meshd.toml: file: entity not found");
    }
}
