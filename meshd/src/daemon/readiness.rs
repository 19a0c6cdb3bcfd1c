//! Readiness of this node in its `alive/ID`, for `meshd-sync`: what /readyz answers.

use std::{sync::Arc, time::Duration};

use api::{Check, Source as _};
use control_core::membership::LocalFacts;
use etcd_schema::Readiness;
use tokio::{sync::watch, time::interval};
use tokio_util::sync::CancellationToken;

use super::published::ApiState;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// Longest reason, in characters.
const MAX_REASON: usize = 256;

/// Keeps the readiness that this node publishes up to date until `stop`.
pub(super) async fn tell_readiness(
    published: Arc<ApiState>,
    facts: watch::Sender<LocalFacts>,
    stop: CancellationToken,
) {
    let mut looks = interval(EVERY);
    while stop.run_until_cancelled(looks.tick()).await.is_some() {
        let readiness = Some(of(&published.readiness()));
        facts.send_if_modified(|facts| {
            let changed = facts.readiness != readiness;
            if changed {
                facts.readiness.clone_from(&readiness);
            }
            changed
        });
    }
}

fn of(checks: &[Check]) -> Readiness {
    let failed = checks.iter().find_map(|check| Some(format!("{}: {}", check.name, check.failure.as_ref()?)));
    failed.map_or(Readiness::Ready, |reason| Readiness::NotReady { reason: reason.chars().take(MAX_REASON).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failed_check_is_the_reason() {
        let well = Check::new("identity", None);
        assert_eq!(of(std::slice::from_ref(&well)), Readiness::Ready);
        let failed = [well, Check::new("subnet", Some("x".repeat(300))), Check::new("policy", Some("late".to_owned()))];
        let Readiness::NotReady { reason } = of(&failed) else { panic!("ready") };
        assert!(reason.starts_with("subnet: xxx") && reason.len() == MAX_REASON, "{reason}");
    }
}
