//! S7 in motion: a hundredth of the pods is deleted each second, by somebody else, and the operator makes others.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Result;
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, ListParams, PartialObjectMeta};

use crate::clocks::not_running;
use crate::cluster::Place;
use crate::objects::{api, say, wait_for};
use crate::operator::Operator;
use crate::stories::wait_at;

/// How long pods are deleted.
pub const TIME: Duration = Duration::from_secs(30);
/// How often it is looked whether all are back.
const LOOK: Duration = Duration::from_millis(200);

/// What it took.
#[derive(Clone, Copy, Debug)]
pub struct Churn {
    /// Of one core, while pods were deleted.
    pub percent: f64,
    /// From the last deletion until as many as before were ready.
    pub back_seconds: f64,
}

/// How many are deleted each second of a fleet of so many.
pub fn rate(replicas: u32) -> u32 {
    (replicas / 100).max(1)
}

/// Deletes pods of the ModelDeployment for [`TIME`] and waits until it has as many ready ones as before, none of them
/// one that was deleted.
pub async fn churn(
    place: &Place<'_>,
    operator: &Operator,
    name: &str,
    replicas: u32,
) -> Result<Churn> {
    let pods: Api<Pod> = api(place.client);
    let each = usize::try_from(rate(replicas))?;
    let list = pods.list_metadata(&ListParams::default()).await?;
    let mut all = list.items.into_iter().filter_map(|pod| {
        let metadata = pod.metadata;
        Some((metadata.name?, metadata.uid?))
    });
    say(format!("S7: {each} pods are deleted each second"));
    let mut deleted = BTreeSet::new();
    let before = operator.processor_seconds()?;
    let begin = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    while begin.elapsed() < TIME {
        tick.tick().await;
        let some: Vec<(String, String)> = all.by_ref().take(each).collect();
        let how = &DeleteParams::default();
        try_join_all(some.iter().map(|(name, _)| pods.delete(name, how))).await?;
        deleted.extend(some.into_iter().map(|(_, uid)| uid));
    }
    let used = operator.processor_seconds()? - before;
    let percent = 100.0 * used / begin.elapsed().as_secs_f64();
    let last = Instant::now();
    wait_for(LOOK, || async {
        let list = pods.list_metadata(&ListParams::default()).await?;
        // One that is made in the place of another has its name.
        let is_other = |pod: &&PartialObjectMeta<Pod>| {
            let uid = pod.metadata.uid.as_ref();
            uid.is_some_and(|uid| !deleted.contains(uid))
        };
        let (others, all) = (list.items.iter().filter(is_other).count(), list.items.len());
        if others != all || all != usize::try_from(replicas)? {
            return Ok(Some(format!(
                "{others} of {replicas} pods are there, and {} deleted ones",
                all - others
            )));
        }
        not_running(&pods).await
    })
    .await?;
    wait_at(place, name, replicas).await?;
    let back_seconds = last.elapsed().as_secs_f64();
    say(format!(
        "S7: {} pods were deleted, {percent:.1} % of a core, all are back after {back_seconds:.1} s",
        deleted.len()
    ));
    Ok(Churn {
        percent,
        back_seconds,
    })
}
