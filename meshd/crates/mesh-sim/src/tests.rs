use std::sync::atomic::{AtomicU64, Ordering};

use super::MeshSim;

/// How many histories are tried.
fn histories(usually: u64) -> u64 {
    std::env::var("MESHD_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(usually)
}

#[test]
fn no_history_breaks_an_invariant_and_all_meshes_come_to_rest() {
    let first = std::env::var("MESHD_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let end = first + histories(10);
    let next = AtomicU64::new(first);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| *seed < end) {
                    MeshSim::run(seed);
                }
            });
        }
    });
}

#[test]
fn one_seed_has_one_history() {
    assert_eq!(MeshSim::run(3).steps, MeshSim::run(3).steps);
}
