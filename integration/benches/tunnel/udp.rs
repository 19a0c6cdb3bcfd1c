//! UDP: the highest rate of which at most one percent is lost.

use std::{cell::Cell, time::Duration};

use integration::{
    measure::{Better, Comparison, Cost, Datagrams, Packing},
    topology::Star,
};

use crate::{
    settings::Settings,
    subject::Kind,
    tcp,
    turns::{self, Taken},
};

/// The part that may be lost, from 0 to 1.
const LOSS: f64 = 0.01;
/// Where a sweep begins, in datagrams a second: less than any subject carries.
const SLOW: f64 = 4000.0;
/// Halvings of the interval after the rate has been doubled: to four percent.
const STEPS: u32 = 4;
const PROBE: Duration = Duration::from_millis(300);
const RATE: &str = "thousand a second";
/// Sweeps take longer than transfers; fewer turns do.
const TURNS: u32 = 5;

/// One flow of datagrams with this many bytes of payload.
pub(crate) fn sweep(settings: &Settings, name: &str, size: usize, packing: Packing) -> Comparison {
    let how = match packing {
        Packing::Single => "one by one",
        Packing::Segmented => "as super-datagrams of the application (UDP_SEGMENT)",
    };
    let title = format!("UDP, {size} bytes of payload, {how}: highest rate with at most 1 % lost");
    let mut comparison = Comparison::new(name, &title);
    comparison.note(
        "plain is the same path without a tunnel: its figures are what path, sender and receiver cost by themselves. What \
         the sender had no time to send counts as lost.",
    );
    let usual: Vec<Kind> = Kind::TUNNELS.into_iter().chain([Kind::Vxlan, Kind::Plain]).collect();
    let mut star = Star::new(name);
    let subjects = tcp::start_all(settings, &mut star, &usual);
    let (turns, probe, steps) =
        if settings.quick { (2, PROBE / 2, 3) } else { (settings.turns.min(TURNS), PROBE, STEPS) };
    // What a subject carried before tells where its next sweep can begin.
    let before: Vec<Cell<f64>> = subjects.iter().map(|_| Cell::new(SLOW)).collect();
    let subjects: Vec<_> =
        subjects.into_iter().zip(&before).map(|((name, subject), before)| (name, (subject, before))).collect();
    turns::take(&mut comparison, turns, &subjects, |(subject, before), _| {
        let flow = Datagrams::new(&subject.left, &subject.right, subject.right_address(), size, packing);
        let (best, cost) = Cost::of(|| {
            let best = flow.highest_rate(before.get(), LOSS, probe, steps);
            best.or_else(|| flow.highest_rate(SLOW / 4.0, LOSS, probe, steps))
        });
        let mut values = vec![(RATE, Better::Higher, best.map_or(0.0, |best| best.rate() / 1e3))];
        if let Some(best) = best {
            before.set(best.rate() / 2.0);
            let (rate, received) = (best.rate(), best.received as f64);
            values.extend([
                ("Gbit/s of payload", Better::Higher, rate * size as f64 * 8.0 / 1e9),
                ("CPU µs each, at that rate", Better::Lower, best.cost.cpu.busy / received * 1e6),
                ("overtaken", Better::Lower, best.overtaken as f64),
            ]);
        }
        Taken { values, cost, more: () }
    });
    comparison
}
