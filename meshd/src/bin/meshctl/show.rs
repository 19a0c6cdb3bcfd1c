//! `meshctl status`, `peers` and `routes`.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use api::{Client, ClientError};
use api_types::{CopyStatus, DaemonState, DropCount, Path, Peer, PeerCounts, Route, Status};
use etcd_schema::PeerName;

use crate::{
    exit::{DEGRADED, UsageError},
    output::{Output, Tone, bytes, print, print_lines, table, toned},
};

/// How long the daemon may take to hear of a peer that was put.
const AFTER_PUT: Duration = Duration::from_secs(3);
const AGAIN: Duration = Duration::from_millis(100);

pub(crate) fn status(output: Output, client: &Client, check: bool) -> anyhow::Result<u8> {
    let status: Status = client.get("/v1/status")?;
    print(output, &status, status_text)?;
    let well = status.state == DaemonState::Running && status.problems.is_empty();
    Ok(if check && !well { DEGRADED } else { 0 })
}

pub(crate) fn peers(output: Output, client: &Client) -> anyhow::Result<u8> {
    let peers: Vec<Peer> = client.get("/v1/peers")?;
    print(output, &peers, |peers| peers_text(peers))?;
    Ok(0)
}

pub(crate) fn peer_config(client: &Client, name: &str) -> anyhow::Result<u8> {
    let name: PeerName = name.parse().map_err(|error| UsageError(format!("{name}: {error}")))?;
    print_lines(&config_of(client, &name)?)?;
    Ok(0)
}

fn config_of(client: &Client, name: &PeerName) -> Result<String, ClientError> {
    let path = format!("/v1/peers/{name}/config");
    let asked = Instant::now();
    loop {
        match client.get_text(&path) {
            // It may have been put just now.
            Err(ClientError::NotFound(_)) if asked.elapsed() < AFTER_PUT => thread::sleep(AGAIN),
            answer => return answer,
        }
    }
}

pub(crate) fn routes(output: Output, client: &Client) -> anyhow::Result<u8> {
    let routes: Vec<Route> = client.get("/v1/routes")?;
    print(output, &routes, |routes| routes_text(routes))?;
    Ok(0)
}

pub(crate) fn status_text(status: &Status) -> String {
    let list = |items: Vec<String>| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
    let etcd = match (status.etcd.connected, &status.etcd.endpoint) {
        (true, Some(endpoint)) => format!("connected to {endpoint}"),
        (false, Some(endpoint)) => format!("not connected, last to {endpoint}{}", age(status.etcd.age)),
        (_, None) => "never connected".to_owned(),
    };
    let policy = &status.policy;
    let mut lines = vec![
        format!("node      {} ({})", status.node, status.id),
        format!("site      {}", status.site.as_deref().unwrap_or("none")),
        format!("cluster   {}", if status.cluster.is_empty() { "none" } else { &status.cluster }),
        format!("version   {}, up {}", status.version, duration(status.uptime)),
        format!("subnets   {}", list(status.subnets.iter().map(ToString::to_string).collect())),
        format!("overlay   {}", list(status.overlay.iter().map(ToString::to_string).collect())),
        format!("etcd      {etcd}, revision {} (newest {})", status.revision, status.etcd.revision),
        format!("peers     {}", peer_counts(&status.peers)),
        format!(
            "policy    {}, {}, {}, revision {}",
            if policy.mode == "audit" { toned("audit", Tone::Waiting) } else { policy.mode.clone() },
            counted(policy.policies, "policy", "policies"),
            counted(policy.pods, "pod", "pods"),
            policy.revision
        ),
    ];
    lines.extend(status.copies.iter().map(copy));
    lines.extend([
        format!("drops     {}", drops(&status.drops)),
        format!("state     {}", toned(state_name(status.state), state_tone(status.state))),
    ]);
    for problem in &status.problems {
        lines.push(format!("problem   {}: {}", toned(&problem.code, Tone::Bad), problem.cause));
        lines.push(format!("  remedy  {}", problem.remedy));
    }
    lines.join("\n") + "\n"
}

