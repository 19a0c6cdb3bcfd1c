use super::*;

fn key(bytes: [u8; 32]) -> Result<PublicKey, Violations> {
    STANDARD.encode(bytes).parse()
}

fn hex(text: &str) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap();
    }
    bytes
}

/// Written out here once more, from the list that WireGuard's own tests use, so that a slip of the pen shows.
const LOW_ORDER_HEX: [&str; 7] = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
];

#[test]
fn low_order_points_are_refused_with_either_top_bit() {
    for text in LOW_ORDER_HEX {
        for top in [0, 0x80] {
            let mut bytes = hex(text);
            bytes[31] |= top;
            assert!(PublicKey::from_bytes(bytes).is_low_order(), "{text}");
            let said = key(bytes).expect_err(text).to_string();
            assert!(said.contains("low-order"), "{said}");
        }
    }
}

#[test]
fn a_second_encoding_of_a_point_is_refused() {
    let nine = {
        let mut bytes = [0; 32];
        bytes[0] = 9;
        bytes
    };
    assert!(key(nine).is_ok());
    // The same point once more: with the top bit set, and as p + 9.
    let mut top = nine;
    top[31] = 0x80;
    let mut beyond_p = near_p(0xed);
    beyond_p[0] += 9;
    for bytes in [top, beyond_p] {
        assert!(!PublicKey::from_bytes(bytes).is_low_order());
        let said = key(bytes).expect_err("must be refused").to_string();
        assert!(said.contains("canonical"), "{said}");
    }
    // Right below p is the largest canonical encoding that is of full order: p - 2.
    assert!(key(near_p(0xeb)).is_ok());
}

#[test]
fn only_base64_as_wg_prints_it() {
    let good = STANDARD.encode([7; 32]);
    assert!(good.parse::<PublicKey>().is_ok());
    let (head, _) = good.split_at(42);
    for text in [
        String::new(),
        good[..43].to_owned(),
        format!("{good}\n"),
        format!(" {good}"),
        good.replace('=', ""),
        // The last character carries four bits; others would be a second spelling.
        format!("{head}d="),
        STANDARD.encode([7; 31]),
        STANDARD.encode([7; 33]),
        "é".repeat(22),
        good.to_lowercase().replace('=', "-"),
    ] {
        assert!(text.parse::<PublicKey>().is_err(), "{text:?}");
    }
}

#[test]
fn a_preshared_key_is_not_printed() {
    let key = PresharedKey::read(&STANDARD.encode([0xa5; 32])).unwrap();
    assert_eq!(format!("{key:?}"), "PresharedKey(…)");
    assert_eq!(PresharedKey::read(&key.secret_base64()).unwrap(), key);
    let said = PresharedKey::read("c2VjcmV0").expect_err("too short");
    assert!(!said.contains("c2VjcmV0"));
}
