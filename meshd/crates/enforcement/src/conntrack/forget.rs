//! Deletes connections of addresses with a new owner.

use std::{collections::BTreeSet, io, net::IpAddr};

use super::{
    Conntrack,
    message::{CtReply, answers, removal},
};

impl Conntrack {
    /// Removes every flow of these addresses, before or after NAT: a reply to an address's previous owner opens a flow
    /// to the current one.
    pub(crate) fn forget(&mut self, addresses: &BTreeSet<IpAddr>) -> io::Result<()> {
        let mut theirs = Vec::new();
        self.dump(|flow| {
            let [answers, asks] = flow.reply;
            if [flow.tuple.source, flow.tuple.destination, answers, asks].iter().any(|end| addresses.contains(end)) {
                theirs.push(flow);
            }
        })?;
        for flow in theirs {
            self.sequence = self.sequence.wrapping_add(1);
            self.send(&removal(&flow, self.sequence))?;
            let length = self.receive()?;
            match answers(&self.buffer[..length], self.sequence).next() {
                // It may have ended meanwhile.
                Some(CtReply::Done(0 | libc::ENOENT) | CtReply::Flow(_)) | None => {}
                Some(CtReply::Done(error)) => return Err(io::Error::from_raw_os_error(error)),
            }
        }
        Ok(())
    }
}
