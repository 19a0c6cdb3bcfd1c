//! The policy thread: takes pending input to the core, and does what that decides.

use std::{sync::Arc, time::Instant};

use tokio::sync::watch;

use super::{
    Applied, Options,
    conntrack::Conntrack,
    core::{Done, Effect, Effects, Input, PolicyCore, Work},
    gate::PolicyGate,
    host::Host,
    mailbox::Mailbox,
    ruleset::RuleTable,
    sys::give_back_memory,
    unmatched::Unmatched,
};

/// Where others see how enforcement is.
pub(super) struct Shown {
    pub(super) applied: watch::Sender<Applied>,
    pub(super) host: watch::Sender<Host>,
    pub(super) unmatched: watch::Sender<Unmatched>,
}

pub(super) struct Worker {
    core: PolicyCore,
    table: RuleTable,
    mailbox: Arc<Mailbox>,
    gate: Arc<PolicyGate>,
    shown: Shown,
}

impl Worker {
    /// Closes the way to pods, unless rules of an earlier run stand in it.
    pub(super) fn start(options: Options, mailbox: Arc<Mailbox>, gate: Arc<PolicyGate>, shown: Shown) -> Self {
        let table = RuleTable::new(options.table.clone());
        let mut worker = Self { core: PolicyCore::new(Instant::now(), options), table, mailbox, gate, shown };
        worker.step(Input::Started);
        worker
    }

    /// Until the mailbox is stopped.
    pub(super) fn run(mut self) {
        while let Some(mut pending) = self.mailbox.wait(self.core.next_deadline(self.gate.has_flows())) {
            let questions = std::mem::take(&mut pending.questions);
            self.step(Input::Received(Box::new(pending)));
            for question in questions {
                (question.0)(self.core.world());
            }
        }
    }

    /// Steps until no work is left.
    fn step(&mut self, input: Input) {
        let mut input = Some(input);
        while let Some(happened) = input.take() {
            let Effects { at_once, work } = self.core.step(Instant::now(), happened);
            at_once.into_iter().for_each(|effect| self.perform(effect));
            input = work.map(|work| Input::Done(self.work(work)));
        }
    }

    fn perform(&self, effect: Effect) {
        match effect {
            Effect::CloseGate => self.gate.close(),
            Effect::OpenGate(in_force) => self.gate.set(in_force),
            Effect::Publish(applied) => drop(self.shown.applied.send_replace(applied)),
            Effect::ShowHost(host) => drop(self.shown.host.send_replace(host)),
            Effect::ShowUnmatched(unmatched) => drop(self.shown.unmatched.send_replace(unmatched)),
            Effect::GiveBackMemory => give_back_memory(),
            Effect::Sweep(count) => self.gate.sweep(Instant::now(), count),
        }
    }

    fn work(&mut self, work: Work) -> Done {
        match work {
            Work::Inspect => Done::Inspected(self.table.is_whole()),
            Work::ReadHost { ports, own, before } => Done::HostRead(Host::prepared(&ports, &own, &before)),
            Work::Close(frame) => Done::Closed(self.table.close(&frame)),
            Work::Put(frame, ruleset) => Done::Put(self.table.put(&frame, ruleset)),
            Work::Forget(addresses) => {
                Done::Forgotten(Conntrack::open().and_then(|mut conntrack| conntrack.forget(&addresses)))
            }
            Work::LoadFlows { own, classifier } => Done::FlowsLoaded(Conntrack::open().and_then(|mut conntrack| {
                conntrack.dump(|flow| self.gate.insert_known(&classifier, &flow, &own, Instant::now()))
            })),
        }
    }
}
