//! `meshctl etcd-roles`.

use clap::Args;
use control::etcd_options::check_prefix;
use control_core::roles::{self, Grant, Role};
use etcd_schema::{Cluster, NodeId};
use ipnet::IpNet;
use sync_core::sync_role;
use text::quote;

use crate::{
    exit::UsageError,
    output::{Output, print},
};

/// Print the etcdctl commands that create least-privilege etcd roles for nodes, operators, readers or meshd-sync
///
/// This command changes nothing: pipe its output into a shell (sh -e), once per role. A node's role reads everything
/// below the prefix and writes that node's own records. With --subnet it may write only that key below subnets/.
///
/// Example: meshctl etcd-roles --operator | sh -e
#[derive(Args)]
pub(crate) struct EtcdRoles {
    /// Node ids, one role each: the content of /var/lib/meshd/node-id, and ID in the key nodes/ID
    #[arg(value_name = "NODE-ID")]
    nodes: Vec<String>,
    /// Print the role meshd-operator: reads and writes everything below the prefix
    #[arg(long)]
    operator: bool,
    /// Print the role meshd-reader: reads everything below the prefix, including pre-shared keys of external peers
    #[arg(long)]
    reader: bool,
    /// Print the role meshd-sync-CLUSTER: writes the copy of this Kubernetes cluster and, with --network, its share of
    /// subnets/; reads config, subnets/ and the nodes' records
    #[arg(long, value_name = "CLUSTER")]
    sync: Option<String>,
    /// Networks of the cluster of --sync, as config has them: meshd-sync reserves and frees subnets there. Without it,
    /// meshd-sync only copies
    #[arg(long, value_name = "CIDR", requires = "sync", value_delimiter = ',')]
    network: Vec<IpNet>,
    /// Prefix of all keys of this mesh
    #[arg(long, env = "MESHD_ETCD_PREFIX", default_value = "/meshd", value_name = "PREFIX")]
    etcd_prefix: String,
    /// Limit the node to this key below subnets/, such as 10.244.3.0-24; it must contain the node's reservation before
    /// the node starts. For one node only
    #[arg(long, value_name = "SUBNET-KEY")]
    subnet: Option<String>,
}

impl EtcdRoles {
    pub(crate) fn run(&self, output: Output) -> anyhow::Result<u8> {
        let prefix = check_prefix(&self.etcd_prefix).map_err(|error| UsageError(error.to_string()))?;
        let mut nodes = Vec::new();
        for node in &self.nodes {
            let id: NodeId = node.parse().map_err(|error| UsageError(format!("{node}: {error}")))?;
            nodes.push(id);
        }
        let subnet = match &self.subnet {
            None => None,
            Some(_) if nodes.len() != 1 => {
                return Err(UsageError("--subnet needs exactly one NODE-ID".to_owned()).into());
            }
            Some(text) => {
                let key: etcd_schema::SubnetKey = text
                    .trim_start_matches("subnets/")
                    .parse()
                    .map_err(|error| UsageError(format!("{text}: {error}")))?;
                Some(key.to_string())
            }
        };
        let cluster = match &self.sync {
            None => None,
            Some(name) => {
                let cluster: Cluster = name.parse().map_err(|error| UsageError(format!("--sync {name}: {error}")))?;
                if cluster.is_flat() {
                    return Err(UsageError("--sync needs the name of a cluster".to_owned()).into());
                }
                Some(cluster)
            }
        };
        let roles = self.roles(&prefix, &nodes, subnet.as_deref(), cluster.as_ref());
        if roles.is_empty() {
            let choice = "give one or more NODE-IDs, --operator, --reader or --sync";
            return Err(UsageError(format!("no role selected: {choice}")).into());
        }
        print(output, &roles, |roles| commands(roles))?;
        Ok(0)
    }

