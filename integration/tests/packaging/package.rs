//! The package that scenarios install.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use integration::binary;

/// The Debian package of the binaries that were built beside this test; made once.
pub(crate) fn package() -> &'static Path {
    static PACKAGE: OnceLock<PathBuf> = OnceLock::new();
    PACKAGE.get_or_init(|| {
        let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join("debian");
        let _ = fs::remove_dir_all(&output);
        let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/package"));
        script.arg("--binaries").arg(binary("meshd").parent().unwrap()).arg("--output").arg(&output);
        let made = script.output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        fs::read_dir(&output).unwrap().next().unwrap().unwrap().path()
    })
}
