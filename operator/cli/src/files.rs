//! Manifests and the output of `kubectl get -o json` as typed objects.
//!
//! A file holds any number of YAML or JSON documents; a document may be a `List`. What is not
//! asked for is passed over, what is asked for and does not parse is an error that names the file,
//! the object and the field.

use std::io::Read;

use anyhow::{Context, Result, anyhow, bail};
use operator_core::Inventory;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Bytes of a file that are read: 10,000 pods as `kubectl get -o json` prints them are about 100 MB.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// The text of a file, or of standard input for `-`.
///
/// # Errors
/// When it cannot be read, is too large or is not UTF-8.
pub fn text(path: &str) -> Result<String> {
    let reader: Box<dyn Read> = if path == "-" {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(std::fs::File::open(path).with_context(|| path.to_owned())?)
    };
    let mut text = String::new();
    let read = reader
        .take(FILE_BYTES_MAX)
        .read_to_string(&mut text)
        .with_context(|| path.to_owned())?;
    if read as u64 == FILE_BYTES_MAX {
        bail!("{path}: larger than {FILE_BYTES_MAX} bytes");
    }
    Ok(text)
}

/// The documents of a file, lists unfolded.
///
/// # Errors
/// When it cannot be read, or is neither JSON nor YAML.
pub fn documents(path: &str) -> Result<Vec<Value>> {
    let text = text(path)?;
    let mut documents = Vec::new();
    // JSON is YAML too, but a hundred times faster to read as what it is.
    if text.trim_start().starts_with('{') {
        let stream = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        for value in stream {
            documents.push(value.with_context(|| path.to_owned())?);
        }
    } else {
        for document in serde_yaml::Deserializer::from_str(&text) {
            documents.push(Value::deserialize(document).with_context(|| path.to_owned())?);
        }
    }
    Ok(documents.into_iter().flat_map(unfolded).collect())
}

fn unfolded(document: Value) -> Vec<Value> {
    let is_list = document["kind"]
        .as_str()
        .is_some_and(|kind| kind.ends_with("List"));
    match document {
        Value::Object(mut list) if is_list => match list.remove("items") {
            Some(Value::Array(items)) => items,
            _ => Vec::new(),
        },
        Value::Null => Vec::new(),
        document => vec![document],
    }
}

/// Adds the objects of `paths` to an inventory. Objects without a namespace are of `namespace`.
///
/// # Errors
/// When a file cannot be read, or an object of a kind that is used does not parse.
pub fn add(inventory: &mut Inventory, paths: &[String], namespace: &str) -> Result<()> {
    for path in paths {
        for (index, mut document) in documents(path)?.into_iter().enumerate() {
            let kind = document["kind"].as_str().unwrap_or_default().to_owned();
            if kind.is_empty() {
                bail!("{path}: document {} has no kind", index + 1);
            }
            let metadata = &mut document["metadata"];
            if !["Node", "ResourceSlice", "PriorityClass"].contains(&kind.as_str())
                && metadata.is_object()
                && metadata["namespace"].is_null()
            {
                metadata["namespace"] = namespace.into();
            }
            match kind.as_str() {
                "Node" => inventory.nodes.push(typed(path, &kind, document)?),
                "Pod" => inventory.pods.push(typed(path, &kind, document)?),
                "ConfigMap" => inventory.config_maps.push(typed(path, &kind, document)?),
                "Service" => inventory.services.push(typed(path, &kind, document)?),
                "PodDisruptionBudget" => inventory.budgets.push(typed(path, &kind, document)?),
                "NetworkPolicy" => inventory
                    .network_policies
                    .push(typed(path, &kind, document)?),
                "ResourceQuota" => inventory.quotas.push(typed(path, &kind, document)?),
                "ResourceSlice" => inventory.slices.push(typed(path, &kind, document)?),
                "ResourceClaim" => inventory.claims.push(typed(path, &kind, document)?),
                "ResourceClaimTemplate" => {
                    let template = typed(path, &kind, document)?;
                    inventory.claim_templates.push(template);
                }
                "PriorityClass" => inventory
                    .priority_classes
                    .push(typed(path, &kind, document)?),
                "ModelDeployment" => inventory.deployments.push(typed(path, &kind, document)?),
                _ => {}
            }
        }
    }
    Ok(())
}

fn typed<T: DeserializeOwned>(path: &str, kind: &str, document: Value) -> Result<T> {
    let name = document["metadata"]["name"]
        .as_str()
        .unwrap_or("without a name");
    let words = format!("{path}: {kind} {name}");
    serde_json::from_value(document).map_err(|error| anyhow!("{words}: {error}"))
}
