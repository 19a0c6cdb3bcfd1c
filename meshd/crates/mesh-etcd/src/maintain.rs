//! What a CronJob does: a snapshot, members as wanted, certificates renewed, data files defragmented.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use ring::digest::{Context as Digest, SHA256, SHA256_OUTPUT_LEN};
use time::{OffsetDateTime, format_description::BorrowedFormatItem, macros::format_description};

use crate::setup::{Answering, Options, reconcile};

const NAME: &[BorrowedFormatItem<'static>] = format_description!("[year][month][day]T[hour][minute][second]Z");
const SUFFIX: &str = "db";

/// Runs once.
///
/// # Errors
/// What failed; the rest is done all the same.
pub(crate) async fn maintain(options: &Options, snapshots: &Path, keep: usize) -> anyhow::Result<()> {
    // The snapshot comes first: what follows may be in trouble.
    let snapshot = snapshot(options, snapshots, keep).await;
    let reconciled = reconcile(options).await;
    let defragmented = defragment(options).await;
    snapshot.and(reconciled).and(defragmented)
}

async fn snapshot(options: &Options, folder: &Path, keep: usize) -> anyhow::Result<()> {
    let Answering { members, urls } = options.answering().await?;
    let Some((url, _)) = urls.first() else { bail!("no snapshot: no member answers") };
    let mut writer = SnapshotWriter::create(folder)?;
    members.snapshot(url, |piece| writer.write(piece)).await.context("no snapshot")?;
    let file = writer.finish(OffsetDateTime::now_utc())?;
    tracing::info!(file = %file.display(), "snapshot written");
    prune(folder, keep)
}

/// One after the other; the leader comes last: it has the most to do.
async fn defragment(options: &Options) -> anyhow::Result<()> {
    let Answering { members, urls } = options.answering().await?;
    for (url, _) in &urls {
        members.defragment(url).await.with_context(|| format!("{url} not defragmented"))?;
    }
    Ok(())
}

/// Whether a snapshot is whole.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check(file: &Path) -> anyhow::Result<()> {
    let mut reader = fs::File::open(file).with_context(|| format!("{}", file.display()))?;
    let (mut sum, mut piece) = (TrailingDigest::new(), vec![0; 1 << 16]);
    loop {
        match reader.read(&mut piece)? {
            0 => return sum.finish().with_context(|| format!("{}", file.display())),
            length => sum.update(&piece[..length]),
        }
    }
}

/// A snapshot ends with the SHA-256 of what is before.
struct TrailingDigest {
    digest: Digest,
    /// The last bytes, which may be the digest.
    tail: Vec<u8>,
}

impl TrailingDigest {
    fn new() -> Self {
        Self { digest: Digest::new(&SHA256), tail: Vec::new() }
    }

    fn update(&mut self, piece: &[u8]) {
        self.tail.extend_from_slice(piece);
        let whole = self.tail.len().saturating_sub(SHA256_OUTPUT_LEN);
        self.digest.update(&self.tail[..whole]);
        self.tail.drain(..whole);
    }

    fn finish(self) -> anyhow::Result<()> {
        if self.digest.finish().as_ref() != self.tail {
            bail!("the snapshot is not whole: its SHA-256 is not the one at its end");
        }
        Ok(())
    }
}

/// Writes a snapshot under its name once it is whole. Only root can read it: it has pre-shared keys.
struct SnapshotWriter {
    folder: PathBuf,
    part: PathBuf,
    file: fs::File,
    sum: TrailingDigest,
}

impl SnapshotWriter {
    fn create(folder: &Path) -> anyhow::Result<Self> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.with_context(|| format!("{}", folder.display()))?;
        let part = folder.join("part");
        let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part);
        let file = file.with_context(|| format!("{}", part.display()))?;
        Ok(Self { folder: folder.to_owned(), part, file, sum: TrailingDigest::new() })
    }

    fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.file.write_all(piece)?;
        self.sum.update(piece);
        Ok(())
    }

    fn finish(self, now: OffsetDateTime) -> anyhow::Result<PathBuf> {
        self.sum.finish()?;
        self.file.sync_all()?;
        let file = self.folder.join(format!("{}.{SUFFIX}", now.format(NAME)?));
        fs::rename(&self.part, &file).with_context(|| format!("{}", file.display()))?;
        fs::File::open(&self.folder)?.sync_all()?;
        Ok(file)
    }
}

/// Deletes all but the newest.
fn prune(folder: &Path, keep: usize) -> anyhow::Result<()> {
    let mut snapshots: Vec<PathBuf> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    snapshots.retain(|path| path.extension().is_some_and(|extension| extension == SUFFIX));
    snapshots.sort();
    for old in snapshots.iter().rev().skip(keep) {
        fs::remove_file(old).with_context(|| format!("{}", old.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_800_000_000 + second).unwrap()
    }

    fn written(folder: &Path, data: &[u8], size: usize, second: i64) -> anyhow::Result<PathBuf> {
        let mut writer = SnapshotWriter::create(folder).unwrap();
        for piece in data.chunks(size) {
            writer.write(piece).unwrap();
        }
        writer.finish(at(second))
    }

    #[test]
    fn only_a_whole_snapshot_gets_its_name_and_the_newest_stay() {
        let folder = tempfile::tempdir().unwrap();
        let mut data = vec![7; 1000];
        data.extend_from_slice(ring::digest::digest(&SHA256, &data).as_ref());
        for size in [1, 31, 32, 33, 999, 2000] {
            let file = written(folder.path(), &data, size, i64::try_from(size).unwrap()).unwrap();
            assert_eq!(fs::read(&file).unwrap(), data);
            check(&file).unwrap();
            fs::write(folder.path().join("cut"), &data[..1001]).unwrap();
            assert!(check(&folder.path().join("cut")).is_err());
        }
        assert!(written(folder.path(), &data[..1000], 100, 5000).is_err(), "cut short");
        assert!(written(folder.path(), &[], 100, 5001).is_err(), "empty");
        fs::write(folder.path().join("notes.txt"), "mine").unwrap();
        prune(folder.path(), 2).unwrap();
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["20270115T081639Z.db", "20270115T083320Z.db", "cut", "notes.txt", "part"]);
    }
}
