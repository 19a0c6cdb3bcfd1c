//! A certificate authority for tests, made with `openssl`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

pub(super) struct Authority {
    folder: tempfile::TempDir,
}

impl Authority {
    pub(super) fn new() -> Self {
        let authority = Self { folder: tempfile::tempdir().unwrap() };
        authority.openssl(&format!("req -x509 {NEW_KEY} -subj /CN=ca -days 1 -keyout ca.key -out ca.pem"));
        fs::write(authority.file("extensions"), "subjectAltName=IP:127.0.0.1\n").unwrap();
        authority
    }

    /// `NAME.pem` and `NAME.key`, of a server at 127.0.0.1 or of a client whose etcd user is `user`.
    pub(super) fn issue(&self, name: &str, user: &str) {
        self.openssl(&format!("req {NEW_KEY} -subj /CN={user} -keyout {name}.key -out {name}.csr"));
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -extfile extensions -out {name}.pem"
        ));
    }

    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn openssl(&self, words: &str) {
        let output = Command::new("openssl").args(words.split(' ')).current_dir(self.folder.path()).output().unwrap();
        assert!(output.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

const NEW_KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
