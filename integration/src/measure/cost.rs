//! The cost of an interval: CPU time of the whole machine and of a process, and memory.

use std::{
    fs,
    ops::Sub,
    time::{Duration, Instant},
};

/// Clock ticks a second in `/proc`: the kernel's `USER_HZ`, the same on every Linux.
const TICKS: f64 = 100.0;

/// Flag of a kernel thread in `/proc/PID/stat`; `PF_KTHREAD` in `linux/sched.h`.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Processor time of the whole machine since it started, over all cores.
///
/// Programs that run beside a measurement would count as its cost. They are told apart by where they are: what belongs
/// to a Lab lives in its namespaces; the rest of the user's processes, except this one, are others.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CpuTime {
    /// User, nice, system, interrupts and soft interrupts, in seconds, without that of other programs.
    pub busy: f64,
    /// What other programs took, in seconds. A figure taken while there is much of it says little.
    pub others: f64,
    /// Time that the machine's own host gave to others, in seconds. A figure taken while there is much of it says
    /// little.
    pub stolen: f64,
}

impl CpuTime {
    /// As it is now.
    ///
    /// # Panics
    /// When the kernel does not say.
    #[must_use]
    pub fn now() -> Self {
        let others = others();
        let text = fs::read_to_string("/proc/stat").expect("/proc/stat");
        let machine = Self::parse(&text).expect("a line cpu in /proc/stat");
        Self { busy: machine.busy - others, others, ..machine }
    }

    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let fields: Vec<f64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
        let [user, nice, system, _idle, _iowait, interrupts, soft, stolen, ..] = fields[..] else { return None };
        Some(Self { busy: (user + nice + system + interrupts + soft) / TICKS, others: 0.0, stolen: stolen / TICKS })
    }
}

impl Sub for CpuTime {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        // One of the others may have ended in between, and its time with it.
        let others = (self.others - earlier.others).max(0.0);
        let whole = (self.busy + self.others) - (earlier.busy + earlier.others);
        Self { busy: whole - others, others, stolen: self.stolen - earlier.stolen }
    }
}

/// What some work cost the whole machine.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Processor time of the whole machine.
    pub cpu: CpuTime,
    /// Time on the clock.
    pub took: Duration,
}

impl Cost {
    /// Does the work and says what it cost.
    pub fn of<T>(work: impl FnOnce() -> T) -> (T, Self) {
        let (start, before) = (Instant::now(), CpuTime::now());
        let result = work();
        (result, Self { cpu: CpuTime::now() - before, took: start.elapsed() })
    }
}

/// Processor time that a process has used since its start, user and system, in all its threads. Zero when it has ended.
#[must_use]
pub fn process_cpu(pid: u32) -> Duration {
    Duration::from_secs_f64(stat(&pid.to_string()).map_or(0.0, |stat| stat.seconds))
}

/// Memory of a process that is resident now, in bytes. Zero when it has ended.
#[must_use]
pub fn resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes: u64 =
        line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse().ok()).unwrap_or_default();
    kibibytes * 1024
}

/// Processor time of the user's processes that share this one's network namespace, in seconds.
fn others() -> f64 {
    let own = std::process::id().to_string();
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let Some(here) = namespace(&own) else { return 0.0 };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()) && *name != own)
        .filter(|pid| namespace(pid).is_some_and(|there| there == here))
        .filter_map(|pid| stat(&pid))
        .filter(|stat| !stat.kernel)
        .map(|stat| stat.seconds)
        .sum()
}

struct ProcessStat {
    kernel: bool,
    seconds: f64,
}

fn stat(pid: &str) -> Option<ProcessStat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name in brackets: the 7th field are the flags, the 12th and 13th utime and stime.
    let fields: Vec<u64> =
        text.rsplit(')').next()?.split_whitespace().map(|field| field.parse().unwrap_or_default()).collect();
    let ticks = fields.get(11)? + fields.get(12)?;
    Some(ProcessStat { kernel: fields.get(6)? & KERNEL_THREAD != 0, seconds: ticks as f64 / TICKS })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_not_busy_and_stolen_time_is_apart() {
        let stat = "cpu  100 20 300 5000 60 7 80 900 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n";
        assert_eq!(CpuTime::parse(stat), Some(CpuTime { busy: 5.07, others: 0.0, stolen: 9.0 }));
        assert_eq!(CpuTime::parse("intr 1"), None);
    }

    #[test]
    fn the_time_of_others_is_not_ours() {
        let earlier = CpuTime { busy: 10.0, others: 3.0, stolen: 0.0 };
        let later = CpuTime { busy: 12.0, others: 7.0, stolen: 1.0 };
        assert_eq!(later - earlier, CpuTime { busy: 2.0, others: 4.0, stolen: 1.0 });
        let ended = CpuTime { busy: 16.0, others: 1.0, stolen: 0.0 };
        assert_eq!((ended - earlier).busy, 4.0);
    }

    #[test]
    fn a_process_has_memory_and_one_that_is_not_there_has_none() {
        assert!(resident_bytes(std::process::id()) > 100_000);
        assert_eq!(resident_bytes(0), 0);
        assert_eq!(process_cpu(0), Duration::ZERO);
    }
}
