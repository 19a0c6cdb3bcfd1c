//! The members as a ConfigMap records them: what each starts etcd with.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Label of the nodes with a member; the DaemonSet selects them. A kubelet cannot put one of this kind on its own Node, and
/// so cannot make itself a member.
pub(crate) const MEMBER_LABEL: &str = "meshd.node-restriction.kubernetes.io/etcd";

/// All members. Written by `setup` and `maintain`, read by each member as it starts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct MembersRecord {
    /// In the order in which they came.
    pub(crate) members: Vec<Member>,
    /// All snapshots that were ever restored, as [`SnapshotName`] prints them: each is once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) restored: Vec<String>,
}

/// A member: an etcd on a node. A node that loses its data comes back as another member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Member {
    /// Name in etcd: that of the node, and a suffix that no earlier member had.
    pub(crate) name: String,
    pub(crate) node: String,
    pub(crate) peer_urls: Vec<String>,
    pub(crate) client_urls: Vec<String>,
    /// Of the cluster that it is in: etcd's ids follow from it, so members from before a restore are strangers.
    pub(crate) token: String,
    /// The members that it starts with, itself among them, by name.
    pub(crate) initial_cluster: BTreeMap<String, Vec<String>>,
    /// Whether it has been seen as a voting member: its data is part of the cluster's from then on.
    pub(crate) joined: bool,
    /// Snapshot that it begins with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) snapshot: Option<String>,
}

/// Ports of all members.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) client: u16,
    pub(crate) peer: u16,
}

/// `NODE/FILE`: a snapshot, and the node that has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SnapshotName {
    pub(crate) node: String,
    pub(crate) file: String,
}

/// Where a member has its files.
pub(crate) struct Folders<'a> {
    /// A folder for each member that ran here, and `snapshots`.
    pub(crate) data: &'a Path,
    /// tls.crt, tls.key and ca.crt.
    pub(crate) certificates: &'a Path,
}

impl MembersRecord {
    /// URLs of all members, as `--etcd-endpoints-file` takes them.
    pub(crate) fn endpoints(&self) -> String {
        let urls = self.members.iter().flat_map(|member| &member.client_urls);
        urls.map(|url| format!("{url}\n")).collect()
    }

    pub(crate) fn on_node(&self, node: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.node == node)
    }

    pub(crate) fn named_mut(&mut self, name: &str) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.name == name)
    }
}

impl Member {
    /// A member that joins `others`, or begins alone. No other member ever has this `suffix`.
    pub(crate) fn new(node: &str, suffix: &str, addresses: &[IpAddr], ports: Ports, others: &[Self]) -> Self {
        let (peer_urls, client_urls) = (urls(addresses, ports.peer), urls(addresses, ports.client));
        let (name, node) = (format!("{node}-{suffix}"), node.to_owned());
        let token = others.first().map_or_else(|| format!("meshd-{suffix}"), |other| other.token.clone());
        let mut initial_cluster: BTreeMap<_, _> =
            others.iter().map(|other| (other.name.clone(), other.peer_urls.clone())).collect();
        initial_cluster.insert(name.clone(), peer_urls.clone());
        Self { name, node, peer_urls, client_urls, token, initial_cluster, joined: false, snapshot: None }
    }

    /// Whether it is the first of its cluster.
    pub(crate) fn begins_alone(&self) -> bool {
        self.initial_cluster.len() == 1
    }

    /// Where its data is.
    pub(crate) fn data_dir(&self, data: &Path) -> PathBuf {
        data.join(&self.name)
    }

    /// What `etcd` is started with.
    pub(crate) fn etcd_arguments(&self, folders: &Folders<'_>, ports: Ports, metrics_port: u16) -> Vec<String> {
        let any = self.any_address();
        let file = |name: &str| folders.certificates.join(name).display().to_string();
        let mut arguments = self.identity_arguments();
        let state = if self.begins_alone() { "new" } else { "existing" };
        arguments.extend([
            format!("--data-dir={}", self.data_dir(folders.data).display()),
            format!("--initial-cluster-state={state}"),
            format!("--listen-peer-urls=https://{any}:{}", ports.peer),
            format!("--listen-client-urls=https://{any}:{}", ports.client),
            format!("--advertise-client-urls={}", self.client_urls.join(",")),
            format!("--listen-metrics-urls=http://127.0.0.1:{metrics_port}"),
            "--auto-compaction-mode=periodic".to_owned(),
            "--auto-compaction-retention=1h".to_owned(),
            // It would call etcd with the server's certificate.
            "--enable-grpc-gateway=false".to_owned(),
        ]);
        for (prefix, check) in [("", "--client-cert-auth"), ("peer-", "--peer-client-cert-auth")] {
            arguments.extend([
                check.to_owned(),
                format!("--{prefix}cert-file={}", file("tls.crt")),
                format!("--{prefix}key-file={}", file("tls.key")),
                format!("--{prefix}trusted-ca-file={}", file("ca.crt")),
            ]);
        }
        // One authority signs all certificates: those of nodes must not open the members' own port. The address that a
        // member comes from may not be one of its Node's.
        arguments.push(format!("--peer-cert-allowed-cn={}", crate::certificates::SERVER));
        arguments.push("--peer-skip-client-san-verification".to_owned());
        arguments
    }

