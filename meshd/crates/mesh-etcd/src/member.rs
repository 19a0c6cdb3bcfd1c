//! A member's start: reads what it is, restores a snapshot if it begins with one, and becomes etcd.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use crate::record::{Folders, MEMBER_LABEL, Member, MembersRecord, Ports};

/// Where a member finds what it needs.
pub(crate) struct Options {
    pub(crate) node: String,
    /// The record, as a file.
    pub(crate) record: PathBuf,
    pub(crate) certificates: PathBuf,
    pub(crate) data: PathBuf,
    pub(crate) ports: Ports,
    pub(crate) metrics_port: u16,
}

/// Why a member does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("{path}: {source}; setup writes it")]
    Record { path: PathBuf, source: serde_json::Error },
    #[error("no member is to run on node {0}; the pod starts again with the next record")]
    NotHere(String),
    #[error(
        "member {name} has joined, but its data is not in {folder}: put it back; with other members alive, take the label \
         {label} off node {node}, and the node becomes another member; else restore a snapshot",
        label = MEMBER_LABEL
    )]
    DataLost { name: String, node: String, folder: PathBuf },
    #[error("cannot run {program}: {source}")]
    Program { program: &'static str, source: io::Error },
    #[error("snapshot {snapshot} cannot be restored: {said}")]
    Snapshot { snapshot: PathBuf, said: String },
}

/// What precedes etcd.
#[derive(Debug, PartialEq, Eq)]
enum Preparation {
    None,
    Restore(PathBuf),
}

/// Becomes etcd.
///
/// # Errors
/// Why it does not.
pub(crate) fn start(options: &Options) -> Result<Infallible, StartError> {
    let member = own(options)?;
    let folders = Folders { data: &options.data, certificates: &options.certificates };
    fs::create_dir_all(folders.data).map_err(|source| StartError::File { path: options.data.clone(), source })?;
    if let Preparation::Restore(snapshot) = preparation(&member, folders.data)? {
        restore(&member, &snapshot, folders.data)?;
    }
    let mut etcd = Command::new("etcd");
    etcd.args(member.etcd_arguments(&folders, options.ports, options.metrics_port));
    Err(StartError::Program { program: "etcd", source: etcd.exec() })
}

fn own(options: &Options) -> Result<Member, StartError> {
    let path = options.record.clone();
    let text = fs::read(&path).map_err(|source| StartError::File { path: path.clone(), source })?;
    let record: MembersRecord = serde_json::from_slice(&text).map_err(|source| StartError::Record { path, source })?;
    record.on_node(&options.node).cloned().ok_or_else(|| StartError::NotHere(options.node.clone()))
}

/// A member that has joined never begins without its data: it would vote as if it had forgotten what it said.
fn preparation(member: &Member, data: &Path) -> Result<Preparation, StartError> {
    let folder = member.data_dir(data);
    if folder.join("member").exists() {
        return Ok(Preparation::None);
    }
    if member.joined {
        return Err(StartError::DataLost { name: member.name.clone(), node: member.node.clone(), folder });
    }
    Ok(match &member.snapshot {
        Some(file) => Preparation::Restore(data.join("snapshots").join(file)),
        None => Preparation::None,
    })
}

/// Restores into a folder aside, so that a restore that was cut off begins again.
fn restore(member: &Member, snapshot: &Path, data: &Path) -> Result<(), StartError> {
    let (folder, aside) = (member.data_dir(data), data.join("restoring"));
    let in_folder = |path: &Path| {
        let path = path.to_owned();
        move |source| StartError::File { path, source }
    };
    if aside.exists() {
        fs::remove_dir_all(&aside).map_err(in_folder(&aside))?;
    }
    let mut etcdutl = Command::new("etcdutl");
    etcdutl.args(["snapshot", "restore"]).arg(snapshot).arg(format!("--data-dir={}", aside.display()));
    let output = etcdutl.args(member.identity_arguments()).output();
    let output = output.map_err(|source| StartError::Program { program: "etcdutl", source })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(StartError::Snapshot { snapshot: snapshot.to_owned(), said });
    }
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(in_folder(&folder))?;
    }
    fs::rename(&aside, &folder).map_err(in_folder(&folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_has_joined_does_not_begin_without_its_data() {
        let folder = tempfile::tempdir().unwrap();
        let address = ["192.0.2.1".parse().unwrap()];
        let ports = Ports { client: 1, peer: 2 };
        let mut member = Member::new("n", "1", &address, ports, &[]);
        assert_eq!(preparation(&member, folder.path()).unwrap(), Preparation::None);
        member.snapshot = Some("x.db".to_owned());
        let snapshot = folder.path().join("snapshots/x.db");
        assert_eq!(preparation(&member, folder.path()).unwrap(), Preparation::Restore(snapshot));
        member.joined = true;
        let refused = preparation(&member, folder.path()).unwrap_err().to_string();
        assert!(refused.contains("member n-1 has joined") && refused.contains("off node n"), "{refused}");
        fs::create_dir_all(folder.path().join("n-1/member")).unwrap();
        assert_eq!(preparation(&member, folder.path()).unwrap(), Preparation::None);
    }
}