    fn roles(&self, prefix: &str, nodes: &[NodeId], subnet: Option<&str>, cluster: Option<&Cluster>) -> Vec<Role> {
        let operator = self.operator.then(|| roles::operator(prefix));
        let reader = self.reader.then(|| roles::reader(prefix));
        let sync = cluster.map(|cluster| sync_role(prefix, cluster, &self.network));
        let nodes = nodes.iter().map(|id| roles::node(prefix, id, subnet));
        operator.into_iter().chain(reader).chain(sync).chain(nodes).collect()
    }
}

fn commands(roles: &[Role]) -> String {
    let mut text = String::new();
    for role in roles {
        text += &format!("# {}\netcdctl role add {}\n", role.purpose, role.name);
        for Grant { permission, key, prefix } in &role.grants {
            let prefix = if *prefix { "--prefix=true " } else { "" };
            text += &format!(
                "etcdctl role grant-permission {prefix}{} {} {}\n",
                role.name,
                permission.as_str(),
                quote(key)
            );
        }
    }
    text += "# then create a user for each role; NAME is the CN of its certificate: etcdctl user add NAME \
             --no-password (omit the flag to log in with a password); etcdctl user grant-role NAME ROLE\n";
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(nodes: &[&str], operator: bool, reader: bool, subnet: Option<&str>) -> String {
        let ids: Vec<NodeId> = nodes.iter().map(|id| id.parse().unwrap()).collect();
        commands(&asked(operator, reader, &[]).roles("/meshd", &ids, subnet, None))
    }

    fn asked(operator: bool, reader: bool, network: &[&str]) -> EtcdRoles {
        EtcdRoles {
            nodes: Vec::new(),
            operator,
            reader,
            sync: None,
            network: network.iter().map(|net| net.parse().unwrap()).collect(),
            etcd_prefix: String::new(),
            subnet: None,
        }
    }

    #[test]
    fn a_node_may_write_its_own_records_and_subnets() {
        let text = printed(&["n0011223344556677"], false, false, None);
        assert!(text.contains("meshd-node-n0011223344556677 readwrite /meshd/nodes/n0011223344556677\n"), "{text}");
        assert!(text.contains("--prefix=true meshd-node-n0011223344556677 readwrite /meshd/subnets/\n"), "{text}");
        let closed = printed(&["n0011223344556677"], false, false, Some("10.244.3.0-24"));
        assert!(closed.contains(" readwrite /meshd/subnets/10.244.3.0-24\n"), "{closed}");
        assert!(!closed.contains("readwrite /meshd/subnets/\n"), "{closed}");
    }

    #[test]
    fn only_what_is_asked_for_is_printed() {
        let added = |text: &str| text.matches("etcdctl role add ").count();
        let node = printed(&["a", "b"], false, false, None);
        assert!(added(&node) == 2 && !node.contains("meshd-operator") && !node.contains("meshd-reader"), "{node}");
        assert_eq!(added(&printed(&[], true, false, None)), 1);
        assert_eq!(added(&printed(&["a"], true, true, None)), 3);
    }

    #[test]
    fn the_copy_of_a_cluster_and_its_share_of_subnets_are_written_and_nothing_else() {
        for (network, shares) in [
            (&[][..], &[][..]),
            (&["10.42.0.0/16", "fd42:42::/48"], &["/meshd/subnets/10.42.", "/meshd/subnets/fd42:42:"]),
        ] {
            let text =
                commands(&asked(false, false, network).roles("/meshd", &[], None, Some(&"east".parse().unwrap())));
            let of = |permission: &str| -> Vec<String> {
                let grants = text.lines().filter_map(|line| line.split_once(&format!("meshd-sync-east {permission} ")));
                grants.map(|(_, key)| key.to_owned()).collect()
            };
            assert_eq!(of("readwrite"), [&["/meshd/k8s/east/"], shares].concat(), "{text}");
            let read = ["nodes/", "alive/", "removed/", "config", "subnets/"].map(|key| format!("/meshd/{key}"));
            assert_eq!(of("read"), read, "{text}");
            assert_eq!(text.matches("grant-permission").count(), 6 + shares.len(), "{text}");
        }
    }
}
