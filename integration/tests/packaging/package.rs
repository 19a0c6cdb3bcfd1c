//! The package that scenarios install.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use integration::binary;
use nix::fcntl::{Flock, FlockArg};

/// The Debian package of the binaries that were built beside this test; made once in a run of the tests.
pub(crate) fn package() -> &'static Path {
    static PACKAGE: OnceLock<PathBuf> = OnceLock::new();
    PACKAGE.get_or_init(|| {
        let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join("debian");
        let (lock, of_run) = (output.with_extension("lock"), output.with_extension("run"));
        let _held = Flock::lock(File::create(lock).unwrap(), FlockArg::LockExclusive).unwrap();
        let run = env::var("TEST_RUN").unwrap_or_else(|_| std::process::id().to_string());
        if fs::read_to_string(&of_run).is_ok_and(|made_in| made_in == run) {
            return file_in(&output);
        }
        let _ = fs::remove_dir_all(&output);
        let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/package"));
        script.arg("--binaries").arg(binary("meshd").parent().unwrap()).arg("--output").arg(&output);
        let made = script.output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        fs::write(&of_run, run).unwrap();
        file_in(&output)
    })
}

fn file_in(folder: &Path) -> PathBuf {
    fs::read_dir(folder).unwrap().next().unwrap().unwrap().path()
}
