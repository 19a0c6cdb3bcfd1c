//! Ping: how long an answer takes.

use std::{thread, time::Duration};

use integration::{
    Iperf,
    measure::{Better, Comparison, Cost, EchoReport, Echoes},
    topology::Star,
};

use crate::{
    settings::Settings,
    subject::{Kind, Subject},
    tcp,
    turns::{self, Taken},
};

/// What else goes through the tunnel meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beside {
    /// Nothing.
    Nothing,
    /// One TCP stream, the same way.
    Stream,
}

const INTERVAL: Duration = Duration::from_millis(2);
/// Requests in a turn, and turns: 5,000 for each subject.
const COUNT: u16 = 500;
const TURNS: u32 = 10;
/// A stream is under way before the first request, and until after the last.
const AROUND: Duration = Duration::from_millis(700);

/// A row of echo requests for each subject.
pub(crate) fn row(settings: &Settings, name: &str, beside: Beside) -> Comparison {
    let (turns, count) = if settings.quick { (2, 250) } else { (TURNS, COUNT) };
    let load = match beside {
        Beside::Nothing => "nothing else",
        Beside::Stream => "one TCP stream the same way",
    };
    let title =
        format!("ping, one per {} ms, {} in all for each, with {load}", INTERVAL.as_millis(), turns * u32::from(count));
    let mut comparison = Comparison::new(name, &title);
    comparison.note(
        "Each value is that of one turn; \"over all turns\" has the answers of all turns in one row. Requests go out by the \
         clock, whether or not the one before was answered.",
    );
    let mut star = Star::new(name);
    let subjects = tcp::start_all(settings, &mut star, &Kind::TUNNELS);
    let rows = turns::take(&mut comparison, turns, &subjects, |subject, _| {
        let (report, cost) = Cost::of(|| match beside {
            Beside::Nothing => echoes(subject, count),
            Beside::Stream => beside_stream(subject, count),
        });
        let times = &report.microseconds;
        let values = [("median, µs", times.quantile(0.5)), ("p99, µs", times.quantile(0.99))];
        Taken { values: values.map(|(name, value)| (name, Better::Lower, value)).into(), cost, more: report }
    });
    for (at, (name, _)) in subjects.iter().enumerate() {
        let mut all = EchoReport::default();
        rows.iter().for_each(|row| all.extend(&row[at]));
        let mut record = |metric: &str, value| comparison.record(metric, Better::Lower, name, value);
        record("over all turns: median, µs", all.microseconds.quantile(0.5));
        record("over all turns: p99, µs", all.microseconds.quantile(0.99));
        record("not answered", all.lost() as f64);
    }
    comparison
}

fn echoes(subject: &Subject, count: u16) -> EchoReport {
    Echoes::new(&subject.left, subject.right_address(), INTERVAL).run(count)
}

fn beside_stream(subject: &Subject, count: u16) -> EchoReport {
    let row = INTERVAL * u32::from(count) + 2 * AROUND;
    let seconds = u16::try_from(row.as_millis().div_ceil(1000)).unwrap_or(u16::MAX);
    thread::scope(|scope| {
        let stream =
            scope.spawn(|| Iperf::new(subject.right_address()).seconds(seconds).run(&subject.left, &subject.right));
        thread::sleep(AROUND);
        let report = echoes(subject, count);
        let _ = stream.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        report
    })
}
