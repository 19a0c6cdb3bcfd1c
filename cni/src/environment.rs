//! Parameters from the runtime in environment variables.

use std::path::PathBuf;

use crate::error::{CniError, Code};

/// Longest container id, in bytes: the daemon's file for an attachment is named after it.
const MAX_CONTAINER_ID: usize = 200;

/// The command, from `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CniCommand {
    /// Attach a container.
    Add,
    /// Detach it.
    Del,
    /// Look whether it still is as it was made.
    Check,
    /// Whether containers can be attached.
    Status,
    /// Remove attachments that the runtime does not know.
    Gc,
    /// Which versions are spoken.
    Version,
}

/// The variables, read once at the start.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `CNI_COMMAND`
    pub command: String,
    /// `CNI_CONTAINERID`
    pub container_id: String,
    /// `CNI_NETNS`
    pub netns: String,
    /// `CNI_IFNAME`
    pub ifname: String,
    /// `CNI_ARGS`
    pub args: String,
    /// `CNI_PATH`
    pub path: String,
}

/// An attachment, by container ID and interface name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttachmentName {
    /// The container.
    pub container_id: String,
    /// The interface inside.
    pub ifname: String,
}

impl Environment {
    /// The variables of this process. Those that are not UTF-8 count as not set.
    #[must_use]
    pub fn of_process() -> Self {
        let read = |name| std::env::var(name).unwrap_or_default();
        Self {
            command: read("CNI_COMMAND"),
            container_id: read("CNI_CONTAINERID"),
            netns: read("CNI_NETNS"),
            ifname: read("CNI_IFNAME"),
            args: read("CNI_ARGS"),
            path: read("CNI_PATH"),
        }
    }

    /// `CNI_COMMAND`.
    ///
    /// # Errors
    /// [`Code::InvalidEnvironment`]
    pub fn command(&self) -> Result<CniCommand, CniError> {
        Ok(match self.command.as_str() {
            "ADD" => CniCommand::Add,
            "DEL" => CniCommand::Del,
            "CHECK" => CniCommand::Check,
            "STATUS" => CniCommand::Status,
            "GC" => CniCommand::Gc,
            "VERSION" => CniCommand::Version,
            other => return Err(invalid("CNI_COMMAND", other, "must be ADD, DEL, CHECK, STATUS, GC or VERSION")),
        })
    }

    /// The attachment that the variables name.
    ///
    /// # Errors
    /// [`Code::InvalidEnvironment`]
    pub fn attachment(&self) -> Result<AttachmentName, CniError> {
        if !is_identifier(&self.container_id) || self.container_id.len() > MAX_CONTAINER_ID {
            let expected = "must be at most 200 letters, digits, '_', '.' and '-', starting with a letter or digit";
            return Err(invalid("CNI_CONTAINERID", &self.container_id, expected));
        }
        check_interface(&self.ifname).map_err(|reason| invalid("CNI_IFNAME", &self.ifname, reason))?;
        Ok(AttachmentName { container_id: self.container_id.clone(), ifname: self.ifname.clone() })
    }

    /// `CNI_NETNS`, where it is needed.
    ///
    /// # Errors
    /// [`Code::InvalidEnvironment`]
    pub fn netns(&self) -> Result<PathBuf, CniError> {
        if self.netns.is_empty() {
            return Err(invalid("CNI_NETNS", "", "must be the path of the container's network namespace"));
        }
        Ok(self.netns.clone().into())
    }

    /// Folders of plugins, in the order of search.
    pub(crate) fn plugin_dirs(&self) -> impl Iterator<Item = PathBuf> + '_ {
        // Relative folders would depend on where the runtime happens to stand.
        self.path.split(':').filter(|dir| dir.starts_with('/')).map(PathBuf::from)
    }

    /// The value of a variable in `CNI_ARGS`; the last one counts.
    #[must_use]
    pub fn arg(&self, name: &str) -> Option<&str> {
        let pairs = self.args.split(';').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(key, _)| *key == name).map(|(_, value)| value).next_back().filter(|value| !value.is_empty())
    }
}

/// Whether the specification allows it as a container ID or network name.
#[must_use]
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// Whether the kernel takes it as the name of an interface.
///
/// # Errors
/// The violation.
pub fn check_interface(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > 15 || matches!(name, "." | "..") {
        return Err("must have 1 to 15 bytes and not be . or ..");
    }
    if !name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte)) {
        return Err("must be printable ASCII characters without '/', ':', '%' and spaces");
    }
    Ok(())
}

fn invalid(variable: &str, value: &str, expected: &str) -> CniError {
    let shown: String = value.chars().take(64).collect();
    CniError::new(Code::InvalidEnvironment, format!("{variable} is {shown:?}: {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_an_argument_counts_and_an_empty_one_is_none() {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAMESPACE=b;K8S_POD_NAME=;broken";
        let environment = Environment { args: args.to_owned(), ..Environment::default() };
        assert_eq!(environment.arg("K8S_POD_NAMESPACE"), Some("b"));
        assert_eq!(environment.arg("K8S_POD_NAME"), None);
        assert_eq!(environment.arg("broken"), None);
    }

    #[test]
    fn names_that_would_be_paths_are_refused() {
        let environment = |id: &str, ifname: &str| Environment {
            container_id: id.to_owned(),
            ifname: ifname.to_owned(),
            ..Environment::default()
        };
        assert!(environment("abc_1.2-3", "eth0").attachment().is_ok());
        for (id, ifname) in [
            ("", "eth0"),
            ("../a", "eth0"),
            ("a/b", "eth0"),
            ("a", ""),
            ("a", "a/b"),
            ("a", "."),
            ("a", "0123456789abcdef"),
        ] {
            let error = environment(id, ifname).attachment().unwrap_err();
            assert_eq!(error.code, Code::InvalidEnvironment, "{id} {ifname}");
        }
        let long = "a".repeat(201);
        assert!(environment(&long, "eth0").attachment().is_err());
    }

    #[test]
    fn only_whole_paths_are_searched() {
        let environment = Environment { path: "/a::b:../c:/d".to_owned(), ..Environment::default() };
        assert_eq!(environment.plugin_dirs().collect::<Vec<_>>(), [PathBuf::from("/a"), PathBuf::from("/d")]);
    }
}
