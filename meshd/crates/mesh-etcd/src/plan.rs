//! What to do next, so that the members are those that are wanted. Pure: it is asked again after each step, and a run that
//! was cut off is continued by the next one.

use std::net::IpAddr;

use crate::record::{MEMBER_LABEL, Member, MembersRecord, Ports, SnapshotName, urls};

/// What is wanted.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) members: usize,
    pub(crate) ports: Ports,
    /// All members begin again with this snapshot, unless they have.
    pub(crate) restore: Option<SnapshotName>,
}

/// What is there.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    pub(crate) nodes: Vec<SeenNode>,
    pub(crate) record: Option<MembersRecord>,
    /// The members as etcd lists them; `None`: it does not answer.
    pub(crate) etcd: Option<Vec<SeenMember>>,
}

/// A Node of the cluster.
#[derive(Debug, Clone)]
pub(crate) struct SeenNode {
    pub(crate) name: String,
    pub(crate) addresses: Vec<IpAddr>,
    /// A member may run here.
    pub(crate) is_candidate: bool,
    /// Bears the label that makes a member's pod run here.
    pub(crate) is_labelled: bool,
    pub(crate) is_ready: bool,
}

/// A member as etcd knows it.
#[derive(Debug, Clone)]
pub(crate) struct SeenMember {
    pub(crate) id: u64,
    /// Empty until it has started.
    pub(crate) name: String,
    pub(crate) peer_urls: Vec<String>,
    pub(crate) is_learner: bool,
    pub(crate) is_healthy: bool,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Write this record.
    Record(MembersRecord),
    /// Have a member's pod run on this node.
    Label(String),
    /// Have none run there.
    Unlabel(String),
    /// Have the pod on this node start again: it runs what the record no longer says.
    Restart(String),
    /// Add a learner to etcd.
    Add { peer_urls: Vec<String> },
    /// Make a learner a voting member.
    Promote { id: u64 },
    /// Remove a member from etcd.
    Remove { id: u64 },
    /// Tell etcd a member's new URLs.
    Update { id: u64, peer_urls: Vec<String> },
    /// Ask again later: why.
    Await(String),
    /// Nothing is left to do, but for this.
    Done(Option<String>),
}

/// The next step. A member that is new gets this `suffix` to its node's name.
pub(crate) fn next_step(wanted: &Wanted, seen: &Seen, suffix: &str) -> Step {
    let empty = MembersRecord::default();
    let record = match &seen.record {
        Some(record) => record,
        None => {
            // Members run whose record was lost: another cluster in their place would be empty.
            if let Some(node) = seen.nodes.iter().find(|node| node.is_labelled) {
                return Step::Await(format!(
                    "the record of the members is gone, but node {} has the label {MEMBER_LABEL}: put the ConfigMap back \
                     from a backup; to begin with an empty etcd or a snapshot, take the label off all nodes",
                    node.name
                ));
            }
            &empty
        }
    };
    if let Some(snapshot) = wanted.restore.as_ref().filter(|it| !record.restored.contains(&it.to_string())) {
        return restore(wanted, seen, record, snapshot, suffix);
    }
    if record.members.is_empty() {
        return begin(wanted, seen, record, suffix);
    }
    let stray = seen.nodes.iter().find(|node| node.is_labelled && record.on_node(&node.name).is_none());
    if let Some(node) = stray {
        return Step::Unlabel(node.name.clone());
    }
    if let Some(joining) = record.members.iter().find(|member| !member.joined) {
        let is_wanted = record.members.len() <= wanted.members;
        return if is_wanted { join(seen, record, joining) } else { abandon(seen, record, joining) };
    }
    if let Some((leaving, why)) = leaving(wanted, seen, record) {
        return leave(seen, record, leaving, why);
    }
    if let Some(step) = readdress(wanted, seen, record) {
        return step;
    }
    let Some(etcd) = &seen.etcd else { return Step::Await("etcd does not answer".to_owned()) };
    let ailing = record.members.iter().find(|member| !etcd.iter().any(|it| it.name == member.name && it.is_healthy));
    let grows = record.members.len() < wanted.members;
    match (ailing, grows) {
        (Some(member), false) => Step::Done(Some(format!(
            "member {} on {} does not answer; if its data is lost, take the label {} off the node",
            member.name, member.node, MEMBER_LABEL
        ))),
        (Some(member), true) => Step::Await(format!("member {} does not answer", member.name)),
        (None, false) => Step::Done(None),
        (None, true) => grow(wanted, seen, record, suffix),
    }
}

