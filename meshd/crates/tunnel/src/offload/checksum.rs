//! The Internet checksum (RFC 1071).
//!
//! Sums are over 16-bit words in memory order. The arithmetic does not depend on byte order, so a folded sum that is
//! stored in memory order is correct on every machine; numbers that are not in memory are added with [`word`].

/// From this length on wider registers are worth asking for.
const LONG: usize = 128;

/// The words of `bytes` added up; an odd last byte counts as if a zero followed. At most 64 KiB.
pub(in super::super) fn sum(bytes: &[u8]) -> u64 {
    if bytes.len() < LONG { halves(bytes) } else { halves_of_many(bytes) }
}

/// The same in a version for each width of registers that the processor may have.
#[multiversion::multiversion(targets("x86_64+avx2"))]
fn halves_of_many(bytes: &[u8]) -> u64 {
    halves(bytes)
}

#[inline(always)]
fn halves(bytes: &[u8]) -> u64 {
    // Sums of 32-bit halves cannot overflow 64 bits, and several independent ones become vector code.
    let mut sums = [0u64; LANES];
    let (blocks, rest) = bytes.as_chunks::<{ 4 * LANES }>();
    for block in blocks {
        for (sum, half) in sums.iter_mut().zip(block.as_chunks::<4>().0) {
            *sum += u64::from(u32::from_ne_bytes(*half));
        }
    }
    let mut last = [0u8; 4 * LANES];
    last[..rest.len()].copy_from_slice(rest);
    for (sum, half) in sums.iter_mut().zip(last.as_chunks::<4>().0) {
        *sum += u64::from(u32::from_ne_bytes(*half));
    }
    sums.iter().sum()
}

/// Sums that are added to side by side.
const LANES: usize = 16;

/// A number as the word that it is in memory, in network byte order.
pub(in super::super) fn word(number: u16) -> u64 {
    u64::from(number.to_be())
}

/// Folds a sum to 16 bits.
pub(in super::super) fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The checksum that belongs to a sum, as its two bytes.
pub(in super::super) fn finish(sum: u64) -> [u8; 2] {
    (!fold(sum)).to_ne_bytes()
}

/// The same for a field in which zero means "none" (UDP), and which all ones mean the same in everywhere else.
pub(in super::super) fn finish_nonzero(sum: u64) -> [u8; 2] {
    match !fold(sum) {
        0 => [0xff; 2],
        checksum => checksum.to_ne_bytes(),
    }
}

/// The sum over the pseudo-header of TCP and UDP: addresses (as they stand next to each other in the IP header),
/// protocol, length.
pub(in super::super) fn pseudo_header(addresses: &[u8], protocol: u8, len: u16) -> u64 {
    sum(addresses) + word(u16::from(protocol)) + word(len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!(sum as u16)).to_be_bytes()
    }

    proptest! {
        #[test]
        fn agrees_with_adding_pair_by_pair(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(finish(sum(&bytes)), naive(&bytes));
        }

        #[test]
        fn sums_of_parts_add_up(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0usize..100, n: u16) {
            let cut = (2 * cut).min(bytes.len() & !1);
            let parts = sum(&bytes[..cut]) + word(n) + sum(&bytes[cut..]);
            let mut whole = n.to_be_bytes().to_vec();
            whole.extend(&bytes);
            prop_assert_eq!(finish(parts), naive(&whole));
        }
    }

    #[test]
    fn does_not_overflow() {
        assert_eq!(finish(sum(&[0xff; 65535])), naive(&[0xff; 65535]));
        assert_eq!(finish_nonzero(0xffff), [0xff; 2]);
        assert_eq!(finish(0xffff), [0; 2]);
        assert_eq!(fold(u64::MAX), 0xffff);
    }
}
