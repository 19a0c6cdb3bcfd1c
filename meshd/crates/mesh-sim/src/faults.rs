//! Histories: faults of a mesh, and the rest at their end.

use std::time::Duration;

use control_core::{core::Input, types::Write};
use rand::Rng as _;

use crate::{
    machine::KernelRefusal,
    world::{CONFIG, MeshSim, What},
};

/// How long things go wrong.
const DISTURBED: Duration = Duration::from_secs(150);
/// Until when all is at rest after that: a lease, the hold of withdrawals, the proof of a direct path that has failed.
const RECOVERY: Duration = Duration::from_secs(150);

impl MeshSim {
    /// The history of this seed: 30 to 50 nodes that start, two and a half minutes of faults, and the time until all is
    /// at rest.
    ///
    /// # Panics
    /// When an invariant is broken.
    pub fn run(seed: u64) -> Self {
        let nodes = 30 + u8::try_from(seed % 21).unwrap();
        let mut world = Self::new(seed, nodes);
        for node in 0..world.machines.len() {
            let delay = world.millis(0..10_000);
            world.at(delay, What::Start { node });
        }
        world.pass_time(Duration::from_secs(20));
        world.faults = true;
        let end = world.now + DISTURBED;
        while world.now < end {
            let gap = world.millis(10..6000);
            world.pass_time(gap);
            world.disturb();
        }
        world.heal();
        world
    }

    fn disturb(&mut self) {
        let node = self.rng.random_range(0..self.machines.len());
        match self.rng.random_range(0..17) {
            0 | 1 => {
                self.crash(node);
                if self.rng.random_range(0..4) == 0 {
                    self.machines[node].kernel.refuses = KernelRefusal::Policies;
                }
                let away = if self.rng.random() { self.millis(1..2000) } else { self.millis(1..60_000) };
                self.at(away, What::Start { node });
            }
            2 => {
                self.machines[node].etcd_reachable ^= true;
                self.disconnect(node);
            }
            3 => self.etcd_away(),
            4 => {
                let keys: Vec<String> = self.etcd.keys.keys().filter(|key| *key != "config").cloned().collect();
                if !keys.is_empty() {
                    let key = keys[self.rng.random_range(0..keys.len())].clone();
                    self.operator(vec![Write::Delete { key }]);
                }
            }
            5 => {
                let attached = !self.machines[node].attached;
                self.machines[node].attached = attached;
                self.take(node, Input::Attached(attached));
            }
            6 => {
                // A cache that was lost.
                self.crash(node);
                self.machines[node].disk = None;
                self.at(Duration::from_millis(500), What::Start { node });
            }
            7 => {
                // An operator gives a subnet away.
                let id = self.machines[node].id.to_string();
                let own = self.history.subnets_of(&id).next().cloned();
                if let Some(key) = own {
                    self.operator_puts(&key, r#"{"Node": "other"}"#);
                }
            }
            8 => self.delete_all(),
            9 => {
                let backup = self.etcd.clone();
                self.backups.push(backup);
            }
            10 if !self.backups.is_empty() => self.restore_any(),
            11 | 12 => {
                let refusals =
                    [KernelRefusal::Nothing, KernelRefusal::Rules, KernelRefusal::Routes, KernelRefusal::Policies];
                self.machines[node].kernel.refuses = refusals[self.rng.random_range(0..refusals.len())];
            }
            13 => self.machines[node].lan_up ^= true,
            14 => {
                let jump = Duration::from_secs(self.rng.random_range(0..200_000));
                let clock = &mut self.machines[node].clock;
                *clock = if self.rng.random() { *clock + jump } else { clock.saturating_sub(jump) };
            }
            15 => {
                let keys: Vec<String> = self.etcd.keys.keys().cloned().collect();
                let key = keys[self.rng.random_range(0..keys.len())].clone();
                self.operator_puts(&key, "unreadable");
            }
            _ => self.disconnect(node),
        }
    }

    /// The whole of etcd is away for a while.
    fn etcd_away(&mut self) {
        for node in 0..self.machines.len() {
            self.machines[node].etcd_reachable = false;
            self.disconnect(node);
        }
        let away = self.millis(1000..70_000);
        self.pass_time(away);
        for machine in &mut self.machines {
            machine.etcd_reachable = true;
        }
    }

    /// An operator restores one of the backups, into the same cluster of etcd or another one.
    fn restore_any(&mut self) {
        let index = self.rng.random_range(0..self.backups.len());
        // Later ones are of a history that is over.
        self.backups.truncate(index + 1);
        let backup = self.backups[index].clone();
        if self.rng.random() {
            self.etcd.becomes_another_cluster();
        }
        self.restore(&backup);
    }

    /// An operator deletes everything; the configuration comes back later.
    fn delete_all(&mut self) {
        let writes = self.etcd.keys.keys().map(|key| Write::Delete { key: key.clone() }).collect();
        self.operator(writes);
        let away = self.millis(1..40_000);
        self.pass_time(away);
        self.operator_puts("config", CONFIG);
    }

    /// The faults end, and what was given away is free again: all must come to rest.
    fn heal(&mut self) {
        self.faults = false;
        let given: Vec<String> = self.history.subnets_of("other").cloned().collect();
        self.operator(given.into_iter().map(|key| Write::Delete { key }).collect());
        self.operator_puts("config", CONFIG);
        for node in 0..self.machines.len() {
            let machine = &mut self.machines[node];
            (machine.etcd_reachable, machine.lan_up, machine.attached) = (true, true, false);
            machine.kernel.refuses = KernelRefusal::Nothing;
            self.take(node, Input::Attached(false));
            self.at(Duration::ZERO, What::Start { node });
        }
        self.pass_time(Duration::from_secs(60));
        // What an etcd that went back lacks stays in force until an operator decides.
        for node in 0..self.machines.len() {
            self.take(node, Input::Accept);
        }
        self.pass_time(RECOVERY);
        self.check_rest();
    }
}
