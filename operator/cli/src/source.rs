//! Where the cluster is seen: live, or in files.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use operator_core::{Inventory, Settings};
use operator_k8s::list::{self, Extent};
use operator_k8s::{Client, client};

use crate::files;
use crate::output::Format;

/// Engine image of plans while the operator has made no pod that shows its own.
const ENGINE_IMAGE_DEFAULT: &str = "cachalot-engine";

/// Flags that say where to look and how to answer.
#[derive(Args)]
pub struct Source {
    /// Namespace; absent: that of the kubeconfig's context, or `default` with files.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Nodes as `kubectl get nodes -o json` writes them; no cluster is asked then.
    #[arg(long, value_name = "FILE")]
    pub nodes: Vec<String>,
    /// Pods of all namespaces as `kubectl get pods -A -o json` writes them.
    #[arg(long, value_name = "FILE", requires = "nodes")]
    pub pods: Vec<String>,
    /// The model's published config.json, for a model that was not inspected yet.
    #[arg(long, value_name = "FILE")]
    pub model_config: Option<String>,
    /// Engine image that new pods would run; absent: the one that the operator's pods run.
    #[arg(long, value_name = "IMAGE")]
    pub engine_image: Option<String>,
    /// Path of the kubeconfig; absent: KUBECONFIG or ~/.kube/config.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Format,
}

/// What was found.
pub struct Found {
    /// Everything.
    pub inventory: Inventory,
    /// The namespace that is meant when none is named.
    pub namespace: String,
    /// Namespace and name of the ModelDeployments of the manifests, in their order.
    pub given: Vec<(String, String)>,
    /// The connection, when a cluster was asked.
    pub client: Option<Client>,
}

impl Source {
    /// Lists the cluster, or reads the files that stand for it, then adds `manifests`. A
    /// ModelDeployment of a manifest takes the place of the one that is there, as after an apply.
    ///
    /// # Errors
    /// When a file or the cluster cannot be read.
    pub async fn find(
        &self,
        manifests: &[String],
        all_namespaces: bool,
        extent: Extent,
    ) -> Result<Found> {
        let is_offline =
            !self.nodes.is_empty() || (extent == Extent::Reports && !manifests.is_empty());
        let (mut inventory, namespace, client) = if is_offline {
            let namespace = self.namespace.clone().unwrap_or_else(|| "default".into());
            let mut inventory = Inventory::default();
            files::add(&mut inventory, &self.nodes, &namespace)?;
            files::add(&mut inventory, &self.pods, &namespace)?;
            (inventory, namespace, None)
        } else {
            let (client, default) =
                client::connect_as(self.kubeconfig.as_deref(), self.context.as_deref())
                    .await
                    .context("no cluster; --nodes FILE plans without one")?;
            let namespace = self.namespace.clone().unwrap_or(default);
            let scope = (!all_namespaces).then_some(namespace.as_str());
            let inventory = list::inventory(&client, scope, extent).await?;
            (inventory, namespace, Some(client))
        };
        let mut given = Inventory::default();
        files::add(&mut given, manifests, &namespace)?;
        if let Some(client) = &client {
            add_named_config_maps(client, &mut given, &inventory).await?;
        }
        let names = given.deployments.iter().map(|deployment| {
            let metadata = deployment.metadata.clone();
            (
                metadata.namespace.unwrap_or_default(),
                metadata.name.unwrap_or_default(),
            )
        });
        let names = names.collect();
        inventory.overlay(given);
        Ok(Found {
            inventory,
            namespace,
            given: names,
            client,
        })
    }

    /// The operator's configuration, as far as it matters for plans.
    pub fn settings(&self, inventory: &Inventory) -> Settings {
        let seen = inventory.settings();
        let image = self.engine_image.clone();
        let policy = seen.as_ref().map(|seen| seen.image_pull_policy.clone());
        let node_cache = seen.as_ref().and_then(|seen| seen.node_cache.clone());
        Settings {
            network_policies: seen.as_ref().is_none_or(|seen| seen.network_policies),
            engine_image: image
                .or(seen.map(|seen| seen.engine_image))
                .unwrap_or_else(|| ENGINE_IMAGE_DEFAULT.into()),
            image_pull_policy: policy.unwrap_or_else(|| "IfNotPresent".into()),
            node_cache,
        }
    }

    /// The text of `--model-config`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn model_config(&self) -> Result<Option<String>> {
        self.model_config.as_deref().map(files::text).transpose()
    }
}

/// Config maps of the cluster that manifests name and do not hold themselves.
async fn add_named_config_maps(
    client: &Client,
    given: &mut Inventory,
    inventory: &Inventory,
) -> Result<()> {
    let mut found = Vec::new();
    for deployment in &given.deployments {
        let namespace = deployment.metadata.namespace.as_deref().unwrap_or_default();
        let Some(reference) = &deployment.spec.model.config_map_ref else {
            continue;
        };
        let is_known = given.config_map(namespace, &reference.name).is_some()
            || inventory.config_map(namespace, &reference.name).is_some();
        if !is_known {
            found.extend(list::config_map(client, namespace, &reference.name).await?);
        }
    }
    given.config_maps.extend(found);
    Ok(())
}

/// The name of `mdep/NAME`, `modeldeployment/NAME` or `NAME`.
///
/// # Errors
/// When another kind is named.
pub fn bare_name(target: &str) -> Result<&str> {
    match target.split_once('/') {
        None => Ok(target),
        Some((kind, name)) => match kind.split('.').next().unwrap_or_default() {
            "mdep" | "modeldeployment" | "modeldeployments" => Ok(name),
            _ => bail!("{target}: give mdep/NAME or NAME"),
        },
    }
}
