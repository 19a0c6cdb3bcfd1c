use super::*;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn changes_are_written_at_once_then_rarely_and_never_two_at_a_time() {
    let start = Instant::now();
    let mut schedule = CacheSchedule::new(start);
    schedule.changed();
    assert!(!schedule.begin(start, false, false, None), "etcd was not read");
    assert_eq!(schedule.next_deadline(), None);
    assert!(schedule.begin(start, true, true, None));
    schedule.changed();
    assert!(!schedule.begin(start + 60 * SECOND, true, true, None), "one is under way");
    schedule.written(Duration::from_millis(5));
    assert_eq!(schedule.next_deadline(), Some(start + 5 * SECOND), "a thousandth of the time");
    assert!(!schedule.begin(start + 4 * SECOND, true, true, None));
    schedule.changed_now();
    assert!(schedule.begin(start + 4 * SECOND, true, true, None), "its own subnet");
    schedule.written(60 * SECOND);
    schedule.changed();
    assert_eq!(schedule.next_deadline(), Some(start + 4 * SECOND + INTERVAL_MAX));
}

#[test]
fn an_unchanged_cache_is_renewed_only_while_etcd_confirms_it() {
    let start = Instant::now();
    let mut schedule = CacheSchedule::new(start);
    schedule.changed();
    let ttl = Some(40 * SECOND);
    assert!(schedule.begin(start, true, true, ttl));
    schedule.written(Duration::ZERO);
    assert!(!schedule.begin(start, true, true, ttl) && !schedule.is_unsaved());
    assert_eq!(schedule.next_deadline(), Some(start + 10 * SECOND));
    assert!(!schedule.begin(start + 20 * SECOND, true, false, ttl));
    assert_eq!(schedule.next_deadline(), None);
    assert!(!schedule.begin(start + 30 * SECOND, true, true, None));
    assert_eq!(schedule.next_deadline(), Some(start + REFRESH));
    assert!(schedule.begin(start + REFRESH, true, true, None));
}
