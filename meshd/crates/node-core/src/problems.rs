//! Problems of a node that cannot act on the mesh, or not wholly.

use control_core::core::CacheInfo;
use mesh::problem::{Problem, ProblemCode};

/// There is no topology to act on yet.
pub(crate) fn waiting_for_etcd(cache: Option<CacheInfo>) -> Problem {
    let cause = match cache {
        None => "nothing has been read from etcd yet, and there is no cache of an earlier run".to_owned(),
        Some(cache) => format!(
            "nothing has been read from etcd yet, and the cache is {} s old, more than LeaseTTL: its subnets may \
             belong to other nodes by now",
            cache.age.as_secs()
        ),
    };
    Problem::new(
        ProblemCode::WaitingForEtcd,
        cause,
        "start etcd; this node forwards packets as soon as it has read etcd",
    )
}

/// There are no routes and no peers although the mesh is known.
pub(crate) fn identity_unconfirmed() -> Problem {
    Problem::new(
        ProblemCode::IdentityUnconfirmed,
        "another daemon may be running with this node's identity: no handshakes are initiated until etcd rules that \
         out, for at most 5 s",
        "none needed: if another daemon is running, the problem `cloned` follows",
    )
}

/// There are no routes although the mesh is known.
pub(crate) fn pods_not_guarded() -> Problem {
    Problem::new(
        ProblemCode::PodsNotGuarded,
        "nftables refuses the rules that protect this node's pods, so no routes are installed; see the log",
        "install nftables, and check that the kernel supports nf_tables; the daemon retries",
    )
}

/// There is nothing to reach peers by.
pub(crate) fn no_underlay() -> Problem {
    Problem::new(
        ProblemCode::NoUnderlay,
        "no underlay interface: there is no default route, or the interface of --iface does not exist",
        "bring the interface up, or select another one with --iface",
    )
}