/// One line on the copy of a cluster: `meshd-sync` writes its state every 10 s.
fn copy(copy: &CopyStatus) -> String {
    let age = format!("{} old", duration(copy.age_seconds));
    let tone = if copy.age_seconds > 60 { Tone::Bad } else { Tone::Good };
    let objects = copy.objects.iter().map(|(kind, count)| format!(", {count} {kind}"));
    let held = match copy.held {
        0 => String::new(),
        held => {
            let waiting = toned(&counted(held, "finding waits", "findings wait"), Tone::Bad);
            format!("; {waiting} for meshctl sync confirm {}", copy.cluster)
        }
    };
    format!("copy      cluster {}: {}{}{held}", copy.cluster, toned(&age, tone), objects.collect::<String>())
}

fn peer_counts(peers: &PeerCounts) -> String {
    let PeerCounts { direct, vxlan, wireguard, unreachable, offline } = *peers;
    let by_vxlan = if vxlan == 0 { String::new() } else { format!(", {vxlan} by VXLAN") };
    let reached = format!("{direct} direct, {wireguard} by WireGuard{by_vxlan}");
    if unreachable == 0 {
        return reached;
    }
    let down = if offline == 0 { String::new() } else { format!(" ({offline} offline)") };
    format!("{reached}, {}{down}: see meshctl peers", toned(&format!("{unreachable} unreachable"), Tone::Bad))
}

/// The reasons that dropped most.
fn drops(drops: &[DropCount]) -> String {
    const SHOWN: usize = 4;
    let mut most: Vec<&DropCount> = drops.iter().collect();
    most.sort_by_key(|drop| Reverse(drop.packets));
    let named = most.iter().take(SHOWN).map(|drop| format!("{} {}", drop.reason, drop.packets)).collect::<Vec<_>>();
    match drops.len().saturating_sub(SHOWN) {
        _ if drops.is_empty() => "none".to_owned(),
        0 => named.join(", "),
        more => format!("{}, {more} more reasons", named.join(", ")),
    }
}

pub(crate) fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

fn age(seconds: Option<f64>) -> String {
    seconds.map_or_else(String::new, |seconds| format!(" {} ago", duration(seconds as u64)))
}

/// `3h 12m`: the two largest units.
fn duration(seconds: u64) -> String {
    let text = humantime::format_duration(Duration::from_secs(seconds)).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

fn state_name(state: DaemonState) -> &'static str {
    match state {
        DaemonState::Starting => "starting",
        DaemonState::Joining => "joining",
        DaemonState::Running => "running",
        DaemonState::Degraded => "degraded",
        DaemonState::Removed => "removed",
        DaemonState::Cloned => "cloned",
    }
}

const fn state_tone(state: DaemonState) -> Tone {
    match state {
        DaemonState::Running => Tone::Good,
        DaemonState::Starting | DaemonState::Joining => Tone::Waiting,
        DaemonState::Degraded | DaemonState::Removed | DaemonState::Cloned => Tone::Bad,
    }
}

const fn path_tone(path: Path) -> Tone {
    match path {
        Path::By(_) => Tone::Good,
        Path::Unreachable => Tone::Bad,
    }
}

pub(crate) fn peers_text(peers: &[Peer]) -> String {
    let mut table = table(&[
        "NAME",
        "SITE",
        "SUBNETS",
        &toned("PATH", Tone::Plain),
        "ENDPOINT",
        "HANDSHAKE",
        "RX",
        "TX",
        "MTU",
        "REASON",
    ]);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    for peer in peers {
        let handshake = peer
            .latest_handshake
            .map_or_else(|| "-".to_owned(), |at| format!("{} ago", duration(now.saturating_sub(at))));
        table.add_row([
            peer.name.clone(),
            peer.site.clone().unwrap_or_else(|| "-".to_owned()),
            peer.subnets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
            toned(&peer.path.to_string(), path_tone(peer.path)),
            peer.endpoint.map_or_else(|| "-".to_owned(), |endpoint| endpoint.to_string()),
            handshake,
            bytes(peer.rx),
            bytes(peer.tx),
            peer.mtu.map_or_else(|| "-".to_owned(), |mtu| mtu.to_string()),
            peer.reason.clone(),
        ]);
    }
    let mut text = table.to_string() + "\n";
    for peer in peers.iter().filter(|peer| peer.path == Path::Unreachable) {
        let cause = if peer.reason.is_empty() { "unreachable" } else { &peer.reason };
        text += &format!("{}: {cause}\n  remedy  {}\n", peer.name, peer.remedy);
    }
    text
}

