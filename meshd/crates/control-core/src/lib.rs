//! The control plane's decisions: values without I/O, clock or randomness of their own.
//!
//! [`store`] holds what etcd says and which of it is in force, [`guard`] what an etcd that lost records may withdraw,
//! [`membership`] this node's own records, [`endpoints`] those of its containers, [`allocator`] the choice of a subnet.
//! [`core`] joins them into one state machine: it is given the time and what happened, and returns what to do. `control`
//! does it.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may begin at any instant"))]

pub mod allocator;
pub mod backoff;
mod cache_schedule;
mod config_rule;
pub mod core;
pub mod endpoints;
#[cfg(any(test, feature = "testing"))]
pub mod event_queue;
pub mod guard;
mod look_back;
pub mod membership;
#[cfg(any(test, feature = "testing"))]
pub mod model;
pub mod objects;
pub mod roles;
pub mod store;
pub mod types;
pub mod unreachable;
