//! An error as one line: with what caused it, and nothing twice.

use std::error::Error;

/// The text of `error`, and those of its causes that it does not have already: many repeat what they wrap, and others,
/// such as "transport error", help nobody alone.
#[must_use]
pub fn with_causes(error: &dyn Error) -> String {
    followed_by(error.to_string(), error.source())
}

/// As [`with_causes`], where another text stands for the error itself.
pub(crate) fn followed_by(mut text: String, mut cause: Option<&dyn Error>) -> String {
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
    use std::{io, path::Path};

    use super::*;
    use crate::api::Client;

    #[test]
    fn what_the_system_said_is_told_once() {
        let error = Client::new(Path::new("/nonexistent")).get_text("/v1/status").unwrap_err();
        let told = with_causes(anyhow::Error::from(error).context("status").as_ref());
        assert!(told.starts_with("status: the daemon is not reachable"), "{told}");
        assert_eq!(told.matches("No such file").count(), 1, "{told}");
        let bare = anyhow::Error::from(io::Error::from(io::ErrorKind::NotFound)).context("file");
        assert_eq!(with_causes(bare.as_ref()), "file: entity not found");
    }
}
