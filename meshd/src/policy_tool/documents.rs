//! Files of JSON or YAML documents.

use std::{fs, io, path::Path};

use serde_json::Value;

/// Larger files are refused: they are no policies.
const MAX_BYTES: u64 = 1 << 30;

/// Why files could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The file itself.
    #[error("{file}: {source}")]
    File {
        /// Its path.
        file: String,
        /// The error.
        source: io::Error,
    },
    /// The content is invalid.
    #[error("{file}: {problem}")]
    Content {
        /// Its path.
        file: String,
        /// The place and the violation.
        problem: String,
    },
}

/// How documents are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// A sequence of JSON values.
    Json,
    /// YAML documents with `---` between them.
    Yaml,
}

impl Format {
    /// By the first character, which in JSON is that of an object or a list.
    pub(super) fn of(text: &str) -> Self {
        if text.trim_start().starts_with(['{', '[']) { Self::Json } else { Self::Yaml }
    }
}

/// The text of a file.
pub(super) fn text(file: &Path) -> Result<String, ReadError> {
    let failed = |source| ReadError::File { file: file.display().to_string(), source };
    if fs::metadata(file).map_err(failed)?.len() > MAX_BYTES {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, "too large")));
    }
    fs::read_to_string(file).map_err(failed)
}

/// All documents in `text`, those that are lists taken apart. `name` is for messages.
pub(super) fn parse(text: &str, name: &str, format: Format) -> Result<Vec<Value>, ReadError> {
    let failed = |problem: String| ReadError::Content { file: name.to_owned(), problem };
    let documents: Vec<Value> = match format {
        Format::Json => serde_json::Deserializer::from_str(text)
            .into_iter::<Value>()
            .collect::<Result<_, _>>()
            .map_err(|error| failed(error.to_string()))?,
        Format::Yaml => {
            // A port named `y` is text.
            let options = serde_saphyr::options! { strict_booleans: true };
            serde_saphyr::from_multiple_with_options(text, options).map_err(|error| failed(error.to_string()))?
        }
    };
    let mut out = Vec::with_capacity(documents.len());
    for document in documents {
        match document {
            Value::Null => {}
            Value::Array(list) => out.extend(list),
            other => out.push(other),
        }
    }
    Ok(out)
}
