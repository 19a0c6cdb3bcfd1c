//! `meshd cleanup`: removes the kernel state of earlier runs. It creates nothing: on a machine that never had a daemon,
//! it finds nothing and leaves no trace.

use std::{fs, io, path::Path};

use anyhow::Context as _;
use api;
use cni::bridge;
use control::state_dir::{StateDirError, lock_existing};
use ipnet::IpNet;
use kernel::{self, AttachedRoutes, Kernel};
use netlink::Netlink;

use super::{RunOutcome, privilege, subnets_in_cache};
use crate::{settings::CleanupSettings, subnet_env};

/// Removes all that meshd has put into the kernel of this machine.
///
/// # Errors
/// When something cannot be looked at or removed.
pub async fn cleanup(settings: CleanupSettings) -> anyhow::Result<RunOutcome> {
    privilege::demand("cleanup", &[privilege::NET_ADMIN])?;
    // Held to the end, so that no daemon starts meanwhile.
    let _lock = match lock_existing(&settings.state_dir) {
        Ok(lock) => lock,
        Err(error @ StateDirError::InUse { .. }) => {
            return Ok(RunOutcome::Refused(format!("{error}; stop the daemon first")));
        }
        Err(error) => return Err(error.into()),
    };
    let kernel = Kernel::new(kernel::Options::new(settings.interface.clone(), settings.state_dir.clone()))?;
    remove_idle_bridges(&settings.run_dir);
    if !settings.force {
        let attachments = kernel.attachments(&known_subnets(&settings)).await?;
        if let Some(reason) = refusal(&attachments) {
            return Ok(RunOutcome::Refused(reason));
        }
    }
    let cleanup = kernel.cleanup().await?;
    for item in &cleanup.removed {
        tracing::info!(%item, "removed from the kernel");
    }
    for file in ["subnet.env", api::SOCKET] {
        match fs::remove_file(settings.run_dir.join(file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("{file} in {}", settings.run_dir.display()));
            }
            _ => {}
        }
    }
    if let Some(failure) = cleanup.failures.first() {
        let more = cleanup.failures.len() - 1;
        anyhow::bail!("{}: {}; {} ({more} more)", failure.what, failure.problem, failure.remedy());
    }
    Ok(RunOutcome::Done)
}

/// Removes the plugin's bridges without a container: they are no attachments. A bridge that cannot be removed is
/// reported as one.
fn remove_idle_bridges(run_dir: &Path) {
    let removed = Netlink::open().map_err(Into::into);
    match removed.and_then(|mut netlink| bridge::remove_idle(&mut netlink, run_dir, None)) {
        Ok(removed) => removed.iter().for_each(|bridge| tracing::info!(bridge, "idle bridge removed")),
        Err(error) => tracing::warn!(%error, "cannot remove idle bridges"),
    }
}

/// The subnets that this node had when it last wrote them down: in its cache, for plugins. Neither file has to be
/// there.
fn known_subnets(settings: &CleanupSettings) -> Vec<IpNet> {
    let env = settings.run_dir.join("subnet.env");
    let mut subnets = subnets_in_cache(&settings.state_dir).unwrap_or_else(|error| {
        tracing::warn!(%error, "cache unreadable");
        Vec::new()
    });
    subnets.extend(subnet_env::read_subnets(&env).unwrap_or_else(|error| {
        tracing::warn!(file = %env.display(), %error, "subnet.env unreadable");
        Vec::new()
    }));
    subnets
}

/// Why nothing may be removed without `--force`.
fn refusal(attachments: &AttachedRoutes) -> Option<String> {
    let listed = |routes: &[IpNet]| {
        let first = routes.first().map(ToString::to_string).unwrap_or_default();
        format!("{first}, {} more", routes.len().saturating_sub(1))
    };
    match attachments {
        AttachedRoutes::None => None,
        AttachedRoutes::Routes(routes) => Some(format!(
            "containers are still attached: foreign routes lead into this node's subnets ({}); stop them first, or \
             use --force",
            listed(routes)
        )),
        AttachedRoutes::Possible(routes) => Some(format!(
            "containers may still be attached: this node's subnet is unknown, and foreign routes lead into the mesh \
             network ({}); stop them first, or use --force",
            listed(routes)
        )),
    }
}

#[cfg(test)]
mod tests {
    use control::state_dir::StateDir;

    use super::*;

    #[test]
    fn a_running_daemon_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = StateDir::open(dir.path()).unwrap();
        let error = lock_existing(dir.path()).unwrap_err();
        assert!(
            matches!(&error, StateDirError::InUse { holder, .. } if *holder == std::process::id().to_string()),
            "{error}"
        );
        drop(daemon);
        let lock = lock_existing(dir.path()).unwrap();
        assert!(lock.is_some() && matches!(StateDir::open(dir.path()), Err(StateDirError::InUse { .. })));
    }

    #[test]
    fn nothing_is_made_where_nothing_is() {
        let dir = tempfile::tempdir().unwrap();
        assert!(lock_existing(dir.path()).unwrap().is_none());
        assert!(lock_existing(&dir.path().join("never")).unwrap().is_none());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn another_error_is_no_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(lock_existing(&file), Err(StateDirError::Io { .. })));
    }

    fn settings(dir: &Path) -> CleanupSettings {
        CleanupSettings {
            mistakes: Vec::new(),
            interface: "meshd0".parse().unwrap(),
            state_dir: dir.to_owned(),
            run_dir: dir.to_owned(),
            force: false,
            log: program::log::Log { level: tracing::Level::INFO, format: program::log::LogFormat::Text },
        }
    }

    /// Root runs it, and the user of the daemon owns both directories.
    #[test]
    fn no_planted_file_is_followed_or_awaited() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let target = outside.path().join("target");
        fs::write(&target, "FLANNEL_SUBNET=10.244.3.1/24\n").unwrap();
        for name in ["subnet.env", "lock"] {
            let planted = dir.path().join(name);
            std::os::unix::fs::symlink(&target, &planted).unwrap();
            assert_eq!(known_subnets(&settings(dir.path())), []);
            assert!(name != "lock" || matches!(lock_existing(dir.path()), Err(StateDirError::Io { .. })));
            fs::remove_file(&planted).unwrap();
            nix::unistd::mkfifo(&planted, nix::sys::stat::Mode::S_IRWXU).unwrap();
            assert_eq!(known_subnets(&settings(dir.path())), []);
            assert!(name != "lock" || matches!(lock_existing(dir.path()), Err(StateDirError::Io { .. })));
        }
    }

    /// The holder's name is the daemon's to write, and root's terminal shows it.
    #[test]
    fn only_a_process_is_shown_as_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        let _daemon = StateDir::open(dir.path()).unwrap();
        fs::write(dir.path().join("lock"), "\u{1b}[2J").unwrap();
        let error = lock_existing(dir.path()).unwrap_err();
        assert!(matches!(&error, StateDirError::InUse { holder, .. } if holder == "unknown"), "{error}");
    }

    #[test]
    fn both_files_tell_subnets_and_damage_to_one_hides_nothing_of_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path());
        assert_eq!(known_subnets(&settings), []);
        fs::write(dir.path().join("subnet.env"), "FLANNEL_SUBNET=10.244.3.1/24\n").unwrap();
        fs::create_dir(dir.path().join("cache")).unwrap();
        assert_eq!(known_subnets(&settings), ["10.244.3.0/24".parse().unwrap()]);
    }
}
