//! RUN/incarnation: the last process with this node's identity on this machine.
//!
//! To etcd, a restart and a copy of the state directory look alike: `alive/ID` holds the record of another process. RUN
//! is neither copied with STATE nor survives a boot. So if a record in etcd has the incarnation in RUN, its process has
//! ended, because this process holds the lock on STATE.

use std::{fs, io, path::Path};

use atomic_file::{FileError, Folder};
use control_core::membership::Identity;
use tracing::warn;

use super::state_dir::FILE_MODE;

const FILE: &str = "incarnation";

/// The incarnation of the process before this one; `None`: this is the first since the boot, or a copy. The note names
/// the node and the boot: a RUN that another node's state came to, or that outlived a boot, proves nothing.
pub(super) fn load(run_dir: &Path, identity: &Identity) -> Option<u64> {
    let note = atomic_file::read(&run_dir.join(FILE), 256).ok()?;
    let words: Vec<&str> = str::from_utf8(&note).ok()?.split_whitespace().collect();
    let [id, boot_id, incarnation] = words[..] else { return None };
    if id != identity.id.as_str() || boot_id != identity.boot_id {
        return None;
    }
    incarnation.parse().ok()
}

/// Notes that this process holds the identity. Without the note the next start waits for evidence; half a note names no
/// process, and no boot needs it: nothing here waits for a disk.
pub(super) fn save(run_dir: &Path, identity: &Identity) {
    let file = run_dir.join(FILE);
    let note = format!("{} {} {}\n", identity.id, identity.boot_id, identity.incarnation);
    let written =
        Folder::open(run_dir).map_err(FileError::from).and_then(|run| run.replace(FILE, FILE_MODE, note.as_bytes()));
    if let Err(error) = written {
        warn!(file = %file.display(), %error, "cannot record this start; after the next one, handshakes wait for up to 5 s");
    }
}

/// Takes the note back: another process holds the identity.
pub(super) fn remove(run_dir: &Path) {
    let file = run_dir.join(FILE);
    match fs::remove_file(&file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(file = %file.display(), %error, "cannot remove the record of an earlier start");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(id: &str, boot_id: &str) -> Identity {
        Identity {
            id: id.parse().unwrap(),
            boot_id: boot_id.to_owned(),
            start_count: 1,
            incarnation: 7,
            predecessor: None,
        }
    }

    #[test]
    fn a_note_counts_for_its_node_and_boot_only() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(load(run.path(), &identity("n0", "b")), None);
        save(run.path(), &identity("n0", "b"));
        assert_eq!(load(run.path(), &identity("n0", "b")), Some(7));
        assert_eq!(load(run.path(), &identity("n1", "b")), None, "another node's state was put here");
        assert_eq!(load(run.path(), &identity("n0", "c")), None, "the note is from before the boot");
        fs::write(run.path().join(FILE), "7\n").unwrap();
        assert_eq!(load(run.path(), &identity("n0", "b")), None);
    }

    #[test]
    fn a_link_or_a_fifo_in_its_place_is_replaced() {
        let (run, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (file, target) = (run.path().join(FILE), outside.path().join("theirs"));
        fs::write(&target, "theirs").unwrap();
        std::os::unix::fs::symlink(&target, &file).unwrap();
        save(run.path(), &identity("n0", "b"));
        assert_eq!(fs::read_to_string(&target).unwrap(), "theirs");
        assert_eq!(load(run.path(), &identity("n0", "b")), Some(7));
        fs::remove_file(&file).unwrap();
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
        save(run.path(), &identity("n0", "b"));
        assert_eq!(load(run.path(), &identity("n0", "b")), Some(7));
    }
}
