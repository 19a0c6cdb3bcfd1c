//! Bodies of the local API, in both directions: what is read is written as something that reads as the same.

#![no_main]

use std::fmt::Debug;

use cni::daemon::{Attach, Attached, Begin, Network, Refusal};
use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};

fuzz_target!(|body: &[u8]| {
    reads_back::<Begin>(body);
    reads_back::<Attach>(body);
    reads_back::<Attached>(body);
    reads_back::<Network>(body);
    reads_back::<Refusal>(body);
});

fn reads_back<T>(body: &[u8])
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let Ok(read) = serde_json::from_slice::<T>(body) else { return };
    let written = serde_json::to_vec(&read).expect("JSON");
    assert_eq!(serde_json::from_slice::<T>(&written).expect("what was written"), read);
}
