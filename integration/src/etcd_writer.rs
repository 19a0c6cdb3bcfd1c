//! An etcd connection for bulk or precisely timed writes, where starting `etcdctl` would take longer than the write.

use std::io;

use etcd_client::{Client, ResponseHeader, Txn, TxnOp};
use tokio::runtime::{Builder, Runtime};

use crate::{Etcd, Namespace};

/// Operations in one transaction; etcd refuses more than 128.
const OPERATIONS: usize = 120;

/// A client of an [`Etcd`], on a connection that stays open.
pub struct EtcdWriter {
    runtime: Runtime,
    client: Client,
}

impl EtcdWriter {
    /// Connects from inside `place`, which must reach the members' first address.
    ///
    /// # Panics
    /// When etcd does not answer.
    #[must_use]
    #[track_caller]
    pub fn connect(etcd: &Etcd, place: &Namespace) -> Self {
        let endpoints: Vec<String> = etcd.endpoints().split(',').map(str::to_owned).collect();
        // The socket is made by the first request, so that is made in the namespace too; the runtime has no threads.
        let made = place.enter(|| -> io::Result<Self> {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let client = runtime.block_on(async {
                let mut client = Client::connect(endpoints, None).await?;
                client.get("no such key", None).await?;
                Ok::<_, etcd_client::Error>(client)
            });
            Ok(Self { runtime, client: client.map_err(io::Error::other)? })
        });
        made.unwrap_or_else(|error| panic!("{}: cannot connect to etcd: {error}", place.name()))
    }

    /// Writes these keys and values; those in one batch of 120 appear together. Returns the revision of the last one.
    ///
    /// # Panics
    /// When etcd refuses.
    #[track_caller]
    pub fn put_all(&mut self, entries: &[(String, String)]) -> u64 {
        let operations = entries.iter().map(|(key, value)| TxnOp::put(key.as_bytes(), value.as_bytes(), None));
        self.apply(operations.collect())
    }

    /// Deletes these keys; those in one batch of 120 disappear together. Returns the revision of the last one.
    ///
    /// # Panics
    /// When etcd refuses.
    #[track_caller]
    pub fn delete_all(&mut self, keys: &[String]) -> u64 {
        self.apply(keys.iter().map(|key| TxnOp::delete(key.as_bytes(), None)).collect())
    }

    #[track_caller]
    fn apply(&mut self, operations: Vec<TxnOp>) -> u64 {
        let mut revision = 0;
        for batch in operations.chunks(OPERATIONS) {
            let done = self.runtime.block_on(self.client.txn(Txn::new().and_then(batch)));
            match done {
                Ok(done) => revision = done.header().map_or(0, ResponseHeader::revision),
                Err(error) => panic!("etcd: {error}"),
            }
        }
        u64::try_from(revision).unwrap_or_default()
    }
}
