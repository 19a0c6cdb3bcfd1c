//! TCP: throughput, what a gigabyte costs, and the daemons' memory meanwhile.

use std::time::Duration;

use integration::{
    Iperf,
    measure::{Better, Comparison, Cost},
    topology::Star,
};

use crate::{
    settings::Settings,
    subject::{Kind, Subject},
    turns::{self, Taken},
};

/// Which way the streams go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Left to right.
    Forth,
    /// Right to left.
    Back,
}

/// Throughput as a figure's name.
pub(crate) const THROUGHPUT: &str = "Gbit/s";
/// Cost as a figure's name.
pub(crate) const COST: &str = "CPU s/GB";
/// Memory as a figure's name.
pub(crate) const MEMORY: &str = "RSS, MB";

/// Streams between two pods, beside each other.
pub(crate) fn streams(settings: &Settings, name: &str, streams: u16, direction: Direction) -> Comparison {
    let way = match direction {
        Direction::Forth => "left to right",
        Direction::Back => "right to left",
    };
    let plural = if streams == 1 { "stream" } else { "streams" };
    let title = format!("TCP, {streams} {plural}, {way}, {} s each", settings.transfer.as_secs());
    let mut comparison = Comparison::new(name, &title);
    comparison.note(
        "CPU is user, system and softirq of the whole machine, with both ends and the load; memory is that of the larger \
         daemon.",
    );
    let mut star = Star::new(name);
    let subjects = start_all(settings, &mut star, &Kind::TUNNELS);
    turns::take(&mut comparison, settings.turns, &subjects, |subject, _| {
        transfer(subject, settings.transfer, streams, direction)
    });
    comparison
}

/// Sets up the cell's subjects, `usual` unless the environment asks for others, each with its name.
pub(crate) fn start_all(settings: &Settings, star: &mut Star, usual: &[Kind]) -> Vec<(String, Subject)> {
    let kinds = settings.subjects(usual);
    let other = settings.other_meshd.as_deref();
    let start = |(kind, number)| {
        let subject = Subject::start(star, kind, other, number);
        [&subject.left, &subject.right].into_iter().for_each(|pod| settings.prepare(pod));
        (Kind::name(kind).to_owned(), subject)
    };
    kinds.into_iter().zip(0..).map(start).collect()
}

fn transfer(subject: &Subject, length: Duration, streams: u16, direction: Direction) -> Taken<()> {
    let seconds = u16::try_from(length.as_secs()).unwrap_or(u16::MAX);
    let iperf = Iperf::new(subject.right_address()).seconds(seconds).streams(streams);
    let iperf = match direction {
        Direction::Forth => iperf,
        Direction::Back => iperf.reverse(),
    };
    let (through, cost) = Cost::of(|| iperf.run(&subject.left, &subject.right));
    let gigabytes = through.report["end"]["sum_received"]["bytes"].as_f64().unwrap_or_default() / 1e9;
    let mut values = vec![
        (THROUGHPUT, Better::Higher, through.bits_per_second / 1e9),
        (COST, Better::Lower, cost.cpu.busy / gigabytes),
        ("segments sent again", Better::Lower, through.retransmits.unwrap_or_default() as f64),
    ];
    values.extend(subject.resident().map(|bytes| (MEMORY, Better::Lower, bytes as f64 / 1e6)));
    Taken { values, cost, more: () }
}
