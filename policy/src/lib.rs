//! NetworkPolicy: from Kubernetes objects to verdicts.
//!
//! No I/O, no clock, no `unsafe`.
//!
//! ```text
//! object   JSON tree → strict, canonical policies; each error named
//! objects  bytes of a key in etcd → pods, namespaces, policies; what unreadable ones mean
//! engine   Engine: takes changes, keeps indexes, commits → Classifier: immutable, judges flows, explains
//! expect   test worlds with expected verdicts, as data
//! flow     FlowTable: replies, errors, fragments; judged again when rules change
//! nft      the same policies for local pods as sets, maps and chains; the difference of two as one transaction
//! service  `tcp/80`, `tcp/http`, `icmp`: the services that an operator asks about
//! ```
//!
//! # Use
//!
//! An [`engine::Engine`] takes objects ([`put_pod`](engine::Engine::put_pod),
//! [`put_policy`](engine::Engine::put_policy), …) in any order, and [`commit`](engine::Engine::commit) compiles them
//! into an [`engine::Classifier`], in time proportional to the change. A packet filter holds the classifier behind an
//! atomic pointer and calls [`verdict`](engine::Classifier::verdict) for each new flow.
//!
//! # Semantics
//!
//! A flow passes if the source's egress rules and the destination's ingress rules allow it; an end that is no pod
//! allows it. For one end, the order is: ClusterNetworkPolicies of tier Admin in order of priority; then, if any
//! NetworkPolicy isolates the pod in this direction, whether a rule of one of those matches; else those of tier
//! Baseline; else allow. Directions are independent: a NetworkPolicy for ingress leaves egress to the Baseline tier.
//!
//! Labels may be unknown: a pod without its object, a namespace without one. Selectors therefore have three values, and
//! uncertainty never allows a flow that the missing labels might refuse. A policy that only may select a pod isolates
//! it and grants nothing. A peer that only may match is matched by no Accept and by every Deny. Behind a Pass that only
//! may match, an Accept counts no more than a Pass.
//!
//! ```
//! use policy::{
//!     engine::{Engine, Flow, ObjectName, PolicyState, Side},
//!     object::{NetworkPolicy, PodObject},
//! };
//!
//! let mut engine = Engine::new();
//! let pod = PodObject { addresses: vec!["10.244.1.10".parse()?], ..Default::default() };
//! engine.put_pod(ObjectName::new("shop", "db"), pod, 1);
//! let spec = serde_json::json!({"podSelector": {}, "policyTypes": ["Ingress"]});
//! engine.put_policy(ObjectName::new("shop", "closed"), &PolicyState::Valid(NetworkPolicy::parse(&spec)?));
//! let classifier = engine.commit(1);
//!
//! let flow = Flow {
//!     source: "203.0.113.7".parse()?,
//!     destination: "10.244.1.10".parse()?,
//!     protocol: packet::protocol::TCP,
//!     port: Some(5432),
//! };
//! assert!(!classifier.verdict(Side::Ingress, &flow).allowed);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may begin at any instant"))]

// Files that unit tests share with the tests of the whole crate name it.
#[cfg(test)]
extern crate self as policy;

pub mod engine;
pub mod expect;
pub mod flow;
pub mod nft;
pub mod object;
pub mod objects;
pub mod service;
mod set;
