//! `meshctl ping`.

use std::{net::IpAddr, str::FromStr, thread, time::Duration};

use api::Client;
use api_types::{Echoed, Layer, LayerKind};
use clap::Args;
use etcd_schema::BackendConfig;
use meshd::echo::MIN_PACKET;
use serde::{Deserialize, Serialize};

use crate::{
    exit::{FAILED, UsageError},
    output::{Output, Tone, print, print_lines, table, toned},
};

/// Between two echoes.
const INTERVAL: Duration = Duration::from_secs(1);
/// The size that every link must carry (RFC 791: 576, less the overhead of a tunnel).
const SMALLEST: u16 = 500;
/// Largest that is tried.
const LARGEST: u16 = 9000;
/// An echo may be lost by chance.
const TRIES: usize = 2;
/// The remedy for every black hole.
const RAISE: &str = "let ICMP \"too big\" pass on the way, or raise the MTU there";

#[derive(Args)]
pub(crate) struct PingCommand {
    /// Name of a node or external peer, id of a node, or address in the mesh
    #[arg(value_name = "NODE|IP", required_unless_present = "size")]
    target: Option<String>,
    /// Number of echo requests: the first layer by layer, the others to the innermost address only, one per second
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// Find the largest packet that gets through; with a number: try a packet of this size, including its IP header
    #[arg(short, long, value_name = "BYTES", num_args = 0..=1)]
    size: Option<Option<Word>>,
}

/// The word behind `--size`: a length, or already the target.
#[derive(Clone)]
enum Word {
    Length(u16),
    Target(String),
}

impl FromStr for Word {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        if !word.bytes().all(|b| b.is_ascii_digit()) {
            return Ok(Self::Target(word.to_owned()));
        }
        let length = word.parse().ok().filter(|length| *length >= MIN_PACKET);
        length.map(Self::Length).ok_or_else(|| format!("must be {MIN_PACKET} to {} bytes", u16::MAX))
    }
}

/// The output with `-o json`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pinged {
    #[serde(flatten)]
    ping: api_types::Ping,
    reached: bool,
    /// Seconds, of the further echoes to the innermost address; `null`: no answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    further: Vec<Option<f64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<Size>,
    /// The skipped request, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped: Option<String>,
}

/// The result of `--size`.
#[derive(Serialize, Deserialize, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
struct Size {
    /// The longest packet that was answered, in bytes; `None`: not even the shortest one.
    longest: Option<u16>,
    /// The MTU of the route.
    mtu: Option<u16>,
    /// The finding and the remedy.
    text: String,
    well: bool,
}

impl PingCommand {
    /// The target, and the size if any: `--size` takes the next word if it is a number.
    fn asked(&self) -> Result<(&str, Option<Option<u16>>), UsageError> {
        match (&self.target, &self.size) {
            (Some(target), None) => Ok((target, None)),
            (Some(target), Some(None)) => Ok((target, Some(None))),
            (Some(target), Some(Some(Word::Length(length)))) => Ok((target, Some(Some(*length)))),
            (None, Some(Some(Word::Target(target)))) => Ok((target, Some(None))),
            (Some(_), Some(Some(Word::Target(word)))) => {
                Err(UsageError(format!("--size {word}: not a number of bytes")))
            }
            (None, _) => Err(UsageError("name a node or an address to ping: meshctl ping -s 1400 NODE".to_owned())),
        }
    }

    pub(crate) fn run(&self, output: Output, client: &Client) -> anyhow::Result<u8> {
        let (target, size) = self.asked()?;
        if !target.bytes().all(|b| b.is_ascii_alphanumeric() || b":.-_".contains(&b)) {
            return Err(UsageError(format!(
                "{target:?} is neither a name nor an address (for a peer shown as NAME (ID), use its id)"
            ))
            .into());
        }
        let ping: api_types::Ping = client.get_slowly(&format!("/v1/ping?target={target}"))?;
        let mut pinged = Pinged { reached: reached(&ping), ping, further: Vec::new(), size: None, skipped: None };
        if output == Output::Table {
            print(output, &pinged.ping, layers_text)?;
        }
        if let (Some(address), true) = (pinged.ping.innermost(), pinged.reached) {
            for _ in 1..self.count {
                thread::sleep(INTERVAL);
                let echoed = echo(client, address, 84)?;
                if output == Output::Table {
                    print(output, &echoed, |echoed| {
                        format!("{address}  {}\n", round_trip(echoed.round_trip, &echoed.text))
                    })?;
                }
                pinged.further.push(echoed.round_trip);
            }
            if let Some(size) = size {
                pinged.size = Some(find_size(client, target, address, size, pinged.ping.mtu)?);
            }
        } else if self.count > 1 || size.is_some() {
            let why =
                if pinged.reached { "no address behind it is known: give an address" } else { "it is unreachable" };
            pinged.skipped = Some(format!("--count and --size were not tried on {target}: {why}"));
        }
        match output {
            Output::Json => print(output, &pinged, |_| String::new())?,
            Output::Table => print_lines(&summary(&pinged))?,
        }
        let well = pinged.reached
            && pinged.skipped.is_none()
            && pinged.further.iter().all(Option::is_some)
            && pinged.size.as_ref().is_none_or(|size| size.well);
        Ok(if well { 0 } else { FAILED })
    }
}

