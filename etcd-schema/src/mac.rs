//! Hardware addresses.

use std::{fmt, str::FromStr};

use crate::{Violations, fields::Expected, violation::quoted};

/// A hardware address of Ethernet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// The address of one interface that `text` is.
    pub(crate) fn read(text: &str) -> Result<Self, Expected> {
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+'));
            *octet = part.and_then(|part| u8::from_str_radix(part, 16).ok()).ok_or(Self::EXPECTED)?;
        }
        // IEEE 802: the lowest bit of the first octet is of groups.
        let of_one = parts.next().is_none() && octets[0] & 1 == 0 && octets != [0; 6];
        if of_one { Ok(Self(octets)) } else { Err(Self::EXPECTED.into()) }
    }

    const EXPECTED: &'static str = "must be the hardware address of one interface, such as 02:42:ac:11:00:02";
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = Violations;

    fn from_str(text: &str) -> Result<Self, Violations> {
        Self::read(text).map_err(|expected| Violations::one("", quoted(text), expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_one_interface_is_read_as_it_is_shown() {
        let mac: MacAddress = "02:42:AC:11:00:ff".parse().unwrap();
        assert_eq!(mac.to_string(), "02:42:ac:11:00:ff");
        for wrong in
            ["", "02:42:ac:11:00", "02:42:ac:11:00:02:03", "+2:42:ac:11:00:02", "2:42:ac:11:00:02", "0g:42:ac:11:00:02"]
        {
            assert!(wrong.parse::<MacAddress>().is_err(), "{wrong}");
        }
        for group in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
            assert!(group.parse::<MacAddress>().is_err(), "{group}");
        }
    }
}
