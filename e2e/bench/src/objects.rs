//! Objects on the control plane: made as fast as it takes them, counted, and removed with everything that hangs on them.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use e2e::Cluster;
use futures::StreamExt;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
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
/// Creates under way at once by the bare client; other numbers were not measured.
const CONCURRENCY: usize = 64;
/// How often pods are counted. Each count costs the API server a little, which is taken from whoever creates.
const COUNT_PERIOD: Duration = Duration::from_millis(50);
/// What the operator's objects are found by.
const OURS: &str = "app.kubernetes.io/managed-by=cachalot";

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
    let start = Instant::now();
    loop {
        let there = count(pods, &ListParams::default()).await?;
        if there >= wanted {
            return Ok(());
        }
        if start.elapsed() > WAIT_MAX {
            bail!("{there} of {wanted} pods after {WAIT_MAX:?}");
        }
        tokio::time::sleep(COUNT_PERIOD).await;
    }
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

/// Removes all pods and waits until they are gone.
pub async fn clear_pods(pods: &Api<Pod>) -> Result<()> {
    let at_once = DeleteParams::default().grace_period(0);
    let start = Instant::now();
    loop {
        let left = count(pods, &ListParams::default()).await?;
        if left == 0 {
            return Ok(());
        }
        if start.elapsed() > WAIT_MAX {
            bail!("{left} pods are still there after {WAIT_MAX:?}");
        }
        pods.delete_collection(&at_once, &ListParams::default())
            .await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Removes the fleet, whoever made it, and waits until the garbage collector has removed what hung on it: its work would
/// be counted against whoever is measured next.
pub async fn clear(cluster: &Cluster, client: &Client) -> Result<()> {
    cluster.kubectl(&["delete", "mdep", "--all", "--wait=false"])?;
    clear_pods(&api(client)).await?;
    let all = ListParams::default();
    let ours = ListParams::default().labels(OURS);
    let start = Instant::now();
    loop {
        let left = [
            (
                "ModelDeployments",
                count(&api::<ModelDeployment>(client), &all).await?,
            ),
            ("pods", count(&api::<Pod>(client), &all).await?),
            ("services", count(&api::<Service>(client), &ours).await?),
            (
                "config maps",
                count(&api::<ConfigMap>(client), &ours).await?,
            ),
            (
                "budgets",
                count(&api::<PodDisruptionBudget>(client), &ours).await?,
            ),
        ];
        let left: Vec<String> = left
            .iter()
            .filter(|(_, number)| *number > 0)
            .map(|(kind, number)| format!("{number} or more {kind}"))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        if start.elapsed() > WAIT_MAX {
            bail!("{} are still there after {WAIT_MAX:?}", left.join(", "));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
