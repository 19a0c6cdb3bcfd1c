//! Waits for a condition; scenarios use it instead of sleeping.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Time between two looks at the condition.
const POLL: Duration = Duration::from_millis(10);

/// Calls `look` until it returns something, and returns that.
///
/// # Panics
/// When `deadline` passes first; the message says `what` was awaited.
#[track_caller]
pub fn await_until<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    await_ok(what, deadline, || look().ok_or_else(String::new))
}

/// Calls `look` until it succeeds, and returns what it returned.
///
/// # Panics
/// When `deadline` passes first; the message says `what` was awaited and why the last look was not it.
#[track_caller]
pub fn await_ok<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(why) if start.elapsed() >= deadline => panic!("not within {deadline:?}: {what}\n{why}"),
            Err(_) => thread::sleep(POLL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_again_until_it_succeeds() {
        let mut looks = 0;
        let found = await_until("the third look", Duration::from_secs(10), || {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert_eq!(found, 3);
    }

    #[test]
    #[should_panic(expected = "not within 0ns: the moon\nit is cloudy")]
    fn says_what_did_not_come_and_why() {
        await_ok("the moon", Duration::ZERO, || Err::<(), _>("it is cloudy".to_owned()));
    }
}
