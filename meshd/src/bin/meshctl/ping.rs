//! `meshctl ping`.

use std::{net::IpAddr, thread, time::Duration};

use clap::Args;
use meshd::api::{self, Client, Echoed, Layer};
use serde::Serialize;

use crate::{
    exit::{FAILED, Usage},
    output::{Output, Tone, print, table, toned, write_out},
};

/// Between two echoes.
const INTERVAL: Duration = Duration::from_secs(1);
/// What every link must carry (RFC 791: 576; a little less for what a tunnel takes of it).
const SMALLEST: u16 = 500;
/// Largest that is tried.
const LARGEST: u16 = 9000;
/// An echo may be lost by chance.
const TRIES: usize = 2;

#[derive(Args)]
pub(crate) struct Ping {
    /// A node's or an outside peer's name, a node's id, or an address of the mesh
    #[arg(value_name = "NODE|IP")]
    target: String,
    /// How often to ask; after the first time only the innermost address
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// Length of the whole IP packet, in bytes; without a number: finds the longest that gets through
    #[arg(short, long, value_name = "BYTES", num_args = 0..=1, default_missing_value = "0")]
    size: Option<u16>,
}

/// What `-o json` prints.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Pinged {
    #[serde(flatten)]
    ping: api::Ping,
    reached: bool,
    /// Seconds, of the further echoes to the innermost address; `null`: no answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    further: Vec<Option<f64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<Size>,
}

/// What `--size` found.
#[derive(Serialize, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
struct Size {
    /// The longest packet that was answered, in bytes; `None`: not even the shortest one.
    longest: Option<u16>,
    /// What the route is said to carry.
    mtu: Option<u16>,
    /// What was found, and what to do.
    text: String,
    well: bool,
}

impl Ping {
    pub(crate) fn run(&self, output: Output, client: &Client) -> anyhow::Result<u8> {
        if !self.target.bytes().all(|b| b.is_ascii_alphanumeric() || b":.-_".contains(&b)) {
            return Err(Usage(format!("{:?} is neither a name nor an address", self.target)).into());
        }
        let ping: api::Ping = client.get_slowly(&format!("/v1/ping?target={}", self.target))?;
        let mut pinged = Pinged { reached: ping.reached(), ping, further: Vec::new(), size: None };
        if output == Output::Table {
            write_out(&layers_text(&pinged.ping))?;
        }
        if let (Some(address), true) = (pinged.ping.innermost(), pinged.reached) {
            for _ in 1..self.count {
                thread::sleep(INTERVAL);
                let echoed = echo(client, address, 84)?;
                if output == Output::Table {
                    write_out(&format!("{address}  {}\n", round_trip(echoed.round_trip, &echoed.text)))?;
                }
                pinged.further.push(echoed.round_trip);
            }
            if let Some(size) = self.size {
                pinged.size = Some(find_size(client, address, size, pinged.ping.mtu)?);
            }
        }
        match output {
            Output::Json => print(output, &pinged, |_| String::new())?,
            Output::Table => write_out(&summary(&pinged))?,
        }
        let well = pinged.reached
            && pinged.further.iter().all(Option::is_some)
            && pinged.size.as_ref().is_none_or(|size| size.well);
        Ok(if well { 0 } else { FAILED })
    }
}

fn echo(client: &Client, address: IpAddr, size: u16) -> anyhow::Result<Echoed> {
    Ok(client.get_slowly(&format!("/v1/echo?address={address}&size={size}"))?)
}

