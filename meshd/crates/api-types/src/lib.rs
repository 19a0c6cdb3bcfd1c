//! The answers of the local API as they travel: JSON on the socket, for `meshctl` and the daemon alike.

#![forbid(unsafe_code)]

mod diagnosis;
mod flow_sample;
mod question;
mod status;

pub use diagnosis::{Diagnosis, Echoed, Families, Finding, Layer, LayerKind, Ping, Severity};
pub use flow_sample::{FlowSample, SampledVerdict};
pub use question::{Question, QuestionError};
pub use status::{
    CopyStatus, DaemonState, DropCount, Etcd, EtcdAccepted, Explained, ExplainedEnd, Path, Peer, PeerCounts, Policy,
    PolicyStatus, ReportedProblem, Route, ShownPolicy, Status,
};