pub(crate) fn routes_text(routes: &[Route]) -> String {
    let mut table = table(&["DESTINATION", &toned("PATH", Tone::Plain), "PEER", "VIA", "DEV", "MTU", "SRC"]);
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    for route in routes {
        table.add_row([
            route.dst.to_string(),
            toned(&route.path.to_string(), if route.peer.is_empty() { Tone::Quiet } else { path_tone(route.path) }),
            if route.peer.is_empty() && route.path == Path::Unreachable {
                "(floor)".into()
            } else {
                route.peer.clone()
            },
            or_dash(route.via.map(|via| via.to_string())),
            or_dash(route.dev.clone()),
            or_dash(route.mtu.map(|mtu| mtu.to_string())),
            or_dash(route.src.map(|src| src.to_string())),
        ]);
    }
    let mut text = table.to_string() + "\n";
    let lost = |route: &&Route| route.path == Path::Unreachable && !route.peer.is_empty();
    let lost: BTreeMap<&str, &Route> = routes.iter().filter(lost).map(|route| (route.peer.as_str(), route)).collect();
    for (peer, route) in lost {
        let cause = if route.reason.is_empty() { "unreachable" } else { &route.reason };
        text += &format!("{peer}: {cause}\n  remedy  {}\n", route.remedy);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        os::unix::net::UnixListener,
    };

    use mesh::backend::PathKind;

    use super::*;

    #[test]
    fn a_peer_that_was_put_just_now_is_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join(api::SOCKET)).expect("a socket");
        let daemon = thread::spawn(move || {
            for answer in ["404 Not Found\r\n\r\nno peer laptop", "404 Not Found\r\n\r\n", "200 OK\r\n\r\n[Interface]"]
            {
                let (stream, _) = listener.accept().expect("a request");
                let mut asked = String::new();
                BufReader::new(&stream).read_line(&mut asked).expect("its first line");
                assert_eq!(asked, "GET /v1/peers/laptop/config HTTP/1.0\r\n");
                write!(&stream, "HTTP/1.1 {answer}").expect("an answer");
            }
        });
        let config = config_of(&Client::new(folder.path()), &"laptop".parse().expect("a name"));
        assert_eq!(config.expect("the third answer"), "[Interface]");
        daemon.join().expect("three requests");
    }

    #[test]
    fn a_copy_shows_its_age_and_counts() {
        let objects = BTreeMap::from([("networkpolicies".to_owned(), 3), ("pods".to_owned(), 120)]);
        let mut east = CopyStatus { cluster: "east".to_owned(), age_seconds: 4, objects, held: 0 };
        assert_eq!(copy(&east), "copy      cluster east: 4s old, 3 networkpolicies, 120 pods");
        (east.age_seconds, east.held) = (3720, 1);
        let said = copy(&east);
        assert!(
            said.contains("1h 2m old") && said.ends_with("1 finding waits for meshctl sync confirm east"),
            "{said}"
        );
    }

    fn route(dst: &str, path: Path, peer: &str) -> Route {
        let remedy = format!("meshctl ping {peer}");
        Route { path, peer: peer.to_owned(), remedy, ..Route::nowhere(dst.parse().expect("a prefix")) }
    }

    #[test]
    fn a_route_that_leads_nowhere_says_what_to_do_and_the_floor_is_no_fault() {
        let well = [
            route("10.244.0.0/16", Path::Unreachable, ""),
            route("10.244.1.0/24", Path::By(PathKind::Wireguard), "west-1"),
        ];
        assert!(!routes_text(&well).contains("remedy"));
        let lost = ["10.244.2.0/24", "fd42:244:0:2::/64"].map(|dst| route(dst, Path::Unreachable, "west-2"));
        assert_eq!(routes_text(&lost).matches("meshctl ping west-2").count(), 1, "once for both families");
    }
}
