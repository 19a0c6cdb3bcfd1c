//! How long each step of a packet's way takes, without system calls:
//! `cargo bench -p tunnel --features testing --bench tunnel_steps`.

#![allow(missing_docs, reason = "criterion's macros")]
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

mod shapes;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use shapes::{SHAPES, address, table};
use tunnel::steps::{STEPS, Steps};

/// What one step takes; the others around it are not timed.
fn time(rounds: u64, steps: &mut Steps, timed: &str) -> Duration {
    let mut took = Duration::ZERO;
    for _ in 0..rounds {
        for (name, step) in STEPS {
            let start = Instant::now();
            step(steps);
            if name == timed {
                took += start.elapsed();
            }
        }
    }
    took
}

fn steps(criterion: &mut Criterion) {
    for step in ["split", "seal", "open", "merge"] {
        let mut group = criterion.benchmark_group(step);
        for (shape, payload, size) in SHAPES {
            let mut steps = Steps::new(payload, size);
            group.throughput(Throughput::Elements(steps.packets() as u64));
            group.bench_function(shape, |bencher| bencher.iter_custom(|rounds| time(rounds, &mut steps, step)));
        }
        group.finish();
    }
}

fn routes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("route");
    for prefixes in [10, 5000] {
        let table = table(prefixes);
        let mut n = 0;
        group.bench_function(format!("{prefixes} prefixes"), |bencher| {
            bencher.iter(|| {
                n += 1;
                black_box(table.get(address(n, prefixes)))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, steps, routes);
criterion_main!(benches);
