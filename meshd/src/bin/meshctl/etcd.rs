//! `meshctl etcd`.

use api::Client;
use api_types::EtcdAccepted;
use clap::Subcommand;

use crate::output::{Output, print};

#[derive(Subcommand)]
pub(crate) enum EtcdCommand {
    /// Use what etcd holds now: end every hold on policies and other records that it lacks, on this node (root only)
    ///
    /// A node keeps policies, pods and other records in force if etcd was replaced, restored from an older backup, or
    /// lost many policies at once; `meshctl status` shows it. After this command nothing is in force that etcd does not
    /// hold. Run it on each node, once the keys in etcd are the right ones.
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
        EtcdAccepted { withdrawn: 0, changed: 0 } => "nothing was held\n".to_owned(),
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
        assert_eq!(accepted_text(&EtcdAccepted { withdrawn: 0, changed: 0 }), "nothing was held\n");
        let text = accepted_text(&EtcdAccepted { withdrawn: 1, changed: 2 });
        assert_eq!(text, "accepted: 1 key withdrawn, 2 keys changed\n");
    }
}
