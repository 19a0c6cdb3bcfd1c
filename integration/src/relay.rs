//! An impaired line between two points: delay, loss, reordering and bandwidth, without netem.
//!
//! ```text
//!   switch port ───── left ┤ relay ├ right ───── router interface
//! ```
//!
//! The relay is a namespace with two interfaces. When bypassed, a bridge joins them. When engaged, two threads forward
//! frames, one per direction, and a [`Lane`] decides about each frame. While it is engaged, both far ends have
//! segmentation offloads off, so that a frame is one packet, as on a wire, and VLAN tags are not forwarded.

mod impairment;

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

pub use impairment::{Fate, Impairment, Lane};

use crate::{
    Interface, Namespace, Switch,
    sys::{BATCH, FrameSocket, Slots},
};

/// Room for one frame: a jumbo packet and its header.
const ROOM: usize = 9216;
/// How long a thread sleeps when nothing is due; then it looks whether it is to stop.
const IDLE: Duration = Duration::from_millis(10);
/// While packets leave one after the other, they are carried in batches this far apart: a wake-up for each would cost
/// more than the packet, and a line of 500 Mbit/s has one every 24 µs.
const GRAIN: Duration = Duration::from_micros(200);
/// Packets that may be under way in one direction; what comes on top is lost.
const UNDER_WAY: usize = 1 << 16;

/// A line whose quality a scenario can change at any time. It begins bypassed.
pub struct Relay {
    namespace: Namespace,
    /// The far ends of the two cables.
    ends: [Interface; 2],
    engaged: Mutex<Option<Engaged>>,
}

/// What the relay has done in one direction since it was engaged.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct RelayCount {
    /// Frames sent on.
    pub passed: u64,
    /// Frames that it lost on purpose.
    pub lost: u64,
}

struct Engaged {
    /// From the switch and towards it.
    directions: [Arc<Direction>; 2],
    threads: Vec<JoinHandle<()>>,
}

struct Direction {
    stop: AtomicBool,
    lane: Mutex<Lane>,
    passed: AtomicU64,
    lost: AtomicU64,
}

impl Relay {
    /// Joins `switch` with a new interface `name` of `namespace`; the line between is the relay.
    pub(crate) fn between(switch: &Switch, namespace: &Namespace, name: String) -> (Self, Interface) {
        let place = namespace.sibling(&format!("relay-{}", switch.name()));
        // Without addresses of its own it answers nothing.
        place.sysctls(&[("net/ipv6/conf/all/disable_ipv6", "1"), ("net/ipv6/conf/default/disable_ipv6", "1")]);
        place.ip(&["link add bridge type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set bridge up"]);
        let (_left, port) = switch.plug(&place, "left".to_owned());
        let (_right, end) = Interface::pair((&place, "right".to_owned()), (namespace, name));
        let relay = Self { namespace: place, ends: [port, end.clone()], engaged: Mutex::default() };
        relay.bridge();
        (relay, end)
    }

    /// Makes the line this bad in both directions.
    pub fn set(&self, impairment: Impairment) {
        self.set_each(impairment, impairment);
    }

    /// Makes the line this bad from the switch, and that bad towards it. What is under way still arrives as decided.
    /// Engaging a bypassed relay loses what is on the line in that moment; changes after that lose nothing.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn set_each(&self, from_switch: Impairment, towards_switch: Impairment) {
        let mut engaged = self.engaged.lock().unwrap_or_else(PoisonError::into_inner);
        let lanes = [from_switch, towards_switch].map(Lane::new);
        if let Some(engaged) = engaged.as_ref() {
            for (direction, lane) in engaged.directions.iter().zip(lanes) {
                *direction.lane.lock().unwrap_or_else(PoisonError::into_inner) = lane;
            }
            return;
        }
        self.ends.iter().for_each(Interface::disable_offloads);
        self.namespace.ip(&["link set left nomaster", "link set right nomaster"]);
        let directions = lanes.map(|lane| {
            Arc::new(Direction {
                stop: AtomicBool::new(false),
                lane: Mutex::new(lane),
                passed: AtomicU64::new(0),
                lost: AtomicU64::new(0),
            })
        });
        let threads = directions
            .iter()
            .zip([("left", "right"), ("right", "left")])
            .map(|(direction, (from, to))| {
                let direction = Arc::clone(direction);
                let open = |name| {
                    self.namespace
                        .enter(|| FrameSocket::open(Some(name)))
                        .unwrap_or_else(|error| panic!("relay: cannot open a packet socket on {name}: {error}"))
                };
                let (from, to) = (open(from), open(to));
                self.namespace.thread(move || carry(&from, &to, &direction))
            })
            .collect();
        *engaged = Some(Engaged { directions, threads });
    }

    /// Makes the line perfect and as fast as the kernel. What is under way is lost.
    pub fn bypass(&self) {
        let mut engaged = self.engaged.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(engaged) = engaged.take() {
            engaged.end();
            self.bridge();
            self.ends.iter().for_each(Interface::enable_offloads);
        }
    }

    /// What it has done since it was engaged: from the switch, and towards it. Zero while bypassed.
    #[must_use]
    pub fn counts(&self) -> [RelayCount; 2] {
        let engaged = self.engaged.lock().unwrap_or_else(PoisonError::into_inner);
        engaged.as_ref().map_or_else(Default::default, |engaged| {
            engaged.directions.each_ref().map(|direction| RelayCount {
                passed: direction.passed.load(Ordering::Relaxed),
                lost: direction.lost.load(Ordering::Relaxed),
            })
        })
    }

    fn bridge(&self) {
        self.namespace.ip(&["link set left master bridge", "link set right master bridge"]);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if self.namespace.lab().keep() {
            // The threads end with this process; a kept Lab stays connected.
            self.bypass();
        }
        if let Some(engaged) = self.engaged.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            engaged.end();
        }
    }
}