/// Tries one length, or looks for the longest that is answered.
fn find_size(
    client: &Client,
    target: &str,
    address: IpAddr,
    size: Option<u16>,
    mtu: Option<u16>,
) -> anyhow::Result<Size> {
    let mut answered = |size: u16| -> anyhow::Result<bool> {
        for _ in 0..TRIES {
            if echo(client, address, size)?.round_trip.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    };
    match size {
        Some(size) => Ok(judge_one(target, size, answered(size)?, mtu)),
        None => Ok(judge(target, longest(mtu.unwrap_or(LARGEST), &mut answered)?, mtu)),
    }
}

/// Whether every layer that can answer has answered. An external peer without an address to ping is judged by its
/// tunnel.
fn reached(ping: &api_types::Ping) -> bool {
    let is_inner = |layer: &Layer| matches!(layer.layer, LayerKind::Overlay | LayerKind::Pod);
    ping.reached()
        || !ping.layers.is_empty() && ping.layers.iter().all(|layer| !is_inner(layer) && layer.passes == Some(true))
}

fn echo(client: &Client, address: IpAddr, size: u16) -> anyhow::Result<Echoed> {
    Ok(client.get_slowly(&format!("/v1/echo?address={address}&size={size}"))?)
}

/// The greatest answered length up to `most`, found by bisection: smaller ones are assumed answered, greater ones not.
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

/// Judges the longest packet that passes.
fn judge(target: &str, longest: Option<u16>, mtu: Option<u16>) -> Size {
    let (text, well) = match (longest, mtu) {
        (None, _) => (
            format!(
                "packets of {SMALLEST} bytes are lost, shorter ones get through\n  remedy  {RAISE}; run meshctl \
                 doctor here and on {target}"
            ),
            false,
        ),
        (Some(longest), Some(mtu)) if longest < mtu => (
            format!(
                "MTU black hole: packets larger than {longest} bytes are lost, but the route's MTU is {mtu}\n  \
                 remedy  {RAISE}{}",
                smaller_mtu(longest)
            ),
            false,
        ),
        (Some(longest), _) => (format!("packets of up to {longest} bytes get through: the route's full MTU"), true),
    };
    Size { longest, mtu, text, well }
}

/// The other remedy of a hole, where `config` takes an MTU as small as that.
fn smaller_mtu(longest: u16) -> String {
    let with = |which: &str| format!(", or{which} set \"Backend\": {{…, \"MTU\": {longest}}} in config");
    match longest {
        mtu if mtu >= BackendConfig::least_mtu(true) => with(""),
        mtu if mtu >= BackendConfig::least_mtu(false) => with(", in a mesh without IPv6,"),
        _ => String::new(),
    }
}

/// Judges one length.
fn judge_one(target: &str, size: u16, passes: bool, mtu: Option<u16>) -> Size {
    let text = match (passes, mtu) {
        (true, _) => format!("a packet of {size} bytes gets through"),
        (false, Some(mtu)) if size > mtu => format!(
            "a packet of {size} bytes does not get through: the route's MTU is {mtu}\n  remedy  none needed: pods \
             send no larger packets"
        ),
        (false, _) => format!(
            "a packet of {size} bytes does not get through\n  remedy  meshctl ping {target} --size # finds the \
             largest that does"
        ),
    };
    Size { longest: passes.then_some(size), mtu, text, well: passes }
}

pub(crate) fn layers_text(ping: &api_types::Ping) -> String {
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
            "{} of {} answered; round trip min {:.3}, mean {:.3}, max {:.3} ms\n",
            answered.len(),
            all().count(),
            least * 1e3,
            mean * 1e3,
            most * 1e3
        );
    }
    for said in [pinged.size.as_ref().map(|size| &size.text), pinged.skipped.as_ref()].into_iter().flatten() {
        text += &format!("{said}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use mesh::backend::PathKind;

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
        assert!(judge("west-1", Some(1420), Some(1420)).well);
        let hole = judge("west-1", Some(1300), Some(1420));
        assert!(
            !hole.well && hole.text.contains("larger than 1300") && hole.text.contains("\"MTU\": 1300"),
            "{hole:?}"
        );
        assert!(!judge("west-1", None, Some(1420)).well);
    }

    #[test]
    fn no_remedy_names_an_mtu_that_config_refuses() {
        let hole = |longest| judge("west-1", Some(longest), Some(1420)).text;
        assert!(hole(1280).contains("\"MTU\": 1280") && !hole(1280).contains("IPv6"), "{}", hole(1280));
        assert!(hole(1279).contains("in a mesh without IPv6, set"), "{}", hole(1279));
        assert!(!hole(575).contains("\"MTU\""), "{}", hole(575));
    }

    #[test]
    fn a_length_that_does_not_pass_has_a_remedy() {
        let one = |size, passes| judge_one("west-1", size, passes, Some(1420));
        assert_eq!((one(1400, true).longest, one(1400, true).well), (Some(1400), true));
        assert!(one(1400, false).text.contains("remedy  meshctl ping west-1 --size"), "{:?}", one(1400, false));
        assert!(one(1500, false).text.contains("the route's MTU is 1420"), "{:?}", one(1500, false));
    }

    #[test]
    fn an_outside_peer_with_prefixes_alone_is_reached_when_its_tunnel_is() {
        let layer = |kind, passes| Layer {
            layer: kind,
            address: "192.0.2.1:51820".to_owned(),
            passes,
            round_trip: None,
            text: String::new(),
            remedy: String::new(),
        };
        let ping = |layers| api_types::Ping {
            target: "laptop".to_owned(),
            peer: "laptop".to_owned(),
            path: api_types::Path::By(PathKind::Wireguard),
            mtu: None,
            layers,
        };
        let tunnel = |passes| vec![layer(LayerKind::Udp, Some(true)), layer(LayerKind::Wireguard, passes)];
        assert!(reached(&ping(tunnel(Some(true)))));
        assert!(!reached(&ping(tunnel(Some(false)))) && !reached(&ping(Vec::new())));
        let silent = [tunnel(Some(true)), vec![layer(LayerKind::Overlay, Some(false))]].concat();
        assert!(!reached(&ping(silent)));
    }

    #[test]
    fn the_length_may_follow_its_flag() {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            ping: PingCommand,
        }
        let parse = |args: &[&str]| Line::try_parse_from([&["ping"], args].concat()).map(|line| line.ping);
        type Asked = (String, Option<Option<u16>>);
        let asked = |args: &[&str]| -> Option<Asked> {
            let ping = parse(args).unwrap_or_else(|error| panic!("{args:?}: {error}"));
            ping.asked().ok().map(|(target, size)| (target.to_owned(), size))
        };
        let west = |size| Some(("west-1".to_owned(), size));
        for longest in [&["--size", "west-1"][..], &["west-1", "--size"], &["-s", "west-1"], &["west-1", "-s"]] {
            assert_eq!(asked(longest), west(Some(None)), "{longest:?}");
        }
        for one in [
            &["west-1", "--size=1400"][..],
            &["-s", "1400", "west-1"],
            &["west-1", "-s", "1400"],
            &["--size", "1400", "west-1"],
            &["-s1400", "west-1"],
        ] {
            assert_eq!(asked(one), west(Some(Some(1400))), "{one:?}");
        }
        assert_eq!(asked(&["west-1"]), west(None));
        for wrong in [&["-s", "1400"][..], &["west-1", "-s", "east-1"]] {
            assert_eq!(asked(wrong), None, "{wrong:?}");
        }
        assert!(parse(&["west-1", "--size=20"]).err().is_some_and(|error| error.to_string().contains("56 to")));
        assert!(parse(&[]).is_err());
    }
}
