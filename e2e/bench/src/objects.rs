//! Objects on the control plane: made as fast as it takes them, counted, and removed with everything that hangs on them.

use std::fmt::{Debug, Display};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use e2e::Cluster;
use futures::StreamExt;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::Resource;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use operator_api::ModelDeployment;
use operator_k8s::Client;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Where everything is made.
pub const NAMESPACE: &str = "default";
/// How long one wait may take.
pub const WAIT_MAX: Duration = Duration::from_secs(600);
/// How long a wait for many pods may take for each of them, where that is longer: five a second is less than any control
/// plane makes on a machine that does something else as well.
const POD_MAX: Duration = Duration::from_millis(200);
/// How long a wait goes on in which nothing moves.
const STILL_MAX: Duration = Duration::from_secs(120);
/// How often a wait says what is missing.
const SAY_PERIOD: Duration = Duration::from_secs(15);
/// When the process said something first.
static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
/// Creates under way at once by the bare client; other numbers were not measured.
const CONCURRENCY: usize = 64;
/// Pods that one call removes: ten thousand take longer than the API server gives a call.
const DELETED_TOGETHER: u32 = 1000;
/// How often pods are counted. Each count costs the API server a little, which is taken from whoever creates.
const COUNT_PERIOD: Duration = Duration::from_millis(50);
/// How often it is looked whether everything is removed.
const CLEAR_PERIOD: Duration = Duration::from_millis(500);
/// What the operator's objects are found by.
const OURS: &str = "app.kubernetes.io/managed-by=cachalot";

/// Says what is done now, and when, so that who waits for half an hour sees what for.
pub fn say(what: impl Display) {
    println!("{:6.1} s  {what}", BEGIN.elapsed().as_secs_f64());
}

/// Asks until nothing is missing any more, and says now and then what still is. It ends by itself: after [`WAIT_MAX`], or
/// when the same was missing for [`STILL_MAX`].
///
/// # Errors
/// With what was missing at the end.
pub async fn wait_for<F>(period: Duration, missing: impl FnMut() -> F) -> Result<()>
where
    F: Future<Output = Result<Option<String>>>,
{
    wait_within(period, WAIT_MAX, STILL_MAX, missing).await
}

async fn wait_within<F>(
    period: Duration,
    wait_max: Duration,
    still_max: Duration,
    mut missing: impl FnMut() -> F,
) -> Result<()>
where
    F: Future<Output = Result<Option<String>>>,
{
    let start = Instant::now();
    let (mut last, mut moved, mut said) = (String::new(), start, start);
    while let Some(why) = missing().await? {
        if why != last {
            (last, moved) = (why, Instant::now());
        }
        if start.elapsed() > wait_max {
            bail!("after {wait_max:?}: {last}");
        }
        if moved.elapsed() > still_max {
            bail!("nothing moved for {still_max:?}: {last}");
        }
        if said.elapsed() > SAY_PERIOD {
            say(&last);
            said = Instant::now();
        }
        tokio::time::sleep(period).await;
    }
    Ok(())
}

/// The objects of one kind where everything is made.
pub fn api<K>(client: &Client) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    Api::namespaced(client.clone(), NAMESPACE)
}

/// Creates everything given, many at once.
pub async fn create_all<K>(api: &Api<K>, objects: Vec<K>) -> Result<()>
where
    K: Clone + Debug + Serialize + DeserializeOwned,
{
    let parameters = PostParams::default();
    let mut calls = futures::stream::iter(objects)
        .map(|object| {
            let parameters = &parameters;
            async move { api.create(parameters, &object).await }
        })
        .buffer_unordered(CONCURRENCY);
    while let Some(created) = calls.next().await {
        created?;
    }
    Ok(())
}

/// How many objects there are: the first of them, and how many the API server says remain.
pub async fn count<K>(api: &Api<K>, select: &ListParams) -> Result<usize>
where
    K: Clone + Debug + DeserializeOwned,
{
    let page = api.list_metadata(&select.clone().limit(1)).await?;
    // The API server does not count what remains of a list that a label selects.
    let more = match page.metadata.remaining_item_count {
        Some(more) => usize::try_from(more)?,
        None if page
            .metadata
            .continue_
            .is_some_and(|token| !token.is_empty()) =>
        {
            1
        }
        None => 0,
    };
    Ok(page.items.len() + more)
}

