//! The life cycle of a Lab: names, directory and cleanup.
//!
//! A Lab's id is `lab<pid>x<number>`. Its namespaces are `/run/netns/<id>-<host>`, its files are in
//! `/run/meshd-lab/<id>/`, and the process that owns it locks `/run/meshd-lab/<id>.lock`. One script cleans up. It runs
//! from three places: the Lab's `Drop`; a reaper, a child process that waits for the end of its parent's pipe, even
//! after `kill -9`; and a sweep at the next [`Lab::new`] for Labs without a lock holder, in case both were killed. The
//! script kills all processes in the Lab's namespaces, including detached ones.

pub(crate) mod host;
pub(crate) mod interface;
pub(crate) mod namespace;
pub(crate) mod process;
pub(crate) mod router;
pub(crate) mod switch;

use std::{
    env, fs,
    io::Write as _,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
};

use host::Host;
use namespace::Namespace;
use router::{Nat, Router};
use switch::Switch;

/// Where Labs keep their files. Short, because unix sockets live below it.
const ROOT: &str = "/run/meshd-lab";
/// Where `ip netns` looks for namespaces.
const NETNS: &str = "/run/netns";
const CLEAN: &str = include_str!("lab/clean.sh");
/// The reaper: `$0` is the script above, so that the two shells need no file.
const REAP: &str = r#"cat >/dev/null; [ -e "$2/kept" ] || exec bash -c "$0" clean "$1" "$2""#;
/// Beyond the indices that the kernel gives out by itself in a new namespace.
const FIRST_LINK_INDEX: u32 = 100;
/// Lines of each process's log that a failed scenario prints.
const LOG_LINES: usize = 60;

/// A set of hosts, switches and routers that lives as long as this value.
///
/// Must be created as root.
pub struct Lab {
    shared: Arc<Shared>,
    reaper: Child,
    _lock: Flock<fs::File>,
}

/// What hosts and processes need of their Lab.
pub(crate) struct Shared {
    title: String,
    id: String,
    folder: PathBuf,
    keep: bool,
    /// The Lab is ending: its processes are being killed.
    ending: AtomicBool,
    interfaces: AtomicU32,
    links: AtomicU32,
    /// Name and log file of every process, in order of their start.
    logs: Mutex<Vec<(String, PathBuf)>>,
    namespaces: Mutex<Vec<String>>,
}

impl Lab {
    /// An empty Lab. `title` only appears in messages.
    ///
    /// # Panics
    /// When not root, or when the system refuses.
    #[must_use]
    pub fn new(title: &str) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "a Lab needs root: it makes network namespaces");
        static NEXT: AtomicU32 = AtomicU32::new(0);
        create_folder(Path::new(ROOT));
        own_mount(Path::new(NETNS));
        sweep();

        let id = format!("lab{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = Path::new(ROOT).join(&id);
        let lock = own(&lock_path(&id));
        // An earlier process with the same id may have been killed together with its reaper.
        clean(&id, &folder);
        create_folder(&folder);
        let reaper = Command::new("bash")
            .args(["-c", REAP, CLEAN, &id])
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Out of the terminal's process group: Ctrl-C must not take it along.
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{title}: cannot start the reaper (bash): {error}"));
        Self {
            shared: Arc::new(Shared {
                title: title.to_owned(),
                id,
                folder,
                keep: env::var_os("KEEP").is_some_and(|value| value == "1"),
                ending: AtomicBool::new(false),
                interfaces: AtomicU32::new(0),
                links: AtomicU32::new(0),
                logs: Mutex::default(),
                namespaces: Mutex::default(),
            }),
            reaper,
            _lock: lock,
        }
    }

    /// The Lab's id: the prefix of its namespaces' names.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// The Lab's folder, removed with it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.shared.folder
    }

    /// A host: a namespace with `lo` up and forwarding off.
    #[must_use]
    pub fn host(&self, name: &str) -> Host {
        Host::new(self.namespace(name))
    }

    /// A switch without ports, in a namespace of its own.
    #[must_use]
    pub fn switch(&self, name: &str) -> Switch {
        Switch::new(self.namespace(name))
    }

    /// A router: a host that forwards.
    #[must_use]
    pub fn router(&self, name: &str) -> Router {
        Router::new(self.namespace(name))
    }

    /// A router that can translate addresses; see [`Nat::masquerade`].
    #[must_use]
    pub fn nat(&self, name: &str) -> Nat {
        Nat::new(self.namespace(name))
    }

    /// An interface name (at most 15 characters) that no other Lab on this machine uses. Userspace WireGuard needs
    /// one, because its sockets live in a folder that all namespaces share; that socket is removed with the Lab.
    #[must_use]
    pub fn unique_interface(&self, prefix: &str) -> String {
        self.shared.unique_interface(prefix)
    }

    /// A line that shows how to look into the Lab, for one that is kept.
    #[must_use]
    pub fn how_to_look_in(&self) -> String {
        let namespaces = self.shared.namespaces.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = format!(
            "{}: kept. Files: {}. Remove it with: lab-tool clean {}\n",
            self.shared.title,
            self.shared.folder.display(),
            self.shared.id,
        );
        for name in namespaces.iter() {
            text += &format!("    ip netns exec {name} bash\n");
        }
        text
    }

    fn namespace(&self, name: &str) -> Namespace {
        Namespace::create(&self.shared, name)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        if thread::panicking() {
            self.shared.print_logs();
        }
        if self.shared.keep {
            // Written first: from here on neither the reaper nor a sweep touches the Lab.
            let _ = fs::write(self.shared.folder.join("kept"), "");
            eprint!("{}", self.how_to_look_in());
        } else {
            clean(&self.shared.id, &self.shared.folder);
            let _ = fs::remove_file(lock_path(&self.shared.id));
        }
        drop(self.reaper.stdin.take());
        let _ = self.reaper.wait();
    }
}

