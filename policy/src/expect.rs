//! Test worlds as data: policies with expected verdicts.
//!
//! A world is a JSON object: `name`, optional `why` and `tags`, `namespaces` (name → labels), `pods`, `nodes` (name →
//! `{ips, labels}`; `ips` also count as `proven` and `published`, see [`SourceAliases`]; the InternalIPs of its Node object
//! are `internal`, without it `ips`; with `"object": false` there is no such object), `policies`, `clusterPolicies`,
//! `clusters` (name → an object with the five fields before, those of a cluster: its nodes may list their `subnets`, and
//! without them have exactly their pods' addresses), and one of
//!
//! - `probes`: `[{from, to, protocol, port, family, expect}]`, each a new connection,
//! - `steps`: `[{apply, probes}]`, which change the world between probes,
//! - `packets`: a sequence through the stateful classifier,
//! - `policy` with `expect: reject`: validation must refuse it.
//!
//! Wherever a pod is named, it is `NS/NAME`, or `CLUSTER:NS/NAME`; changes of a cluster's objects have its name as
//! `cluster`.
//!
//! [`SourceAliases`]: crate::engine::SourceAliases

mod packets;
mod probe;
mod store;

use std::{fmt, time::Instant};

use probe::Expectation;
use serde_json::Value;
use store::WorldObjects;

/// One expectation that did not come true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The world's name.
    pub world: String,
    /// What was asked.
    pub probe: String,
    /// What was to be.
    pub expected: String,
    /// What is.
    pub got: String,
    /// Why it is so, as `policy explain` says.
    pub reason: String,
    /// The world's own words on what it is about.
    pub why: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { world, probe, expected, got, reason, why } = self;
        write!(f, "{world}: {probe}: expected {expected}, got {got}: {reason}")?;
        match why {
            Some(why) => write!(f, " [{why}]"),
            None => Ok(()),
        }
    }
}

/// What came of one world.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Expectations that were checked.
    pub checked: usize,
    /// Those that did not come true.
    pub differences: Vec<Difference>,
}

/// A world that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{world}: {at}: {problem}")]
pub struct WorldError {
    /// The world's name, as far as it has one.
    pub world: String,
    /// Where in it.
    pub at: String,
    /// What is wrong.
    pub problem: String,
}

/// Checks all that a world expects. `begin` may be any time: the world's own times count from it.
///
/// # Errors
/// When something in it cannot be read, so that what it expects is not known.
pub fn run(world: &Value, begin: Instant) -> Result<Outcome, WorldError> {
    let name = world.get("name").and_then(Value::as_str).unwrap_or("(no name)").to_owned();
    let failed = |(at, problem): Problem| WorldError { world: name.clone(), at, problem };
    let mut check = WorldCheck { world, begin, name: name.clone(), outcome: Outcome::default() };
    check.run().map_err(failed)?;
    Ok(check.outcome)
}

/// Where, and what.
type Problem = (String, String);

fn problem(at: impl Into<String>, what: impl fmt::Display) -> Problem {
    (at.into(), what.to_string())
}

struct WorldCheck<'w> {
    world: &'w Value,
    begin: Instant,
    name: String,
    outcome: Outcome,
}

impl WorldCheck<'_> {
    fn run(&mut self) -> Result<(), Problem> {
        if self.world.get("name").and_then(Value::as_str).is_none() {
            return Err(problem("name", "missing"));
        }
        if let Some(policy) = self.world.get("policy").filter(|policy| !policy.is_null()) {
            self.reject(policy);
            return Ok(());
        }
        let mut store = WorldObjects::new(self.world)?;
        self.probes(&mut store, "probes", self.world.get("probes"))?;
        for (i, step) in list(self.world, "steps")?.iter().enumerate() {
            for (j, change) in list(step, "apply")?.iter().enumerate() {
                store.apply(change).map_err(|(at, what)| (format!("steps[{i}].apply[{j}].{at}"), what))?;
            }
            self.probes(&mut store, &format!("steps[{i}].probes"), step.get("probes"))?;
        }
        packets::run(self.world, &mut store, self.begin, |i, value, checked| {
            self.outcome.checked += 1;
            if checked.passes != checked.expect_pass {
                let words = |pass: bool| if pass { "pass" } else { "drop" };
                let probe = format!("packets[{i}] {value}");
                self.differ(probe, words(checked.expect_pass), words(checked.passes), checked.reason);
            }
        })
    }

    fn reject(&mut self, policy: &Value) {
        self.outcome.checked += 1;
        let expected = self.world.get("expect").and_then(Value::as_str).unwrap_or("reject");
        let (got, reason) = match store::validate(policy) {
            Ok(()) => ("accept", "the policy is valid".to_owned()),
            Err(violations) => ("reject", violations),
        };
        if got != expected {
            self.differ("policy".to_owned(), expected, got, reason);
        }
    }

    fn probes(&mut self, store: &mut WorldObjects, at: &str, probes: Option<&Value>) -> Result<(), Problem> {
        let Some(probes) = probes.filter(|probes| !probes.is_null()) else { return Ok(()) };
        let probes = probes.as_array().ok_or_else(|| problem(at, "must be a list"))?;
        let classifier = store.classifier();
        for (i, value) in probes.iter().enumerate() {
            let at = format!("{at}[{i}]");
            let probe = Expectation::read(value, store).map_err(|(below, what)| (format!("{at}.{below}"), what))?;
            self.outcome.checked += 1;
            let allowed = classifier.connection(&probe.flow).allowed();
            if allowed != probe.expect_allow {
                let ends = classifier.explain_connection(&probe.flow);
                let reason: Vec<String> =
                    ends.iter().filter(|end| allowed || !end.verdict.allowed).map(ToString::to_string).collect();
                let words = |allow: bool| if allow { "allow" } else { "deny" };
                let probed = format!("{at} {}", probe.text);
                self.differ(probed, words(probe.expect_allow), words(allowed), reason.join("; "));
            }
        }
        Ok(())
    }

    fn differ(&mut self, probe: String, expected: &str, got: &str, reason: String) {
        self.outcome.differences.push(Difference {
            world: self.name.clone(),
            probe,
            expected: expected.to_owned(),
            got: got.to_owned(),
            reason,
            why: self.world.get("why").and_then(Value::as_str).map(ToOwned::to_owned),
        });
    }
}

/// List `name` of an object; none when it is absent.
fn list<'v>(object: &'v Value, name: &str) -> Result<&'v [Value], Problem> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(_) => Err(problem(name, "must be a list")),
    }
}

#[cfg(test)]
mod tests;
