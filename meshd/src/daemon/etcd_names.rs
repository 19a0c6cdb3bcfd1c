//! Addresses of etcd members that are given by name: no network may cover them.

use std::{io, net::IpAddr, time::Duration};

use futures_util::future::join_all;
use tokio::{net::lookup_host, time::timeout};

use super::underlay::name_and_port;

/// How long all look-ups together may take: the first rules wait for them, and DNS may come up after this node.
const PATIENCE: Duration = Duration::from_secs(1);

/// Addresses of etcd members given by name, with the names.
#[derive(Debug, Default)]
pub(super) struct EtcdNames(Vec<(IpAddr, String)>);

impl EtcdNames {
    /// Each address, with its description.
    pub(super) fn addresses(&self) -> &[(IpAddr, String)] {
        &self.0
    }

    /// Looks up the names among `urls`. The addresses of a name stay while it cannot be looked up.
    pub(super) async fn look_up(&mut self, urls: &[String]) {
        let resolve = |name: String| async move { Ok(lookup_host(name).await?.map(|at| at.ip()).collect()) };
        self.look_up_by(urls, PATIENCE, resolve).await;
    }

    /// [`look_up`](Self::look_up) by `resolve`, which is given all names at once and has `patience` for them.
    async fn look_up_by<F>(&mut self, urls: &[String], patience: Duration, resolve: impl Fn(String) -> F)
    where
        F: Future<Output = io::Result<Vec<IpAddr>>>,
    {
        let named = urls.iter().filter_map(|url| Some((url, name_and_port(url)?.to_owned())));
        let answers = named.map(|(url, name)| {
            let answer = timeout(patience, resolve(name));
            async move { (format!("etcd's {url}"), answer.await) }
        });
        for (member, answer) in join_all(answers).await {
            if let Ok(Ok(found)) = answer {
                self.0.retain(|(_, of)| *of != member);
                self.0.extend(found.into_iter().map(|address| (address, member.clone())));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use tokio::sync::Barrier;

    use super::*;

    fn urls() -> Vec<String> {
        ["https://a.example:2379", "https://192.0.2.9:2379", "https://b.example:2379", "https://c.example:2379"]
            .map(str::to_owned)
            .to_vec()
    }

    fn address(name: &str) -> io::Result<Vec<IpAddr>> {
        let last = name.as_bytes()[0];
        Ok(vec![IpAddr::from([192, 0, 2, last])])
    }

    fn known(names: &EtcdNames) -> Vec<String> {
        names.addresses().iter().map(|(address, of)| format!("{address} {of}")).collect()
    }

    /// As with a DNS that does not answer: the time of one look-up, not of all of them, is what the first rules wait
    /// for.
    #[tokio::test]
    async fn all_names_are_looked_up_at_the_same_time() {
        let all = &Barrier::new(3);
        let mut names = EtcdNames::default();
        let resolve = |name: String| async move {
            all.wait().await;
            address(&name)
        };
        names.look_up_by(&urls(), PATIENCE, resolve).await;
        let expected = [("97", "a"), ("98", "b"), ("99", "c")];
        let expected = expected.map(|(last, name)| format!("192.0.2.{last} etcd's https://{name}.example:2379"));
        assert_eq!(known(&names), expected);
    }

    #[tokio::test]
    async fn what_is_known_of_a_name_stays_until_it_is_answered_anew() {
        let mut names = EtcdNames::default();
        names.look_up_by(&urls(), PATIENCE, |name| ready(address(&name))).await;
        let before = known(&names);
        names.look_up_by(&urls(), Duration::ZERO, |_| pending()).await;
        names.look_up_by(&urls(), PATIENCE, |_| ready(Err(io::ErrorKind::NotFound.into()))).await;
        assert_eq!(known(&names), before);
        names.look_up_by(&urls()[..1], PATIENCE, |_| ready(address("z"))).await;
        let moved: Vec<String> = known(&names).into_iter().filter(|one| !before.contains(one)).collect();
        assert_eq!((moved, names.addresses().len()), (vec!["192.0.2.122 etcd's https://a.example:2379".to_owned()], 3));
    }
}
