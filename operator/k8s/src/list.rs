//! One look at a whole cluster, for whoever does not stay: the kubectl plugin and benchmarks.
//!
//! Lists are read in pages, each bounded in time and repeated like every other call; nothing is written.

use std::collections::BTreeSet;
use std::fmt::Debug;

use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceClaimTemplate, ResourceSlice};
use kube::api::{Api, ListParams};
use kube::{Client, Resource};
use operator_api::ModelDeployment;
use operator_core::{Inventory, names};
use serde::de::DeserializeOwned;

use crate::error::{Call, Category, Error};
use crate::retry::RetryPolicy;

/// Objects asked for at once.
const PAGE: u32 = 500;
/// Pages of one list.
const PAGES_MAX: usize = 2000;
/// Engine pods asked for their metrics at once.
const CONCURRENCY_MAX: usize = 16;

/// What is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Everything a plan depends on: also nodes and the pods of everyone.
    Plans,
    /// ModelDeployments and their pods; nodes where they may be listed.
    Reports,
}

/// Lists the cluster. `namespace`: where ModelDeployments and their children are looked for; none: everywhere.
///
/// # Errors
/// The first list that the API server refuses or does not answer.
pub async fn inventory(
    client: &Client,
    namespace: Option<&str>,
    extent: Extent,
) -> Result<Inventory, Error> {
    let ours = format!("{}=cachalot,{}", names::MANAGED_BY, names::MODEL_DEPLOYMENT);
    let deployments: Vec<ModelDeployment> =
        all(&scoped(client, namespace), "ModelDeployment", "").await?;
    if extent == Extent::Reports {
        // Who may see a model need not have rights on nodes; its pods are then told of without them.
        let nodes = match all(&Api::all(client.clone()), "Node", "").await {
            Err(error) if error.category() == Category::Forbidden => Vec::new(),
            other => other?,
        };
        return Ok(Inventory {
            nodes,
            pods: all(&scoped(client, namespace), "Pod", &ours).await?,
            deployments,
            ..Inventory::default()
        });
    }
    // Who may plan need not have rights on them; nobody is then told to give way.
    let classes = match all(&Api::all(client.clone()), "PriorityClass", "").await {
        Err(error) if error.category() == Category::Forbidden => Vec::new(),
        other => other?,
    };
    let mut config_maps: Vec<ConfigMap> =
        all(&scoped(client, namespace), "ConfigMap", &ours).await?;
    let named: BTreeSet<(&str, &str)> = deployments
        .iter()
        .filter_map(|deployment| {
            let reference = deployment.spec.model.config_map_ref.as_ref()?;
            let namespace = deployment.metadata.namespace.as_deref()?;
            Some((namespace, reference.name.as_str()))
        })
        .collect();
    for (namespace, name) in named {
        config_maps.extend(config_map(client, namespace, name).await?);
    }
    // Who may plan need not have rights on them either.
    let policies = match all(&scoped(client, namespace), "NetworkPolicy", "").await {
        Err(error) if error.category() == Category::Forbidden => Vec::new(),
        other => other?,
    };
    let claimed = claimed(client, namespace).await;
    let (claimed, claims_unread) = match claimed {
        Ok(claimed) => (claimed, None),
        // Absent before Kubernetes 1.34; only who asks for claims has to know.
        Err(error) if matches!(error.category(), Category::Forbidden | Category::NotFound) => {
            (Claimed::default(), Some(error.to_string()))
        }
        Err(error) => return Err(error),
    };
    Ok(Inventory {
        slices: claimed.slices,
        claims: claimed.claims,
        claim_templates: claimed.templates,
        claims_unread,
        nodes: all(&Api::all(client.clone()), "Node", "").await?,
        pods: all(&Api::all(client.clone()), "Pod", "").await?,
        config_maps,
        services: all(&scoped(client, namespace), "Service", "").await?,
        budgets: all(&scoped(client, namespace), "PodDisruptionBudget", "").await?,
        network_policies: policies,
        quotas: all(&scoped(client, namespace), "ResourceQuota", "").await?,
        priority_classes: classes,
        deployments,
    })
}

/// What is listed of `resource.k8s.io/v1`.
#[derive(Default)]
struct Claimed {
    slices: Vec<ResourceSlice>,
    claims: Vec<ResourceClaim>,
    templates: Vec<ResourceClaimTemplate>,
}

async fn claimed(client: &Client, namespace: Option<&str>) -> Result<Claimed, Error> {
    Ok(Claimed {
        slices: all(&Api::all(client.clone()), "ResourceSlice", "").await?,
        claims: all(&Api::all(client.clone()), "ResourceClaim", "").await?,
        templates: all(&scoped(client, namespace), "ResourceClaimTemplate", "").await?,
    })
}

/// A config map by name; none when there is none.
///
/// # Errors
/// When the API server refuses or does not answer.
pub async fn config_map(
    client: &Client,
    namespace: &str,
    name: &str,
) -> Result<Option<ConfigMap>, Error> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let call = Call::on("get", "ConfigMap", namespace, name);
    RetryPolicy::CALL.run(&call, || api.get_opt(name)).await
}

/// The text of `/metrics` of engine pods, asked for through the API server; each pod answers or fails alone.
pub async fn metrics(client: &Client, pods: Vec<(String, String)>) -> Vec<Result<String, Error>> {
    futures::stream::iter(pods)
        .map(|(namespace, name)| async move {
            let path = format!(
                "/api/v1/namespaces/{namespace}/pods/{name}:{}/proxy/metrics",
                names::ENGINE_PORT
            );
            let call = Call::on("get", "engine", &namespace, &name);
            let request = || hyper::Request::get(&path).body(Vec::new());
            RetryPolicy::ONCE
                .run(&call, || async {
                    let request = request().map_err(kube::Error::HttpError)?;
                    client.request_text(request).await
                })
                .await
        })
        .buffered(CONCURRENCY_MAX)
        .collect()
        .await
}

fn scoped<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

async fn all<K>(api: &Api<K>, kind: &'static str, labels: &str) -> Result<Vec<K>, Error>
where
    K: Clone + Debug + DeserializeOwned,
{
    let call = Call::on("list", kind, "", "");
    let mut parameters = ListParams::default().limit(PAGE);
    if !labels.is_empty() {
        parameters = parameters.labels(labels);
    }
    let mut items = Vec::new();
    for _ in 0..PAGES_MAX {
        let page = RetryPolicy::CALL
            .run(&call, || api.list(&parameters))
            .await?;
        items.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters.continue_token = Some(token),
            None => return Ok(items),
        }
    }
    Err(Error::Http {
        call,
        message: format!("more than {} objects", PAGES_MAX * PAGE as usize),
    })
}

#[cfg(test)]
mod tests;
