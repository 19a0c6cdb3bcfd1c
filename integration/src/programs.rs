//! Paths of the programs that scenarios start.

use std::{env, path::PathBuf};

/// A binary of this workspace, from the folder that the running test or program was built into.
///
/// # Panics
/// When it has not been built.
#[must_use]
#[track_caller]
pub fn binary(name: &str) -> PathBuf {
    let own = env::current_exe().unwrap_or_else(|error| panic!("no path to this program: {error}"));
    // Tests are one folder deeper, in `deps`.
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not built; run: cargo build --workspace"))
}

/// A binary from the package of the previous release, which `scripts/install-previous` makes.
///
/// # Panics
/// When it has not been built.
#[must_use]
#[track_caller]
pub fn previous(name: &str) -> PathBuf {
    tool("previous", name).unwrap_or_else(|| panic!("the previous {name} is not built; run: scripts/install-previous"))
}

/// A program in this folder of the build's tools.
pub(crate) fn tool(folder: &str, name: &str) -> Option<PathBuf> {
    let own = env::current_exe().ok()?;
    // …/target/PROFILE/deps/test or …/target/PROFILE/program
    let mut targets = own.ancestors().skip(2).take(3);
    targets.find_map(|target| Some(target.join("tools").join(folder).join(name)).filter(|path| path.is_file()))
}
