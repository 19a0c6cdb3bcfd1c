//! TCP over a long line: round trip, loss and pace by the Lab's relay.

use std::time::Duration;

use integration::{
    Impairment, Iperf, Pod, Relay,
    measure::{Better, Comparison, Cost, Datagrams, Packing},
    topology::Star,
};

use crate::{
    settings::Settings,
    subject::{Kind, Subject},
    tcp::THROUGHPUT,
    turns::{self, Taken},
};

/// How bad the line is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line {
    /// Both ways together.
    pub(crate) round_trip: Duration,
    /// The part of the packets that is lost, each way, from 0 to 1.
    pub(crate) loss: f64,
}

/// Bits per second, each way.
const PACE: u64 = 500_000_000;
const TURNS: u32 = 10;
/// Long enough for TCP to open its window at the longest round trip.
const TRANSFER: Duration = Duration::from_secs(5);
/// What a window may grow to: several times what is under way on the longest line.
const WINDOW: &str = "4096 131072 33554432";

/// One stream over the line, for each subject.
pub(crate) fn stream(settings: &Settings, name: &str, line: Line) -> Comparison {
    let (turns, transfer) =
        if settings.quick { (2, Duration::from_secs(2)) } else { (settings.turns.min(TURNS), TRANSFER) };
    let title = format!(
        "TCP, 1 stream, {} s each, over {} ms round trip and {} % loss each way, paced at {} Mbit/s",
        transfer.as_secs(),
        line.round_trip.as_millis(),
        line.loss * 100.0,
        PACE / 1_000_000
    );
    let mut comparison = Comparison::new(name, &title);
    comparison.note(
        "In a turn the same seed decides which packets are lost. A queue of one round trip stands before the line. \
         \"Reorderings\" are those that the sender's TCP has found out (TcpExtTCPSACKReorder, TcpExtTCPTSReorder).",
    );
    let mut star = Star::new(name);
    let subjects = start_all(settings, &mut star, &[Kind::Meshd, Kind::WireguardGo]);
    let relay = relay(&star);
    turns::take(&mut comparison, turns, &subjects, |subject, turn| {
        let way = impairment(line, 2 * turn as u64);
        relay.set_each(way, Impairment { seed: way.seed + 1, ..way });
        let (reordered_before, before) = (reorderings(&subject.left), relay.counts());
        let seconds = u16::try_from(transfer.as_secs()).unwrap_or(u16::MAX);
        let iperf = Iperf::new(subject.right_address()).seconds(seconds);
        let (through, cost) = Cost::of(|| iperf.run(&subject.left, &subject.right));
        let lost: u64 = relay.counts().iter().zip(before).map(|(after, before)| after.lost - before.lost).sum();
        let reordered = reorderings(&subject.left) - reordered_before;
        let values = vec![
            ("Mbit/s", Better::Higher, through.bits_per_second / 1e6),
            ("lost by the relay, packets", Better::Lower, lost as f64),
            ("sent again, segments", Better::Lower, through.retransmits.unwrap_or_default() as f64),
            ("reorderings", Better::Lower, reordered as f64),
        ];
        Taken { values, cost, more: () }
    });
    comparison
}

/// What the relay itself carries, without a tunnel: unpaced, and at the pace of the cells above.
pub(crate) fn relay_alone(settings: &Settings, name: &str) -> Comparison {
    let mut comparison = Comparison::new(name, "the relay alone, packets of 1,400 bytes, without a tunnel");
    let mut star = Star::new(name);
    let subjects = start_all(&Settings { subjects: None, ..settings.clone() }, &mut star, &[Kind::Plain]);
    let (plain, relay) = (&subjects[0].1, relay(&star));
    let flow = Datagrams::new(&plain.left, &plain.right, plain.right_address(), 1372, Packing::Single);
    let line = Line { round_trip: Duration::from_millis(20), loss: 0.0 };
    let turns = if settings.quick { 1 } else { 3 };
    for _ in 0..turns {
        relay.set(Impairment { rate: None, ..impairment(line, 0) });
        if let Some(best) = flow.highest_rate(10_000.0, 0.01, Duration::from_millis(500), 4) {
            let wire = best.rate() * 1400.0 * 8.0 / 1e6;
            comparison.record("Mbit/s, UDP, highest rate with at most 1 % lost", Better::Higher, "unpaced", wire);
        }
        for (subject, impairment) in
            [("unpaced", Impairment { rate: None, ..impairment(line, 0) }), ("paced", impairment(line, 0))]
        {
            relay.set(impairment);
            let through = Iperf::new(plain.right_address()).seconds(3).run(&plain.left, &plain.right);
            comparison.record(THROUGHPUT, Better::Higher, subject, through.bits_per_second / 1e9);
        }
    }
    comparison
}

fn start_all(settings: &Settings, star: &mut Star, usual: &[Kind]) -> Vec<(String, Subject)> {
    let other = settings.other_meshd.as_deref();
    let kinds = settings.subjects(usual).into_iter().zip(0..);
    kinds
        .map(|(kind, number)| {
            let left = star.host(&format!("left-{}", kind.name()));
            let right = star.far_host(&format!("right-{}", kind.name()));
            let subject = Subject::start_between(star, kind, other, number, [left, right]);
            for pod in [&subject.left, &subject.right] {
                settings.prepare(pod);
                pod.sysctl("net/ipv4/tcp_rmem", WINDOW);
                pod.sysctl("net/ipv4/tcp_wmem", WINDOW);
            }
            (kind.name().to_owned(), subject)
        })
        .collect()
}

fn relay(star: &Star) -> &Relay {
    star.relay().expect("a subject behind the relay")
}

fn impairment(line: Line, seed: u64) -> Impairment {
    let under_way = PACE as f64 / 8.0 * line.round_trip.as_secs_f64();
    Impairment {
        delay: line.round_trip / 2,
        loss: line.loss,
        rate: Some(PACE),
        queue: under_way as u64,
        seed,
        ..Impairment::default()
    }
}

/// How often TCP in this pod has found out that packets had overtaken each other.
fn reorderings(pod: &Pod) -> u64 {
    let text = pod.enter(|| std::fs::read_to_string("/proc/thread-self/net/netstat")).unwrap_or_default();
    // Pairs of lines: names, then values.
    let lines: Vec<Vec<&str>> =
        text.lines().filter(|line| line.starts_with("TcpExt:")).map(|line| line.split_whitespace().collect()).collect();
    let [names, values] = lines.as_slice() else { return 0 };
    let wanted = names.iter().zip(values).filter(|(name, _)| ["TCPSACKReorder", "TCPTSReorder"].contains(name));
    wanted.filter_map(|(_, value)| value.parse::<u64>().ok()).sum()
}
