//! `meshctl node`: changes the set of nodes, directly in etcd.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use control::{
    etcd_options::EtcdOptionsError,
    node_removal::{self, Live, Removal, RemovalError},
    session::Dialer,
};
use control_core::types::{CallError, FailureKind};
use meshd::settings::load_etcd;
use program::etcd_flags::EtcdFlags;
use serde::{Deserialize, Serialize};

use crate::{
    exit::{Mistakes, NotFound, Remedied},
    output::{Output, print},
};

#[derive(Subcommand)]
pub(crate) enum NodeCommand {
    /// Remove a node from the mesh for good, even if it is offline or stolen
    ///
    /// Every node refuses its keys from then on, and its subnets are free. Delete removed/ID in etcd to let it back in.
    /// The command is idempotent. It connects to etcd by the settings file of meshd; flags override it. The user or
    /// certificate needs the rights of `meshctl etcd-roles --operator`.
    ///
    /// Example: meshctl node remove west-1 --etcd-certfile operator.pem --etcd-keyfile operator.key
    Remove(Remove),
}

#[derive(Args)]
pub(crate) struct Remove {
    /// Name of the node (if several have the name: the oldest), or its id
    name: String,
    /// Remove the node even if it is online with pods attached: they lose the mesh at once
    #[arg(long)]
    force: bool,
    /// Settings file of meshd, for the connection to etcd [default: /etc/meshd/meshd.toml, if present]
    #[arg(long, env = "MESHD_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    etcd: EtcdFlags,
}

pub(crate) fn run(output: Output, NodeCommand::Remove(remove): &NodeCommand) -> anyhow::Result<u8> {
    let removed = RemovalOutput::from(remove_node(remove)?);
    print(output, &removed, RemovalOutput::text)?;
    Ok(0)
}

fn remove_node(remove: &Remove) -> anyhow::Result<Removal> {
    let etcd = load_etcd(remove.etcd.clone(), remove.config.clone());
    let etcd = etcd.map_err(|mistakes| Mistakes(mistakes.into_lines()))?;
    let live = if remove.force { Live::Removed } else { Live::Refused };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context(
        "cannot start the async \
         runtime",
    )?;
    let time = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    let removed = runtime.block_on(async {
        let said = |errors: Vec<EtcdOptionsError>| errors.iter().map(ToString::to_string).collect();
        let dialer = Dialer::new(&etcd).map_err(|errors| Mistakes(said(errors)))?;
        let session = dialer
            .open_any()
            .await
            .map_err(|error| Remedied { cause: error.to_string(), remedy: error.remedy().to_owned() })?;
        node_removal::remove_node(&session, &remove.name, live, &time).await.map_err(anyhow::Error::from)
    });
    let not_removed = |error: anyhow::Error| error.context(format!("node {} was not removed", remove.name));
    removed.map_err(|error| match error.downcast::<RemovalError>() {
        Ok(RemovalError::NotFound(name)) => NotFound(RemovalError::NotFound(name).to_string()).into(),
        Ok(error @ RemovalError::Live { .. }) => {
            let remedy = "drain it and stop meshd there first, or remove it with --force".to_owned();
            not_removed(Remedied { cause: error.to_string(), remedy }.into())
        }
        Ok(RemovalError::Call(CallError::Refused(reason))) => {
            let remedy = if reason.kind == FailureKind::Rights {
                "use an operator's credentials (--etcd-username, --etcd-certfile), with the role printed by meshctl \
                 etcd-roles --operator"
            } else {
                "etcdctl alarm list; etcdctl endpoint health --cluster"
            };
            not_removed(Remedied { cause: format!("etcd refused: {reason}"), remedy: remedy.to_owned() }.into())
        }
        Ok(error) => not_removed(error.into()),
        Err(error) if error.is::<Mistakes>() => error,
        Err(error) => not_removed(error),
    })
}

/// The output of `node remove`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RemovalOutput {
    id: String,
    /// The name, if its record is readable.
    name: Option<String>,
    /// Free again.
    subnets: Vec<String>,
    /// Refused by every node from now on.
    public_keys: Vec<String>,
    /// The node had been removed before.
    repeated: bool,
    /// The pods attached there, by their records in etcd.
    #[serde(default)]
    pods: Vec<String>,
}

impl From<Removal> for RemovalOutput {
    fn from(removal: Removal) -> Self {
        Self {
            id: removal.id.to_string(),
            name: removal.name.map(|name| name.to_string()),
            subnets: removal.subnets.iter().map(ToString::to_string).collect(),
            public_keys: removal.public_keys.iter().map(ToString::to_string).collect(),
            repeated: removal.repeated,
            pods: removal.pods,
        }
    }
}

impl RemovalOutput {
    fn text(&self) -> String {
        let name = self.name.as_deref().unwrap_or("without a readable name");
        let mut text = format!("node {} ({name}) removed; every node refuses its keys\n", self.id);
        for subnet in &self.subnets {
            text.push_str(&format!("subnet {subnet} is free\n"));
        }
        if !self.pods.is_empty() {
            text.push_str(&format!("pods cut off: {}\n", self.pods.join(", ")));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::lines;

    #[test]
    fn an_etcd_that_is_away_is_named_once_with_what_to_do() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|bound| bound.local_addr()).unwrap();
        let endpoint = format!("http://{free}");
        let etcd = EtcdFlags { endpoints: Some(vec![endpoint.clone()]), ..Default::default() };
        let error = remove_node(&Remove { name: "west-1".to_owned(), force: false, config: None, etcd }).unwrap_err();
        let [told, remedy] = lines(&error).try_into().unwrap();
        assert!(told.starts_with(&format!("node west-1 was not removed: {endpoint}: etcd did not answer: ")), "{told}");
        assert_eq!(told.matches("did not answer").count(), 1, "{told}");
        assert!(remedy.starts_with("  remedy  systemctl start etcd # on"), "{remedy}");
    }

    #[test]
    fn a_removal_is_told_as_text_and_as_json() {
        let removed = RemovalOutput::from(Removal {
            id: "n0011223344556677".parse().unwrap(),
            name: Some("a".parse().unwrap()),
            subnets: vec!["10.244.1.0-24".parse().unwrap()],
            public_keys: vec![etcd_schema::PublicKey::from_bytes([9; 32])],
            repeated: false,
            pods: Vec::new(),
        });
        let json = serde_json::to_value(&removed).unwrap();
        assert_eq!((&json["id"], &json["name"]), (&"n0011223344556677".into(), &"a".into()));
        assert_eq!((&json["subnets"][0], &json["repeated"]), (&"10.244.1.0-24".into(), &false.into()));
        assert_eq!(json["publicKeys"].as_array().map(Vec::len), Some(1));
        assert_eq!(
            removed.text(),
            "node n0011223344556677 (a) removed; every node refuses its keys\nsubnet 10.244.1.0-24 is free\n"
        );
    }
}