/// Tries one length, or looks for the longest that is answered.
fn find_size(client: &Client, address: IpAddr, size: u16, mtu: Option<u16>) -> anyhow::Result<Size> {
    let mut answered = |size: u16| -> anyhow::Result<bool> {
        for _ in 0..TRIES {
            if echo(client, address, size)?.round_trip.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    };
    if size > 0 {
        let passes = answered(size)?;
        let text = if passes { "gets through" } else { "does not get through" };
        let text = format!("a packet of {size} bytes {text}");
        return Ok(Size { longest: passes.then_some(size), mtu: None, text, well: passes });
    }
    Ok(judge(longest(mtu.unwrap_or(LARGEST), &mut answered)?, mtu))
}

/// The longest length up to `most` for which `answered` says yes, if those up to it are answered and those beyond are not.
fn longest(most: u16, answered: &mut impl FnMut(u16) -> anyhow::Result<bool>) -> anyhow::Result<Option<u16>> {
    if answered(most)? {
        return Ok(Some(most));
    }
    let (mut passes, mut lost) = (SMALLEST.min(most), most);
    if !answered(passes)? {
        return Ok(None);
    }
    while lost - passes > 1 {
        let middle = passes + (lost - passes) / 2;
        if answered(middle)? { passes = middle } else { lost = middle }
    }
    Ok(Some(passes))
}

fn judge(longest: Option<u16>, mtu: Option<u16>) -> Size {
    let (text, well) = match (longest, mtu) {
        (None, _) => (format!("not even {SMALLEST} bytes get through"), false),
        (Some(longest), Some(mtu)) if longest < mtu => (
            format!(
                "an MTU hole: packets of more than {longest} bytes are lost, and the route is said to carry {mtu}\n  remedy  \
                 let ICMP \"too big\" pass on the way, raise the MTU there, or put \"Backend\": {{…, \"MTU\": {longest}}} into \
                 config"
            ),
            false,
        ),
        (Some(longest), _) => {
            (format!("packets of up to {longest} bytes get through: all that the route carries"), true)
        }
    };
    Size { longest, mtu, text, well }
}

fn layers_text(ping: &api::Ping) -> String {
    let of = if ping.target == ping.peer { String::new() } else { format!(" at {}", ping.peer) };
    let mut text = format!("{}{of}, {}\n", ping.target, ping.path);
    let mut rows = table(&[]);
    for layer in &ping.layers {
        rows.add_row([
            format!("  {}", layer.layer.name()),
            layer.address.clone(),
            mark(layer),
            round_trip(layer.round_trip, ""),
            layer.text.clone(),
        ]);
    }
    text += &rows.to_string();
    text.push('\n');
    for layer in ping.layers.iter().filter(|layer| layer.passes != Some(true) && !layer.remedy.is_empty()) {
        text += &format!("{}: {}\n  remedy  {}\n", layer.layer.name(), layer.text, layer.remedy);
    }
    text
}

fn mark(layer: &Layer) -> String {
    match layer.passes {
        Some(true) => toned("passes", Tone::Good),
        Some(false) => toned("fails", Tone::Bad),
        None => toned("unknown", Tone::Waiting),
    }
}

fn round_trip(seconds: Option<f64>, otherwise: &str) -> String {
    seconds.map_or_else(|| otherwise.to_owned(), |seconds| format!("{:.3} ms", seconds * 1e3))
}

fn summary(pinged: &Pinged) -> String {
    let mut text = String::new();
    if !pinged.further.is_empty() {
        let innermost = pinged.ping.layers.last().and_then(|layer| layer.round_trip);
        let all = || [innermost].into_iter().chain(pinged.further.iter().copied());
        let answered: Vec<f64> = all().flatten().collect();
        let least = answered.iter().copied().fold(f64::INFINITY, f64::min);
        let most = answered.iter().copied().fold(0.0, f64::max);
        let mean = answered.iter().sum::<f64>() / answered.len().max(1) as f64;
        text += &format!(
            "{} of {} answered; round trip least {:.3}, mean {:.3}, most {:.3} ms\n",
            answered.len(),
            all().count(),
            least * 1e3,
            mean * 1e3,
            most * 1e3
        );
    }
    if let Some(size) = &pinged.size {
        text += &format!("{}\n", size.text);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_that_passes_is_found_in_few_tries() {
        for (limit, most) in [(1420, 1420), (1300, 1420), (501, 1420), (500, 1420), (1419, 1420), (8999, 9000)] {
            let mut tries = 0;
            let found = longest(most, &mut |size| {
                tries += 1;
                Ok(size <= limit)
            });
            assert_eq!(found.unwrap(), Some(limit), "{limit} of {most}");
            assert!(tries <= 16, "{tries}");
        }
        assert_eq!(longest(1420, &mut |_| Ok(false)).unwrap(), None);
    }

    #[test]
    fn a_hole_is_named_with_what_passes() {
        assert!(judge(Some(1420), Some(1420)).well);
        let hole = judge(Some(1300), Some(1420));
        assert!(
            !hole.well && hole.text.contains("more than 1300") && hole.text.contains("\"MTU\": 1300"),
            "{}",
            hole.text
        );
        assert!(!judge(None, Some(1420)).well);
    }
}
