//! Manages Labs by hand.

use std::{env, io::Read as _, process::ExitCode};

use integration::{Lab, ping, remove_kept, topology::TwoSites};

const USAGE: &str = "usage:
    lab-tool clean [ID]…     remove Labs that were kept with KEEP=1 (all of them without an ID)
    lab-tool pair            two hosts on a switch, up until standard input closes
    lab-tool two-sites       the topology of most scenarios with an etcd in it, up until standard input closes
";

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["clean", ids @ ..] => {
            for id in remove_kept(|id| ids.is_empty() || ids.contains(&id)) {
                println!("removed {id}");
            }
        }
        ["pair"] => pair(),
        ["two-sites"] => two_sites(),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn pair() {
    let lab = Lab::new("pair");
    let switch = lab.switch("lan");
    let (a, b) = (lab.host("a"), lab.host("b"));
    a.connect(&switch, &["192.0.2.1/24"]);
    b.connect(&switch, &["192.0.2.2/24"]);
    ping(&a, "192.0.2.2").assert_all_answered();
    let _sleeper = a.spawn("sleep", &["1000"]);
    // One that has detached itself, as daemons do.
    b.run_args(&["bash", "-c", "setsid sleep 1000 >/dev/null 2>&1 &"]);
    println!("{}", lab.id());
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

fn two_sites() {
    let sites = TwoSites::new("two-sites");
    let etcd = sites.start_etcd(1);
    let id = sites.lab.id();
    println!("etcd: {}", etcd.endpoints());
    for host in sites.hosts().chain([&*sites.router, &sites.store]) {
        println!("ip netns exec {id}-{} bash", host.name());
    }
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}
