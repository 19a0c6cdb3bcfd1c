//! A path change of a prefix is one atomic replace.

use std::{
    io::{BufRead as _, BufReader},
    net::UdpSocket,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use super::{namespace::isolated, *};

/// The ways that one prefix takes, one after the other, each change a different one.
fn ways(via: &str, other: &str) -> Vec<RouteVia> {
    vec![
        direct(via),
        RouteVia::Tunnel,
        RouteVia::Unreachable,
        direct(via),
        direct(other),
        RouteVia::Unreachable,
        RouteVia::Tunnel,
        direct(via),
    ]
}

#[test]
fn every_change_of_path_is_one_replace() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        let mut desired = desired();
        settle(&kernel, &desired).await;
        let mut monitor = Command::new("ip").args(["-o", "monitor", "route"]).stdout(Stdio::piped()).spawn().unwrap();
        let (tell, lines) = mpsc::channel();
        let output = BufReader::new(monitor.stdout.take().unwrap());
        thread::spawn(move || {
            for line in output.lines() {
                let _ = tell.send(line.unwrap());
            }
        });
        // It listens once it has told of this. The kernel tells of no replacement by the same, so each is another.
        let patience = Duration::from_millis(20);
        let mut mtu = 1300;
        while !matches!(lines.recv_timeout(patience), Ok(l) if l.contains("203.0.113.0/24")) {
            mtu += 1;
            run(&format!("ip route replace 203.0.113.0/24 dev eth0 mtu {mtu}"));
        }
        let (four, six) = (ways("192.0.2.2", "192.0.2.3"), ways("2001:db8::2", "2001:db8::3"));
        let changes = four.len() - 1;
        for (four, six) in four.into_iter().zip(six).skip(1) {
            route_to(&mut desired, "10.244.2.0/24").via = four;
            route_to(&mut desired, "fd42:244:0:2::/64").via = six;
            let report = settle(&kernel, &desired).await;
            let replaced = report.changes.iter().filter(|c| matches!(c, KernelChange::RouteReplace(_))).count();
            assert_eq!((replaced, report.changes.len()), (2, 2), "{:?}", report.changes);
            settled(&kernel, &desired).await;
        }
        run("ip route add 203.0.113.128/25 dev eth0");
        let mut seen = Vec::new();
        loop {
            let line = lines.recv().unwrap();
            if line.contains("203.0.113.128/25") {
                break;
            }
            seen.push(line);
        }
        monitor.kill().unwrap();
        monitor.wait().unwrap();
        let of = |prefix: &str| seen.iter().filter(|l| l.contains(prefix)).count();
        assert_eq!(of("10.244.2.0/24"), changes, "{seen:#?}");
        assert_eq!(of("fd42:244:0:2::/64"), changes, "{seen:#?}");
        assert!(!seen.iter().any(|l| l.starts_with("Deleted")), "{seen:#?}");
    });
}

/// While a prefix goes back and forth between tunnel and direct, every lookup finds a way.
#[test]
fn no_lookup_ever_falls_through_to_the_floor() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        let mut desired = desired();
        settle(&kernel, &desired).await;
        let stop = Arc::new(AtomicBool::new(false));
        let lookups = Arc::new(AtomicU64::new(0));
        let prober = {
            let (stop, lookups) = (Arc::clone(&stop), Arc::clone(&lookups));
            thread::spawn(move || {
                let four = UdpSocket::bind("0.0.0.0:0").unwrap();
                let six = UdpSocket::bind("[::]:0").unwrap();
                while !stop.load(Ordering::Relaxed) {
                    four.connect("10.244.2.7:9")?;
                    six.connect("[fd42:244:0:2::7]:9")?;
                    lookups.fetch_add(1, Ordering::Relaxed);
                }
                Ok::<(), std::io::Error>(())
            })
        };
        let mut flips = 0;
        while flips < 60 || lookups.load(Ordering::Relaxed) < 2_000 {
            flips += 1;
            let tunnel = flips % 2 == 1;
            route_to(&mut desired, "10.244.2.0/24").via = if tunnel { RouteVia::Tunnel } else { direct("192.0.2.2") };
            route_to(&mut desired, "fd42:244:0:2::/64").via =
                if tunnel { RouteVia::Tunnel } else { direct("2001:db8::2") };
            settle(&kernel, &desired).await;
            if prober.is_finished() {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        prober.join().unwrap().unwrap();
    });
}
