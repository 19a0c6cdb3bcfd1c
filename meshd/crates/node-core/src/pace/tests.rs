use super::*;

/// For a minute rules change every millisecond, and links every ten, each of which calls for a look at once. Counts
/// the looks that read others' rules, which take `took`.
fn reads(took: Duration) -> u32 {
    let start = Instant::now();
    let (mut pace, mut now, mut reads) = (Pace::new(start), start, 0);
    let mut changed = false;
    for millisecond in 0.. {
        now = now.max(start + Duration::from_millis(millisecond));
        if now >= start + Duration::from_secs(60) {
            break;
        }
        pace.changed(now);
        changed = true;
        if !pace.take_due(now) && !millisecond.is_multiple_of(10) {
            continue;
        }
        if pace.others(now) == OthersRules::Read {
            let began = now;
            now += took;
            reads += 1;
            changed = false;
            pace.read(began, now);
        } else {
            pace.left_out();
        }
    }
    assert!(!changed || pace.due().is_some(), "the last change is looked at");
    reads
}

#[test]
fn the_number_of_looks_is_bounded_whatever_changes() {
    assert_eq!(reads(Duration::from_millis(10)), 60, "once a second");
    // 60 s / (21 * 0.5 s): a twentieth of the time.
    assert_eq!(reads(Duration::from_millis(500)), 6);
}

#[test]
fn what_changes_after_a_while_is_looked_at_at_once() {
    let start = Instant::now();
    let mut pace = Pace::new(start);
    pace.read(start, start + Duration::from_millis(10));
    let later = start + Duration::from_secs(5);
    assert_eq!((pace.due(), pace.others(later)), (None, OthersRules::Read));
    pace.changed(later);
    assert!(pace.take_due(later) && !pace.take_due(later));
}