/// Waits until there are so many pods.
pub async fn wait_pods(pods: &Api<Pod>, wanted: usize) -> Result<()> {
    let wait_max = WAIT_MAX.max(POD_MAX * u32::try_from(wanted)?);
    wait_within(COUNT_PERIOD, wait_max, STILL_MAX, || async {
        let there = count(pods, &ListParams::default()).await?;
        Ok((there < wanted).then(|| format!("{there} of {wanted} pods are there")))
    })
    .await
}

/// The pods that are there, as they were created: without what the cluster added. They keep their owner, so that who
/// creates them again causes the work that an owner causes.
pub async fn templates(pods: &Api<Pod>) -> Result<Vec<Pod>> {
    let list = pods.list(&ListParams::default()).await?;
    Ok(list
        .items
        .into_iter()
        .map(|mut pod| {
            pod.metadata.uid = None;
            pod.metadata.resource_version = None;
            pod.metadata.creation_timestamp = None;
            pod.metadata.managed_fields = None;
            pod.status = None;
            if let Some(spec) = &mut pod.spec {
                spec.node_name = None;
            }
            pod
        })
        .collect())
}

/// Removes all pods of all namespaces and waits until they are gone.
pub async fn clear_pods(client: &Client) -> Result<()> {
    let at_once = DeleteParams::default().grace_period(0);
    let (all, at_once) = (&Api::<Pod>::all(client.clone()), &at_once);
    wait_for(CLEAR_PERIOD, || async move {
        let left = count(all, &ListParams::default()).await?;
        if left == 0 {
            return Ok(None);
        }
        let some = ListParams::default().limit(DELETED_TOGETHER);
        let mut why = String::new();
        for namespace in namespaces(client).await? {
            let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
            if let Err(error) = pods.delete_collection(at_once, &some).await {
                why = format!(" ({namespace}: {error})");
            }
        }
        Ok(Some(format!("{left} pods are still there{why}")))
    })
    .await
}

async fn namespaces(client: &Client) -> Result<Vec<String>> {
    let all: Api<Namespace> = Api::all(client.clone());
    let all = all.list_metadata(&ListParams::default()).await?;
    Ok(all
        .items
        .into_iter()
        .filter_map(|one| one.metadata.name)
        .collect())
}

/// Removes the fleet, whoever made it, and waits until the garbage collector has removed what hung on it: its work would
/// be counted against whoever is measured next.
pub async fn clear(cluster: &Cluster, client: &Client) -> Result<()> {
    say("removing everything");
    cluster.kubectl(&[
        "delete",
        "mdep",
        "--all",
        "--all-namespaces",
        "--wait=false",
    ])?;
    clear_pods(client).await?;
    let (all, ours) = (&ListParams::default(), &ListParams::default().labels(OURS));
    wait_for(CLEAR_PERIOD, || async move {
        let left = [
            (
                "ModelDeployments",
                left::<ModelDeployment>(client, all).await?,
            ),
            ("pods", left::<Pod>(client, all).await?),
            ("services", left::<Service>(client, ours).await?),
            ("config maps", left::<ConfigMap>(client, ours).await?),
            ("budgets", left::<PodDisruptionBudget>(client, ours).await?),
        ];
        let left: Vec<String> = left
            .iter()
            .filter(|(_, number)| *number > 0)
            .map(|(kind, number)| format!("{number} or more {kind}"))
            .collect();
        Ok((!left.is_empty()).then(|| format!("{} are still there", left.join(", "))))
    })
    .await
}

/// How many of a kind there are in all namespaces.
async fn left<K>(client: &Client, select: &ListParams) -> Result<usize>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    count(&Api::<K>::all(client.clone()), select).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(still_max: Duration, left: &mut u32) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()?;
        runtime.block_on(wait_within(
            Duration::from_millis(1),
            WAIT_MAX,
            still_max,
            || {
                *left = left.saturating_sub(1);
                let missing = (*left > 0).then(|| format!("{} pods are missing", left.min(&mut 7)));
                async move { Ok(missing) }
            },
        ))
    }

    #[test]
    fn a_wait_ends_when_nothing_is_missing_or_nothing_moves_and_says_what_for() {
        wait(Duration::from_secs(60), &mut 5).expect("it ends");
        let mut never = u32::MAX;
        let why = wait(Duration::from_millis(20), &mut never).expect_err("nothing moves");
        let why = why.to_string();
        assert!(
            why.contains("nothing moved for 20ms: 7 pods are missing"),
            "{why}"
        );
    }
}
