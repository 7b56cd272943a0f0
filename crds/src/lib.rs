//! What is generated from the types of `operator-api`: the CRD in two places and its reference page.
//!
//! All three are committed; the test in `tests/fresh.rs` generates them again and compares.

mod reference;

use anyhow::Context;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;

/// A file that is generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// Path from the repository's root.
    pub path: &'static str,
    /// Content.
    pub text: String,
}

const HEADER: &str = "# Generated from operator/api by `cargo run -p crds`; do not edit.\n";

/// Every generated file.
///
/// # Errors
/// When the definition cannot be written as YAML, which a test would have shown.
pub fn files() -> anyhow::Result<Vec<Generated>> {
    let crd = operator_api::crd();
    let mut kept = crd.clone();
    // helm uninstall would otherwise delete every ModelDeployment of the cluster with the CRD.
    kept.metadata
        .annotations
        .get_or_insert_default()
        .insert("helm.sh/resource-policy".into(), "keep".into());
    Ok(vec![
        Generated {
            path: "crds/modeldeployments.cachalot.dev.yaml",
            text: yaml(&crd)?,
        },
        Generated {
            path: "charts/cachalot-crds/templates/modeldeployments.cachalot.dev.yaml",
            text: yaml(&kept)?,
        },
        Generated {
            path: "docs/reference/modeldeployment.md",
            text: reference::page(&crd)?,
        },
    ])
}

fn yaml(crd: &CustomResourceDefinition) -> anyhow::Result<String> {
    let value = serde_json::to_value(crd).context("failed to serialise the definition")?;
    let text = serde_yaml::to_string(&value).context("failed to write the definition as YAML")?;
    Ok(format!("{HEADER}{text}"))
}
