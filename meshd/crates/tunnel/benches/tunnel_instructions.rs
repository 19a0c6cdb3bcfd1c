//! How many instructions each step of a packet's way takes, counted by Valgrind, which no other program on the machine
//! disturbs: `cargo bench -p tunnel --features testing --bench tunnel_instructions`.

#![allow(missing_docs, unused_qualifications, reason = "gungraun's macros")]

mod shapes;

use std::hint::black_box;

use gungraun::{library_benchmark, library_benchmark_group, main};
use shapes::{SHAPES, address, table};
use tunnel::{
    PrefixTable,
    steps::{STEPS, Steps},
};

/// Lookups that are counted together.
const LOOKUPS: u32 = 1000;

/// One that has gone through all steps twice, so that what is made once is made, and then through those before `next`.
fn before(next: &str, shape: usize) -> Steps {
    let (_, payload, size) = SHAPES[shape];
    let mut steps = Steps::new(payload, size);
    for _ in 0..2 {
        STEPS.iter().for_each(|(_, step)| step(&mut steps));
    }
    STEPS.iter().take_while(|(name, _)| *name != next).for_each(|(_, step)| step(&mut steps));
    steps
}

#[library_benchmark]
#[bench::of_48_large(before("split", 0))]
#[bench::of_200_small(before("split", 2))]
fn split(mut steps: Steps) -> Steps {
    steps.split();
    steps
}

#[library_benchmark]
#[bench::of_48_large(before("seal", 0))]
#[bench::of_200_small(before("seal", 2))]
fn seal(mut steps: Steps) -> Steps {
    steps.outbound();
    steps
}

#[library_benchmark]
#[bench::of_48_large(before("open", 0))]
#[bench::of_200_small(before("open", 2))]
fn open(mut steps: Steps) -> Steps {
    steps.inbound();
    steps
}

#[library_benchmark]
#[bench::of_48_large(before("merge", 0))]
#[bench::of_200_small(before("merge", 2))]
fn merge(mut steps: Steps) -> Steps {
    steps.merge();
    steps
}

#[library_benchmark]
#[bench::a_thousand_in_10(10, table(10))]
#[bench::a_thousand_in_5000(5000, table(5000))]
fn route(prefixes: u32, table: PrefixTable<u32>) -> PrefixTable<u32> {
    for n in 0..LOOKUPS {
        black_box(table.get(address(n, prefixes)));
    }
    table
}

library_benchmark_group!(name = steps, benchmarks = [split, seal, open, merge, route]);
main!(library_benchmark_groups = steps);
