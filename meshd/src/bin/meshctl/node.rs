//! `meshctl node`: changes the set of nodes, in etcd itself.

use anyhow::Context as _;
use clap::{Args, Subcommand};
use meshd::{
    control::{
        node_removal::{self, Removal, RemovalError},
        session::Dialer,
    },
    settings,
};
use serde::Serialize;

use crate::{
    exit::{NotFound, Usage},
    output::{Output, print},
};

#[derive(Subcommand)]
pub(crate) enum NodeCommand {
    /// Takes a node out of the mesh for good, also one that is away or stolen
    Remove(Remove),
}

#[derive(Args)]
pub(crate) struct Remove {
    /// The node's name or id
    name: String,
    #[command(flatten)]
    etcd: settings::EtcdFlags,
}

pub(crate) fn run(output: Output, NodeCommand::Remove(remove): &NodeCommand) -> anyhow::Result<u8> {
    let removed = Removed::from(remove_node(remove)?);
    print(output, &removed, Removed::text)?;
    Ok(0)
}

fn remove_node(remove: &Remove) -> anyhow::Result<Removal> {
    let mut mistakes = Vec::new();
    let etcd = remove.etcd.clone().check(&mut mistakes);
    if !mistakes.is_empty() {
        return Err(Usage(mistakes.join("\n")).into());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
    let time = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    let removed = runtime.block_on(async {
        let dialer = Dialer::new(&etcd).map_err(|errors| Usage(said(&errors)))?;
        let session = dialer.open_any().await.context("etcd does not answer")?;
        node_removal::remove_node(&session, &remove.name, &time).await.map_err(anyhow::Error::from)
    });
    removed.map_err(|error| match error.downcast::<RemovalError>() {
        Ok(RemovalError::NotFound(name)) => NotFound(RemovalError::NotFound(name).to_string()).into(),
        Ok(error) => anyhow::Error::from(error).context(format!("node {} was not removed", remove.name)),
        Err(error) => error,
    })
}

/// What `node remove` prints.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Removed {
    id: String,
    /// Where a record told it.
    name: Option<String>,
    /// Free again.
    subnets: Vec<String>,
    /// Refused by every node from now on.
    public_keys: Vec<String>,
    /// It had been removed before.
    repeated: bool,
}

impl From<Removal> for Removed {
    fn from(removal: Removal) -> Self {
        Self {
            id: removal.id.to_string(),
            name: removal.name.map(|name| name.to_string()),
            subnets: removal.subnets.iter().map(ToString::to_string).collect(),
            public_keys: removal.public_keys.iter().map(ToString::to_string).collect(),
            repeated: removal.repeated,
        }
    }
}

impl Removed {
    fn text(&self) -> String {
        let name = self.name.as_deref().unwrap_or("without a readable name");
        let mut text = format!("node {} ({name}) is removed; its keys are refused by every node\n", self.id);
        for subnet in &self.subnets {
            text.push_str(&format!("subnet {subnet} is free\n"));
        }
        text
    }
}

fn said(errors: &[impl ToString]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_is_told_as_text_and_as_json() {
        let removed = Removed::from(Removal {
            id: "n0011223344556677".parse().unwrap(),
            name: Some("a".parse().unwrap()),
            subnets: vec!["10.244.1.0-24".parse().unwrap()],
            public_keys: vec![etcd_schema::PublicKey::from_bytes([9; 32])],
            repeated: false,
        });
        let json = serde_json::to_value(&removed).unwrap();
        assert_eq!((&json["id"], &json["name"]), (&"n0011223344556677".into(), &"a".into()));
        assert_eq!((&json["subnets"][0], &json["repeated"]), (&"10.244.1.0-24".into(), &false.into()));
        assert_eq!(json["publicKeys"].as_array().map(Vec::len), Some(1));
        assert_eq!(
            removed.text(),
            "node n0011223344556677 (a) is removed; its keys are refused by every node\nsubnet 10.244.1.0-24 is free\n"
        );
    }
}
