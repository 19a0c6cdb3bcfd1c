//! `meshctl etcd`.

use api::Client;
use api_types::EtcdAccepted;
use clap::Subcommand;

use crate::output::{Output, print};

#[derive(Subcommand)]
pub(crate) enum EtcdCommand {
    /// Accept the current content of etcd on this node: drop policies and other records that etcd no longer has (root
    /// only)
    ///
    /// If etcd was replaced, restored from an older backup or lost many policies at once, a node keeps the missing
    /// records in force; `meshctl status` shows this. After this command only the records in etcd are in force. Run it
    /// on each node, once the keys in etcd are correct.
    ///
    /// Example: sudo meshctl etcd accept
    Accept,
}

pub(crate) fn run(output: Output, client: &Client, command: &EtcdCommand) -> anyhow::Result<u8> {
    match command {
        EtcdCommand::Accept => {
            let accepted: EtcdAccepted = client.post("/v1/etcd/accept")?;
            print(output, &accepted, accepted_text)?;
            Ok(0)
        }
    }
}

fn accepted_text(accepted: &EtcdAccepted) -> String {
    let keys = |count: usize| format!("{count} {}", if count == 1 { "key" } else { "keys" });
    match accepted {
        EtcdAccepted { withdrawn: 0, changed: 0 } => "nothing to accept: no records were kept in force\n".to_owned(),
        EtcdAccepted { withdrawn, changed } => {
            format!("accepted: {} withdrawn, {} changed\n", keys(*withdrawn), keys(*changed))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plurals_are_right() {
        assert_eq!(
            accepted_text(&EtcdAccepted { withdrawn: 0, changed: 0 }),
            "nothing to accept: no records were \
             kept in force\n"
        );
        let text = accepted_text(&EtcdAccepted { withdrawn: 1, changed: 2 });
        assert_eq!(text, "accepted: 1 key withdrawn, 2 keys changed\n");
    }
}