fn begin(wanted: &Wanted, seen: &Seen, record: &MembersRecord, suffix: &str) -> Step {
    let may = |node: &&SeenNode| node.is_candidate && !node.addresses.is_empty();
    // No node of a new cluster is Ready before it has a network.
    let Some(node) = seen.nodes.iter().filter(may).min_by_key(|node| !node.is_ready) else {
        return Step::Await(
            "no node may run a member: none has the label of control planes, and an InternalIP".to_owned(),
        );
    };
    let member = new_member(wanted, node, suffix, &[]);
    Step::Record(MembersRecord { members: vec![member], restored: record.restored.clone() })
}

fn restore(wanted: &Wanted, seen: &Seen, record: &MembersRecord, snapshot: &SnapshotName, suffix: &str) -> Step {
    let may = |node: &&SeenNode| node.name == snapshot.node && node.is_candidate && !node.addresses.is_empty();
    let Some(node) = seen.nodes.iter().find(may) else {
        return Step::Await(format!("snapshot {snapshot}: there is no node {} that may run a member", snapshot.node));
    };
    let mut member = new_member(wanted, node, suffix, &[]);
    member.snapshot = Some(snapshot.file.clone());
    let restored = record.restored.iter().cloned().chain([snapshot.to_string()]).collect();
    Step::Record(MembersRecord { members: vec![member], restored })
}

fn new_member(wanted: &Wanted, node: &SeenNode, suffix: &str, others: &[Member]) -> Member {
    Member::new(&node.name, suffix, &node.addresses, wanted.ports, others)
}

fn join(seen: &Seen, record: &MembersRecord, joining: &Member) -> Step {
    let Some(node) = seen.nodes.iter().find(|node| node.name == joining.node) else {
        return abandon(seen, record, joining);
    };
    if joining.begins_alone() {
        return match &seen.etcd {
            _ if !node.is_labelled => Step::Label(node.name.clone()),
            None => Step::Await(format!("member {} to start", joining.name)),
            Some(etcd) => match etcd.iter().find(|it| it.name == joining.name) {
                Some(member) if member.is_healthy => joined(record, joining),
                Some(_) => Step::Await(format!("member {} to be healthy", joining.name)),
                // The members from before a restore.
                None => Step::Restart(node.name.clone()),
            },
        };
    }
    let Some(etcd) = &seen.etcd else { return Step::Await("etcd does not answer".to_owned()) };
    match known(etcd, joining) {
        None => Step::Add { peer_urls: joining.peer_urls.clone() },
        Some(_) if !node.is_labelled => Step::Label(node.name.clone()),
        Some(member) if member.name.is_empty() => Step::Await(format!("member {} to start", joining.name)),
        Some(member) if !member.is_healthy => Step::Await(format!("member {} to be healthy", joining.name)),
        Some(member) if member.is_learner => Step::Promote { id: member.id },
        Some(_) => joined(record, joining),
    }
}

/// The member as etcd has it; until it has started, without a name.
fn known<'e>(etcd: &'e [SeenMember], member: &Member) -> Option<&'e SeenMember> {
    etcd.iter().find(|it| it.name == member.name || it.peer_urls == member.peer_urls)
}

/// A member that has not joined is not to: its node is gone, or fewer are wanted.
fn abandon(seen: &Seen, record: &MembersRecord, joining: &Member) -> Step {
    if joining.begins_alone() {
        return match joining.snapshot {
            // It held nothing yet.
            None => Step::Record(without(record, joining)),
            Some(_) => {
                Step::Await(format!("node {}, which has the snapshot, is gone: restore on another", joining.node))
            }
        };
    }
    match seen.etcd.as_deref().map(|etcd| known(etcd, joining)) {
        None => Step::Await("etcd does not answer".to_owned()),
        Some(Some(member)) => Step::Remove { id: member.id },
        Some(None) => Step::Record(without(record, joining)),
    }
}