impl Engaged {
    fn end(self) {
        for direction in &self.directions {
            direction.stop.store(true, Ordering::Relaxed);
        }
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// Carries frames one way until told to stop.
fn carry(from: &FrameSocket, to: &FrameSocket, direction: &Direction) {
    let mut slots = Slots::new(ROOM);
    // Ordered by arrival and, for equal ones, by order of entry.
    let mut under_way = BinaryHeap::<Reverse<(Instant, u64, Vec<u8>)>>::new();
    let mut entered = 0;
    let mut due = Vec::with_capacity(BATCH);
    let mut spare: Vec<Vec<u8>> = Vec::new();
    while !direction.stop.load(Ordering::Relaxed) {
        while from.receive(&mut slots).expect("receive from the packet socket") {
            let now = Instant::now();
            let mut lane = direction.lane.lock().unwrap_or_else(PoisonError::into_inner);
            for frame in slots.frames() {
                let (frame, length) = (frame.bytes, frame.length);
                let fate = match is_neighbour_discovery(frame) {
                    _ if length > ROOM || under_way.len() >= UNDER_WAY => Fate::Lost,
                    true => lane.neighbour_discovery(now),
                    false => lane.packet(now, length),
                };
                let Fate::Arrives(at) = fate else {
                    direction.lost.fetch_add(1, Ordering::Relaxed);
                    continue;
                };
                let mut copy = spare.pop().unwrap_or_default();
                copy.clear();
                copy.extend_from_slice(frame);
                under_way.push(Reverse((at, entered, copy)));
                entered += 1;
            }
            drop(lane);
            deliver(to, &mut under_way, &mut due, &mut spare, direction);
        }
        deliver(to, &mut under_way, &mut due, &mut spare, direction);
        let now = Instant::now();
        match under_way.peek().map(|Reverse((at, ..))| at.saturating_duration_since(now)) {
            Some(wait) if wait <= GRAIN => thread::sleep(GRAIN),
            wait => {
                from.await_readable(wait.map_or(IDLE, |wait| wait.min(IDLE))).expect("poll the packet socket");
            }
        }
    }
}

fn deliver(
    to: &FrameSocket,
    under_way: &mut BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    due: &mut Vec<Vec<u8>>,
    spare: &mut Vec<Vec<u8>>,
    direction: &Direction,
) {
    let now = Instant::now();
    while under_way.peek().is_some_and(|Reverse((at, ..))| *at <= now) {
        due.extend(under_way.pop().map(|Reverse((.., frame))| frame));
    }
    to.send(due);
    direction.passed.fetch_add(due.len() as u64, Ordering::Relaxed);
    spare.append(due);
    spare.truncate(4 * BATCH);
}

/// ARP, and ICMPv6 neighbour and router discovery and listener reports (which IPv6 sends by itself).
fn is_neighbour_discovery(frame: &[u8]) -> bool {
    let at = |offset: usize| frame.get(offset).copied().unwrap_or_default();
    match (at(12), at(13)) {
        (0x08, 0x06) => true,
        (0x86, 0xdd) => {
            let kind = match (at(20), at(54)) {
                (58, _) => at(54),
                // A listener report stands behind a hop-by-hop header of eight bytes.
                (0, 58) => at(62),
                _ => return false,
            };
            matches!(kind, 130..=137 | 143)
        }
        _ => false,
    }
}