    /// What `etcdutl snapshot restore` and `etcd` need alike.
    pub(crate) fn identity_arguments(&self) -> Vec<String> {
        let cluster =
            self.initial_cluster.iter().flat_map(|(name, urls)| urls.iter().map(move |url| format!("{name}={url}")));
        vec![
            format!("--name={}", self.name),
            format!("--initial-cluster={}", cluster.collect::<Vec<_>>().join(",")),
            format!("--initial-advertise-peer-urls={}", self.peer_urls.join(",")),
            format!("--initial-cluster-token={}", self.token),
        ]
    }

    /// An address of the node may change while etcd runs: it listens on all.
    fn any_address(&self) -> &'static str {
        let is_v6 = self.peer_urls.iter().any(|url| url.contains('['));
        if is_v6 { "[::]" } else { "0.0.0.0" }
    }
}

impl std::fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.node, self.file)
    }
}

impl std::str::FromStr for SnapshotName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').filter(|(node, file)| {
            !node.is_empty() && !file.is_empty() && !file.contains('/') && !file.starts_with('.')
        });
        let (node, file) = parts.ok_or("must be NODE/FILE, a snapshot in that node's folder of snapshots")?;
        Ok(Self { node: node.to_owned(), file: file.to_owned() })
    }
}

/// `https://ADDRESS:PORT` for each address, in etcd's order.
pub(crate) fn urls(addresses: &[IpAddr], port: u16) -> Vec<String> {
    let mut urls: Vec<String> =
        addresses.iter().map(|address| format!("https://{}", std::net::SocketAddr::new(*address, port))).collect();
    urls.sort();
    urls
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORTS: Ports = Ports { client: 2391, peer: 2392 };

    fn member(node: &str, address: &str, others: &[Member]) -> Member {
        Member::new(node, "1", &[address.parse().unwrap()], PORTS, others)
    }

    #[test]
    fn the_first_member_begins_a_cluster_and_a_later_one_joins_it() {
        let first = member("a", "192.0.2.1", &[]);
        let second = member("b", "fd00::2", std::slice::from_ref(&first));
        assert!(first.begins_alone() && !second.begins_alone());
        let folders = Folders { data: Path::new("/data"), certificates: Path::new("/tls") };
        let of = |member: &Member| member.etcd_arguments(&folders, PORTS, 2393).join(" ");
        let (first, second) = (of(&first), of(&second));
        for wanted in [
            "--name=a-1 --initial-cluster=a-1=https://192.0.2.1:2392 ",
            "--data-dir=/data/a-1 --initial-cluster-state=new ",
            "--listen-client-urls=https://0.0.0.0:2391 --advertise-client-urls=https://192.0.2.1:2391 ",
            "--client-cert-auth --cert-file=/tls/tls.crt",
            "--peer-client-cert-auth",
        ] {
            assert!(first.contains(wanted), "{wanted}: {first}");
        }
        let cluster = "--initial-cluster=a-1=https://192.0.2.1:2392,b-1=https://[fd00::2]:2392 ";
        assert!(second.contains(cluster) && second.contains("-state=existing"), "{second}");
        assert!(second.contains("--initial-cluster-token=meshd-1 "), "{second}");
        assert!(second.contains("--listen-peer-urls=https://[::]:2392"), "{second}");
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let mut record = MembersRecord { members: vec![member("a", "192.0.2.1", &[])], restored: Vec::new() };
        record.members[0].snapshot = Some("x.db".to_owned());
        record.restored.push("n/x.db".to_owned());
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<MembersRecord>(&text).unwrap(), record);
        assert_eq!(record.endpoints(), "https://192.0.2.1:2391\n");
    }

    #[test]
    fn a_snapshot_is_a_file_of_a_node() {
        assert_eq!("n1/a.db".parse::<SnapshotName>().unwrap().to_string(), "n1/a.db");
        for wrong in ["", "a.db", "/a.db", "n1/", "n1/../a.db", "n1/..", "n1/.x"] {
            assert!(wrong.parse::<SnapshotName>().is_err(), "{wrong}");
        }
    }
}
