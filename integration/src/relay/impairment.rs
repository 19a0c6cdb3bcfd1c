//! Impairments of a line, decided by a seed.

use std::time::{Duration, Instant};

/// How bad a line is, in one direction. The default is a perfect line.
///
/// With the same seed and settings, the nth IP packet has the same fate. ARP and neighbour discovery are delayed and
/// paced like the rest but never lost and never counted, so that they do not shift the fates of the others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Impairment {
    /// Time that every packet takes.
    pub delay: Duration,
    /// Up to this much more, evenly spread; it does not change the order.
    pub jitter: Duration,
    /// The part of the packets that is lost, from 0 to 1.
    pub loss: f64,
    /// The part of the packets that goes without the delay and so overtakes, from 0 to 1. Needs a delay.
    pub reorder: f64,
    /// Bits per second; none is as fast as the relay can.
    pub rate: Option<u64>,
    /// Bytes that may wait for their turn at that rate; what comes on top is lost.
    pub queue: u64,
    /// Which packets the above strikes.
    pub seed: u64,
}

impl Default for Impairment {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            reorder: 0.0,
            rate: None,
            queue: 1 << 20,
            seed: 0,
        }
    }
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It never arrives.
    Lost,
    /// It arrives at this time.
    Arrives(Instant),
}

/// One direction of a line: the fates of its packets, one after the other.
#[derive(Debug)]
pub struct Lane {
    impairment: Impairment,
    random: u64,
    /// When the line has sent what was given to it.
    free: Option<Instant>,
    /// The latest arrival of a packet that did not overtake.
    latest: Option<Instant>,
}

impl Lane {
    /// A line that has carried nothing yet.
    #[must_use]
    pub fn new(impairment: Impairment) -> Self {
        Self { impairment, random: impairment.seed, free: None, latest: None }
    }

    /// The fate of an IP packet in a frame of `length` bytes that is given to the line at `now`.
    pub fn packet(&mut self, now: Instant, length: usize) -> Fate {
        // As many draws for each packet whatever the settings, so that one setting does not change what another
        // strikes.
        let (lost, overtakes, jitter) = (self.draw(), self.draw(), self.draw());
        if lost < self.impairment.loss {
            return Fate::Lost;
        }
        self.carry(now, length, overtakes < self.impairment.reorder, jitter)
    }

    /// The fate of a frame that carries no IP packet of a host: late perhaps, but never lost.
    pub fn neighbour_discovery(&mut self, now: Instant) -> Fate {
        self.carry(now, 0, false, 0.0)
    }

    fn carry(&mut self, now: Instant, length: usize, overtakes: bool, jitter: f64) -> Fate {
        let mut sent = now;
        if let Some(rate) = self.impairment.rate.filter(|rate| *rate > 0) {
            let start = self.free.map_or(now, |free| free.max(now));
            let waiting = (start - now).as_secs_f64() * rate as f64 / 8.0;
            if length > 0 && waiting + length as f64 > self.impairment.queue as f64 {
                return Fate::Lost;
            }
            sent = start + Duration::from_secs_f64(length as f64 * 8.0 / rate as f64);
            self.free = Some(sent);
        }
        if overtakes {
            return Fate::Arrives(sent);
        }
        let arrival = sent + self.impairment.delay + self.impairment.jitter.mul_f64(jitter);
        let arrival = self.latest.map_or(arrival, |latest| latest.max(arrival));
        self.latest = Some(arrival);
        Fate::Arrives(arrival)
    }

    /// An even number from 0 (inclusive) to 1 (exclusive), by SplitMix64: the same on every machine and for ever.
    fn draw(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        (mixed >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fates(impairment: Impairment, count: usize) -> Vec<Fate> {
        let start = Instant::now();
        let mut lane = Lane::new(impairment);
        (0..count).map(|_| lane.packet(start, 1500)).collect()
    }

    #[test]
    fn a_perfect_line_delivers_at_once() {
        let now = Instant::now();
        assert_eq!(Lane::new(Impairment::default()).packet(now, 1500), Fate::Arrives(now));
    }

    #[test]
    fn the_seed_decides_and_about_the_wanted_part_is_lost() {
        let lost = |seed, reorder| -> Vec<usize> {
            let fates = fates(Impairment { loss: 0.2, reorder, seed, ..Impairment::default() }, 10_000);
            (0..fates.len()).filter(|index| fates[*index] == Fate::Lost).collect()
        };
        assert_eq!(lost(1, 0.0), lost(1, 0.5));
        assert_ne!(lost(1, 0.0), lost(2, 0.0));
        assert!((1800..2200).contains(&lost(1, 0.0).len()), "{}", lost(1, 0.0).len());
    }

    #[test]
    fn jitter_keeps_the_order_and_stays_in_its_bounds() {
        let delay = Duration::from_millis(50);
        let jitter = Duration::from_millis(10);
        let mut lane = Lane::new(Impairment { delay, jitter, ..Impairment::default() });
        let mut now = Instant::now();
        let mut before = now;
        for _ in 0..1000 {
            let Fate::Arrives(at) = lane.packet(now, 100) else { panic!("lost") };
            assert!(at >= before && at >= now + delay && at <= now + delay + jitter);
            before = at;
            now += Duration::from_millis(1);
        }
    }

    #[test]
    fn the_rate_paces_and_the_queue_bounds() {
        // 1500 bytes at 12 Mbit/s take a millisecond each.
        let impairment = Impairment { rate: Some(12_000_000), queue: 15_000, ..Impairment::default() };
        let start = Instant::now();
        let mut lane = Lane::new(impairment);
        for nth in 1..=10 {
            let Fate::Arrives(at) = lane.packet(start, 1500) else { panic!("lost") };
            let wanted = Duration::from_millis(nth);
            assert!((at - start).abs_diff(wanted) < Duration::from_micros(1), "{:?}", at - start);
        }
        assert_eq!(lane.packet(start, 1500), Fate::Lost);
        assert!(matches!(lane.packet(start + Duration::from_millis(5), 1500), Fate::Arrives(_)));
    }
}