fn joined(record: &MembersRecord, joining: &Member) -> Step {
    let mut record = record.clone();
    if let Some(member) = record.named_mut(&joining.name) {
        member.joined = true;
    }
    Step::Record(record)
}

/// A member that is to go, and why.
fn leaving<'r>(wanted: &Wanted, seen: &Seen, record: &'r MembersRecord) -> Option<(&'r Member, &'static str)> {
    let node_of = |member: &Member| seen.nodes.iter().find(|node| node.name == member.node);
    let unwanted = record.members.iter().find_map(|member| match node_of(member) {
        None => Some((member, "its node is gone")),
        Some(node) if !node.is_labelled => Some((member, "its node has lost the label")),
        Some(_) => None,
    });
    let excess = || record.members.get(wanted.members..)?.last().map(|member| (member, "it is one too many"));
    unwanted.or_else(excess)
}

fn leave(seen: &Seen, record: &MembersRecord, member: &Member, why: &str) -> Step {
    if record.members.len() == 1 {
        let node = &member.node;
        return Step::Await(format!(
            "member {} on {node} is the only one, but {why}: put the node or its label back, or restore a snapshot on \
             another node",
            member.name
        ));
    }
    let Some(etcd) = &seen.etcd else {
        return Step::Await(format!(
            "member {} is to be removed ({why}), but etcd does not answer; if most members are lost, restore a snapshot",
            member.name
        ));
    };
    let labelled = seen.nodes.iter().any(|node| node.name == member.node && node.is_labelled);
    match etcd.iter().find(|it| it.name == member.name) {
        Some(it) => Step::Remove { id: it.id },
        None if labelled => Step::Unlabel(member.node.clone()),
        None => Step::Record(without(record, member)),
    }
}

/// Follows a node that has other addresses.
fn readdress(wanted: &Wanted, seen: &Seen, record: &MembersRecord) -> Option<Step> {
    record.members.iter().find_map(|member| {
        let node = seen.nodes.iter().find(|node| node.name == member.node && !node.addresses.is_empty())?;
        let peer_urls = urls(&node.addresses, wanted.ports.peer);
        if peer_urls == member.peer_urls {
            return None;
        }
        let Some(etcd) = &seen.etcd else {
            return Some(Step::Await(format!("etcd does not answer; node {} has other addresses", node.name)));
        };
        let known = etcd.iter().find(|it| it.name == member.name)?;
        if known.peer_urls != peer_urls {
            return Some(Step::Update { id: known.id, peer_urls });
        }
        let mut record = record.clone();
        if let Some(member) = record.named_mut(&member.name) {
            member.client_urls = urls(&node.addresses, wanted.ports.client);
            member.peer_urls = peer_urls;
        }
        Some(Step::Record(record))
    })
}

fn grow(wanted: &Wanted, seen: &Seen, record: &MembersRecord, suffix: &str) -> Step {
    let free = |node: &&SeenNode| {
        node.is_candidate && node.is_ready && !node.addresses.is_empty() && record.on_node(&node.name).is_none()
    };
    let free: Vec<&SeenNode> = seen.nodes.iter().filter(free).collect();
    // An even number bears no more losses than the odd one below it, and one more machine that can fail.
    let missing = if record.members.len().is_multiple_of(2) { 1 } else { 2 };
    if free.len() < missing {
        let (have, wanted) = (record.members.len(), wanted.members);
        return Step::Done(Some(format!(
            "{have} of {wanted} members: {missing} more nodes that may run one must be Ready"
        )));
    }
    let mut record = record.clone();
    record.members.push(new_member(wanted, free[0], suffix, &record.members));
    Step::Record(record)
}

fn without(record: &MembersRecord, member: &Member) -> MembersRecord {
    let members = record.members.iter().filter(|it| it.name != member.name).cloned().collect();
    MembersRecord { members, restored: record.restored.clone() }
}

#[cfg(test)]
mod tests;
