//! Messages for the runtime's log.

/// Writes a line to the runtime's log; standard output is for the runtime itself.
pub(crate) fn log(text: &str) {
    use std::io::Write as _;
    // Without standard error there is no other place for it.
    let _ = writeln!(std::io::stderr(), "meshd-cni: {text}");
}
