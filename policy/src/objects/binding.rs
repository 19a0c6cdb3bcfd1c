//! Which node of the mesh is which Node of Kubernetes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

/// Pairs of mesh nodes and Node objects, and ambiguous ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding<N, O> {
    /// Nodes of the mesh, each with its only Node object, which has no other node.
    pub bound: BTreeMap<N, O>,
    /// Nodes of the mesh that several Node objects match, with these.
    pub nodes: BTreeMap<N, BTreeSet<O>>,
    /// Node objects that several nodes of the mesh match, with these.
    pub objects: BTreeMap<O, BTreeSet<N>>,
}

/// Binds `objects` to `nodes`: a Node object is the node whose record has its name and one of its InternalIPs.
///
/// Any node can write both into its record, so several that match one object, or several objects that match one node,
/// are left unbound: the age of a record does not tell which of them is right.
pub fn bind<'a, N: Ord + Clone, O: Ord + Clone>(
    nodes: impl IntoIterator<Item = (N, &'a str, &'a [IpAddr])>,
    objects: impl IntoIterator<Item = (O, &'a str, &'a [IpAddr])>,
) -> Binding<N, O> {
    let mut by_name: HashMap<&str, Vec<(N, &[IpAddr])>> = HashMap::new();
    for (node, name, addresses) in nodes {
        by_name.entry(name).or_default().push((node, addresses));
    }
    let mut matches: BTreeMap<N, BTreeSet<O>> = BTreeMap::new();
    let mut shared: BTreeMap<O, BTreeSet<N>> = BTreeMap::new();
    for (object, name, internal_ips) in objects {
        let named = by_name.get(name).into_iter().flatten();
        let at = named.filter(|(_, addresses)| addresses.iter().any(|ip| internal_ips.contains(ip)));
        let matching: BTreeSet<N> = at.map(|(node, _)| node.clone()).collect();
        for node in &matching {
            matches.entry(node.clone()).or_default().insert(object.clone());
        }
        if matching.len() > 1 {
            shared.insert(object, matching);
        }
    }
    let mut binding = Binding { bound: BTreeMap::new(), nodes: BTreeMap::new(), objects: shared };
    for (node, objects) in matches {
        let mut of_node = objects.iter();
        match (of_node.next(), of_node.next()) {
            (Some(only), None) if !binding.objects.contains_key(only) => {
                binding.bound.insert(node, only.clone());
            }
            (Some(_), None) | (None, _) => {}
            (Some(_), Some(_)) => {
                binding.nodes.insert(node, objects);
            }
        }
    }
    binding
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|ip| ip.parse().unwrap()).collect()
    }

    #[test]
    fn a_node_is_bound_by_name_and_address_and_only_if_nothing_else_matches() {
        let (a, b, c) = (ips(&["192.0.2.1", "2001:db8::1"]), ips(&["192.0.2.2"]), ips(&["192.0.2.3"]));
        let object = |name, at| (name, "worker", at);
        // Names and addresses that do not belong together bind nothing.
        let binding = bind([(1, "worker", &a[..]), (2, "other", &b), (3, "worker", &c)], [object("w", &b[..])]);
        assert_eq!(binding, Binding { bound: [].into(), nodes: [].into(), objects: [].into() });
        let binding = bind([(1, "worker", &a[..]), (3, "worker", &c)], [object("w", &a[1..])]);
        assert_eq!(binding.bound, [(1, "w")].into());
        // A second node that claims the name and an address takes nothing, and nor does the first one keep it.
        let both = ips(&["192.0.2.1", "192.0.2.3"]);
        let binding = bind([(1, "worker", &a[..]), (3, "worker", &c)], [object("w", &both[..])]);
        assert_eq!((binding.bound, binding.objects), ([].into(), [("w", [1, 3].into())].into()));
        let binding = bind([(1, "worker", &a[..])], [object("v", &a[..1]), object("w", &a[1..])]);
        assert_eq!((binding.bound, binding.nodes), ([].into(), [(1, ["v", "w"].into())].into()));
    }
}
