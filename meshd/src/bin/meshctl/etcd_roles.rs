//! `meshctl etcd-roles`.

use clap::Args;
use etcd_schema::NodeId;
use meshd::control::etcd_options::check_prefix;
use serde::Serialize;

use crate::{
    exit::Usage,
    output::{Output, print},
};

/// Prints the etcdctl commands for the least roles that nodes, operators and readers need. Nothing is changed.
#[derive(Args)]
pub(crate) struct EtcdRoles {
    /// The ids of the nodes, one role each: meshctl status of a node says its own, STATE/node-id has it
    #[arg(value_name = "NODE-ID")]
    nodes: Vec<String>,
    /// Prefix of all keys
    #[arg(long, env = "MESHD_ETCD_PREFIX", default_value = "/meshd")]
    etcd_prefix: String,
    /// Gives each node no more of subnets/ than this key, which must hold its reservation; for one node
    #[arg(long, value_name = "SUBNET-KEY")]
    subnet: Option<String>,
}

/// A role and what it may do.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Role {
    name: String,
    /// What it is for.
    purpose: String,
    grants: Vec<Grant>,
}

#[derive(Serialize)]
struct Grant {
    /// read, write or readwrite, as etcdctl has it.
    permission: &'static str,
    key: String,
    /// All keys that begin so, and not the one alone.
    prefix: bool,
}

impl EtcdRoles {
    pub(crate) fn run(&self, output: Output) -> anyhow::Result<u8> {
        let prefix = check_prefix(&self.etcd_prefix).map_err(|error| Usage(error.to_string()))?;
        let mut nodes = Vec::new();
        for node in &self.nodes {
            let id: NodeId = node.parse().map_err(|error| Usage(format!("{node}: {error}")))?;
            nodes.push(id);
        }
        let subnet = match &self.subnet {
            None => None,
            Some(_) if nodes.len() != 1 => {
                return Err(Usage("--subnet speaks of one node: give one NODE-ID".to_owned()).into());
            }
            Some(text) => {
                let key: etcd_schema::SubnetKey =
                    text.trim_start_matches("subnets/").parse().map_err(|error| Usage(format!("{text}: {error}")))?;
                Some(key.to_string())
            }
        };
        print(output, &roles(&prefix, &nodes, subnet.as_deref()), |roles| commands(roles))?;
        Ok(0)
    }
}

fn roles(prefix: &str, nodes: &[NodeId], subnet: Option<&str>) -> Vec<Role> {
    let grant =
        |permission, key: &str, whole: bool| Grant { permission, key: format!("{prefix}/{key}"), prefix: whole };
    let mut roles = vec![
        Role {
            name: "meshd-operator".to_owned(),
            purpose: "writes config, peers, policies and pods; removes nodes".to_owned(),
            grants: vec![grant("readwrite", "", true)],
        },
        Role {
            name: "meshd-reader".to_owned(),
            purpose: "looks at everything, pre-shared keys of outside peers too".to_owned(),
            grants: vec![grant("read", "", true)],
        },
    ];
    roles.extend(nodes.iter().map(|id| {
        let subnets = match subnet {
            Some(subnet) => grant("readwrite", &format!("subnets/{subnet}"), false),
            // A node does not know beforehand which one it will draw.
            None => grant("readwrite", "subnets/", true),
        };
        Role {
            name: format!("meshd-node-{id}"),
            purpose: format!("node {id}: reads the mesh, writes its own records"),
            grants: vec![
                grant("read", "", true),
                subnets,
                grant("readwrite", &format!("nodes/{id}"), false),
                grant("readwrite", &format!("alive/{id}"), false),
                grant("readwrite", &format!("endpoints/{id}/"), true),
            ],
        }
    }));
    roles
}

fn commands(roles: &[Role]) -> String {
    // A quote in a prefix ends the word it stands in, is said by itself, and begins the next.
    let quoted = |key: &str| key.replace('\'', r"'\''");
    let mut text = String::new();
    for role in roles {
        text += &format!("# {}\netcdctl role add {}\n", role.purpose, role.name);
        for Grant { permission, key, prefix } in &role.grants {
            let prefix = if *prefix { "--prefix=true " } else { "" };
            text += &format!("etcdctl role grant-permission {prefix}{} {permission} '{}'\n", role.name, quoted(key));
        }
    }
    text += "# a user for each, such as: etcdctl user add NAME; etcdctl user grant-role NAME ROLE\n";
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_may_write_its_own_records_and_subnets() {
        let id: NodeId = "n0011223344556677".parse().unwrap();
        let text = commands(&roles("/meshd", std::slice::from_ref(&id), None));
        assert!(text.contains("meshd-node-n0011223344556677 readwrite '/meshd/nodes/n0011223344556677'\n"), "{text}");
        assert!(text.contains("--prefix=true meshd-node-n0011223344556677 readwrite '/meshd/subnets/'\n"), "{text}");
        let closed = commands(&roles("/meshd", &[id], Some("10.244.3.0-24")));
        assert!(closed.contains(" readwrite '/meshd/subnets/10.244.3.0-24'\n"), "{closed}");
        assert!(!closed.contains("readwrite '/meshd/subnets/'"), "{closed}");
    }
}
