//! What the environment can change in a run.

use std::{env, fmt::Display, path::PathBuf, str::FromStr, time::Duration};

use integration::{Pod, binary};

use crate::subject::Kind;

/// How a run is done.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Turns in which each subject is measured once: `BENCH_PAIRS`, 11 unless it says otherwise.
    pub(crate) turns: u32,
    /// Length of one transfer: `BENCH_SECONDS`, 2.
    pub(crate) transfer: Duration,
    /// `BENCH_QUICK=1`: three turns, one second, and less of everything; good for trying out and for nothing else.
    pub(crate) quick: bool,
    /// `BENCH_SUBJECTS`, separated by commas; else each cell has its own.
    pub(crate) subjects: Option<Vec<Kind>>,
    /// `BENCH_MESHD_OTHER`: another build of meshd, which the subject `meshd-other` runs.
    pub(crate) other_meshd: Option<PathBuf>,
    /// `BENCH_CONGESTION`: TCP's congestion control in the pods, else the machine's.
    pub(crate) congestion_control: Option<String>,
}

impl Settings {
    /// Reads the variables.
    ///
    /// # Panics
    /// When one of them has a value that makes no sense.
    pub(crate) fn read() -> Self {
        let quick = variable::<u8>("BENCH_QUICK").is_some_and(|value| value != 0);
        let other_meshd = variable("BENCH_MESHD_OTHER");
        let subjects = variable::<String>("BENCH_SUBJECTS").map(|names| {
            let known = |name: &str| {
                Kind::ALL.iter().copied().find(|kind| kind.name() == name).unwrap_or_else(|| {
                    panic!("BENCH_SUBJECTS: {name} is none of {:?}", Kind::ALL.map(Kind::name));
                })
            };
            names.split(',').map(str::trim).map(known).collect()
        });
        Self {
            turns: variable("BENCH_PAIRS").unwrap_or(if quick { 3 } else { 11 }).max(1),
            transfer: Duration::from_secs(variable("BENCH_SECONDS").unwrap_or(if quick { 1 } else { 2 }).max(1)),
            quick,
            subjects,
            other_meshd,
            congestion_control: variable("BENCH_CONGESTION"),
        }
    }

    /// The subjects of a cell: those that the environment asks for, else `usual`; another build of meshd, when there is
    /// one, in either case.
    pub(crate) fn subjects(&self, usual: &[Kind]) -> Vec<Kind> {
        let mut subjects = self.subjects.clone().unwrap_or_else(|| usual.to_vec());
        if self.other_meshd.is_some() && !subjects.contains(&Kind::MeshdOther) {
            subjects.push(Kind::MeshdOther);
        }
        subjects
    }

    /// Makes a pod ready for TCP.
    pub(crate) fn prepare(&self, pod: &Pod) {
        if let Some(control) = &self.congestion_control {
            pod.sysctl("net/ipv4/tcp_congestion_control", control);
        }
    }

    /// The versions of all programs that can take part, one a line.
    pub(crate) fn versions(&self) -> Vec<String> {
        let mut versions = vec![
            format!("meshd: {}", env!("CARGO_PKG_VERSION")),
            format!("meshd's program: {}", binary("meshd").display()),
        ];
        versions.extend(self.congestion_control.iter().map(|control| format!("TCP in the pods with {control}")));
        versions.extend(self.other_meshd.iter().map(|path| format!("meshd-other: {}", path.display())));
        let others = Kind::ALL.iter().filter_map(|kind| kind.implementation().map(|program| (kind, program)));
        versions.extend(others.map(|(kind, program)| format!("{}: {}", kind.name(), program.version())));
        versions
    }
}

fn variable<T: FromStr<Err: Display>>(name: &str) -> Option<T> {
    let text = env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}
