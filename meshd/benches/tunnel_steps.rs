//! What each step of a packet's way costs, without system calls:
//! `cargo bench --workspace --features meshd/fuzzing --bench tunnel_steps`.

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net};
use meshd::tunnel::{PrefixTable, steps::time_steps};

fn main() {
    if std::env::args().any(|arg| arg == "--list") {
        return;
    }
    println!(
        "{:<24} {:>12} {:>12} {:>12} {:>12}  ns per packet, median of 11",
        "", "split", "outbound", "inbound", "merge"
    );
    for (name, payload, size) in
        [("48 of 1400 B (TCP)", 48 * 1348, 1348), ("16 of 1400 B", 16 * 1348, 1348), ("200 of 64 B", 200 * 12, 12)]
    {
        let mut runs: Vec<[f64; 4]> = (0..11)
            .map(|_| {
                let steps = time_steps(payload, size, 300);
                let per_packet = |time: Duration| time.as_nanos() as f64 / steps.packets as f64;
                [steps.split, steps.outbound, steps.inbound, steps.merge].map(per_packet)
            })
            .collect();
        let medians = [0, 1, 2, 3].map(|step| {
            runs.sort_by(|a, b| a[step].total_cmp(&b[step]));
            runs[runs.len() / 2][step]
        });
        println!("{name:<24} {:>12.0} {:>12.0} {:>12.0} {:>12.0}", medians[0], medians[1], medians[2], medians[3]);
    }
    for prefixes in [10, 5000] {
        println!("{:<24} {:>12.1} ns per lookup", format!("route, {prefixes} prefixes"), lookup(prefixes));
    }
}

/// Nanoseconds for the owner of an address among `prefixes` networks of 256 addresses.
fn lookup(prefixes: u32) -> f64 {
    let mut table = PrefixTable::default();
    for n in 0..prefixes {
        if let Ok(net) = Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 + (n << 8)), 24) {
            table.insert(IpNet::V4(net), n);
        }
    }
    let rounds = 1_000_000u32;
    let mut runs: Vec<f64> = (0..11)
        .map(|_| {
            let start = Instant::now();
            for n in 0..rounds {
                let host = n.wrapping_mul(0x9e37_79b1) % (prefixes << 8);
                black_box(table.get(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + host))));
            }
            start.elapsed().as_nanos() as f64 / f64::from(rounds)
        })
        .collect();
    runs.sort_by(f64::total_cmp);
    runs[runs.len() / 2]
}