impl Shared {
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    pub(crate) fn keep(&self) -> bool {
        self.keep
    }

    /// A log file for a process called `name`, remembered for when the scenario fails.
    pub(crate) fn log_file(&self, name: &str) -> PathBuf {
        let mut logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.folder.join(format!("{}-{name}.log", logs.len()));
        logs.push((name.to_owned(), path.clone()));
        path
    }

    /// The index of the first end of a new link; the next number is that of the second.
    pub(crate) fn next_link_index(&self) -> u32 {
        FIRST_LINK_INDEX + 2 * self.links.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn unique_interface(&self, prefix: &str) -> String {
        let number = self.interfaces.fetch_add(1, Ordering::Relaxed);
        // `lab<pid>x<n>` in base 36, which leaves room for a prefix of four characters.
        let id: Vec<String> =
            self.id["lab".len()..].split('x').map(|part| base36(part.parse().unwrap_or_default())).collect();
        let name = format!("{prefix}{}{}", id.join("x"), base36_pair(number));
        assert!(name.len() <= 15, "interface name {name} is too long");
        let list = fs::OpenOptions::new().create(true).append(true).open(self.folder.join("interfaces"));
        list.and_then(|mut list| writeln!(list, "{name}"))
            .unwrap_or_else(|error| panic!("{}: interfaces: {error}", self.folder.display()));
        name
    }

    fn remember_namespace(&self, name: &str) {
        self.namespaces.lock().unwrap_or_else(PoisonError::into_inner).push(name.to_owned());
    }

    fn print_logs(&self) {
        let logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, path) in logs.iter() {
            let text = fs::read(path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            let skipped = lines.len().saturating_sub(LOG_LINES);
            eprintln!("──── {}: log of {name}, {skipped} lines before", self.title);
            for line in &lines[skipped..] {
                eprintln!("{line}");
            }
        }
    }
}

/// Removes the Labs that were kept (`KEEP=1`) or left behind, as far as `wanted` says yes to their id, and returns
/// their ids. Those of running processes are left alone.
pub fn remove_kept(wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let entries = fs::read_dir(ROOT).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let id = entry.file_name().to_str()?.strip_suffix(".lock")?.to_owned();
            let file = fs::File::open(entry.path()).ok()?;
            // Held until all is removed: another Lab of this name waits for it in `own`.
            let _lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()?;
            if !wanted(&id) {
                return None;
            }
            clean(&id, &Path::new(ROOT).join(&id));
            let _ = fs::remove_file(entry.path());
            Some(id)
        })
        .collect()
}

/// Cleans up Labs whose process is gone, except kept ones.
fn sweep() {
    remove_kept(|id| !Path::new(ROOT).join(id).join("kept").exists());
}

/// Creates the lock file and locks it, for as long as the returned value lives.
fn own(path: &Path) -> Flock<fs::File> {
    loop {
        let file = fs::File::create(path).unwrap_or_else(|error| panic!("cannot create {}: {error}", path.display()));
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .unwrap_or_else(|(_, error)| panic!("cannot lock {}: {error}", path.display()));
        // A sweep may have taken the fresh file for an abandoned one and removed it.
        let ours = lock.metadata().map(|data| data.ino());
        let there = fs::metadata(path).map(|data| data.ino());
        if ours.is_ok() && ours.ok() == there.ok() {
            return lock;
        }
    }
}

fn clean(id: &str, folder: &Path) {
    let status = Command::new("bash").args(["-c", CLEAN, "clean", id]).arg(folder).stdin(Stdio::null()).status();
    if !status.as_ref().is_ok_and(std::process::ExitStatus::success) {
        eprintln!("{id}: cleaning up failed: {status:?}");
    }
}

fn lock_path(id: &str) -> PathBuf {
    Path::new(ROOT).join(format!("{id}.lock"))
}

fn create_folder(path: &Path) {
    fs::create_dir_all(path).unwrap_or_else(|error| panic!("cannot create {}: {error}", path.display()));
}

/// Makes a folder that is a mount of its own. `ip netns` and podman mount the folder of namespaces on itself when it is
/// none, which would hide what Labs have mounted in it, so that it could not be taken away again.
fn own_mount(path: &Path) {
    create_folder(path);
    let _one_at_a_time = own(&Path::new(ROOT).join("netns.mount"));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if mounts.lines().any(|line| line.split(' ').nth(4).map(Path::new) == Some(path)) {
        return;
    }
    mount(Some(path), path, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .and_then(|()| mount(None::<&str>, path, None::<&str>, MsFlags::MS_SHARED, None::<&str>))
        .unwrap_or_else(|error| panic!("cannot mount {} on itself: {error}", path.display()));
}

fn base36(mut number: u32) -> String {
    const DIGITS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut digits = Vec::new();
    loop {
        digits.push(DIGITS[(number % 36) as usize]);
        number /= 36;
        if number == 0 {
            break;
        }
    }
    digits.reverse();
    String::from_utf8_lossy(&digits).into_owned()
}

/// Two digits, so that the name before it cannot run into it.
fn base36_pair(number: u32) -> String {
    format!("{:0>2}", base36(number))
}
