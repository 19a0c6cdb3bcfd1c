//! `meshctl policy` and `meshctl flows`.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use api::Client;
use api_types::{Explained, FlowSample, Policy, Question, SampledVerdict, ShownPolicy};
use clap::Subcommand;
use meshd::policy_tool::{self, ExplainError};

use crate::{
    exit::{DENIED, FAILED, NotFound, UsageError},
    output::{Output, print, print_json_line, print_lines, text_of},
    show::counted,
};

/// How often `flows --follow` asks for more.
const FOLLOW: Duration = Duration::from_millis(500);

#[derive(Subcommand)]
pub(crate) enum PolicyCommand {
    /// List all policies in force
    ///
    /// Example: meshctl policy list
    List,
    /// Show one policy as meshd interprets it
    ///
    /// Example: meshctl policy show default/db
    Show {
        /// NAMESPACE/NAME, or NAME of a ClusterNetworkPolicy; CLUSTER: before it if several clusters have it
        name: String,
    },
    /// Test policies against expected verdicts in files, without a daemon; exit with 1 on any difference
    ///
    /// Example: meshctl policy test policies/*.yaml
    Test {
        /// JSON Lines or YAML documents, each with pods, policies and expectations (docs/policy.md); - reads standard
        /// input
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Explain whether SRC may connect to DST, and which rule decides; exit with 6 if denied
    ///
    /// Example: meshctl policy explain default/web default/db tcp/5432
    Explain {
        /// Source: NAMESPACE/POD, CLUSTER:NAMESPACE/POD if several clusters have it, or an address
        src: String,
        /// Destination, in the same form
        dst: String,
        /// tcp/80, udp/53, sctp/5000, tcp/http (a named port of DST), icmp, or proto/NUMBER
        #[arg(value_name = "PROTO/PORT")]
        service: String,
        /// Read Kubernetes objects (JSON or YAML, Lists too) from the files in this directory instead of asking the
        /// daemon
        #[arg(long, value_name = "DIR")]
        offline: Option<PathBuf>,
    },
}

pub(crate) fn policy(output: Output, client: &Client, command: &PolicyCommand) -> anyhow::Result<u8> {
    match command {
        PolicyCommand::List => {
            let policies: Vec<Policy> = client.get("/v1/policies")?;
            print(output, &policies, |policies| policies_text(policies))?;
        }
        PolicyCommand::Show { name } => {
            if !is_plain(name) {
                return Err(UsageError(format!("{name:?} is not a valid policy name")).into());
            }
            let shown: ShownPolicy = client.get(&format!("/v1/policies/{name}"))?;
            let head = |shown: &ShownPolicy| policies_text(std::slice::from_ref(&shown.policy));
            match output {
                Output::Json => print(output, &shown, head)?,
                // `understood` consists of lines.
                Output::Table => print_lines(&(text_of(&shown, head)? + &shown.understood))?,
            }
        }
        PolicyCommand::Test { files } => {
            let tested = policy_tool::test(files, Instant::now()).map_err(|error| UsageError(error.to_string()))?;
            print(output, &tested, policy_tool::Tested::text)?;
            return Ok(if tested.agrees() { 0 } else { FAILED });
        }
        PolicyCommand::Explain { src, dst, service, offline: Some(folder) } => {
            let question = Question { source: src.clone(), destination: dst.clone(), service: service.clone() };
            let explained = policy_tool::explain(folder, &question).map_err(|error| match error {
                ExplainError::NotFound(what) => NotFound(what).into(),
                ExplainError::Question(what) => UsageError(what).into(),
                error => anyhow::Error::from(error),
            })?;
            print(output, &explained, Explained::text)?;
            return Ok(if explained.allowed { 0 } else { DENIED });
        }
        PolicyCommand::Explain { src, dst, service, offline: None } => {
            if let Some(odd) = [src, dst, service].into_iter().find(|text| !is_plain(text)) {
                return Err(
                    UsageError(format!("{odd:?} is neither a pod's name nor an address, protocol or port")).into()
                );
            }
            let path = format!("/v1/policy/explain?src={src}&dst={dst}&service={service}");
            let explained: Explained = client.get(&path)?;
            print(output, &explained, Explained::text)?;
            return Ok(if explained.allowed { 0 } else { DENIED });
        }
    }
    Ok(0)
}

/// Whether a text may stand in a request as it is.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/:.-_".contains(&b))
}

/// Prints samples, one a line (JSON: one object a line).
pub(crate) fn flows(output: Output, client: &Client, follow: bool, denied: bool) -> anyhow::Result<u8> {
    let mut after = 0;
    loop {
        let samples: Vec<FlowSample> = client.get(&format!("/v1/flows?after={after}"))?;
        after = samples.last().map_or(after, |sample| sample.number);
        for sample in samples.iter().filter(|sample| !denied || sample.verdict != SampledVerdict::Allowed) {
            match output {
                Output::Json => print_json_line(sample)?,
                Output::Table => print(output, sample, |sample| format!("{sample}\n"))?,
            }
        }
        if !follow {
            return Ok(0);
        }
        std::thread::sleep(FOLLOW);
    }
}

pub(crate) fn policies_text(policies: &[Policy]) -> String {
    let mut text = String::new();
    for policy in policies {
        let directions = policy.directions.join("+");
        let of = if directions.is_empty() { "no direction".to_owned() } else { directions };
        let rules = counted(policy.rules, "rule", "rules");
        text += &format!("{}  {of}, {rules}, {}\n", policy.key, policy.state);
    }
    text
}
