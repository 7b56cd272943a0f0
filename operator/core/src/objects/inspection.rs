//! The pod that reads a model's config and headers. It has the source, the secrets and the security of an engine
//! pod, and needs no device.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::pod::{
    common_mounts, common_volumes, container, node_selector, pod_spec, tolerations, words,
};
use crate::names;
use crate::plan::Settings;
use crate::resources::NVIDIA_GPU;
use crate::validate::ValidDeployment;

/// A pod that reads a model's config and headers and says what it found.
pub fn inspect_pod(valid: &ValidDeployment, settings: &Settings, hash: &str, attempt: u32) -> Pod {
    let name = names::inspect_pod(&valid.name, hash, attempt);
    let mut metadata = super::metadata(valid, name, names::INSPECT);
    metadata.annotations = Some(BTreeMap::from([
        (names::ATTEMPT.to_owned(), attempt.to_string()),
        (
            names::INSPECT_INPUTS.to_owned(),
            inspect_inputs(valid, settings),
        ),
    ]));
    Pod {
        metadata,
        spec: Some(inspect_spec(valid, settings)),
        status: None,
    }
}

/// Hash of all that an inspection depends on; a failed one is tried again at once when it changes.
pub fn inspect_inputs(valid: &ValidDeployment, settings: &Settings) -> String {
    names::short_hash(&super::spelled(&inspect_spec(valid, settings)))
}

fn inspect_spec(valid: &ValidDeployment, settings: &Settings) -> PodSpec {
    let uri = valid.source.engine_uri();
    let mut command = vec!["/engine", "inspect", "--model", &uri];
    if let Some(revision) = &valid.model_revision {
        command.extend(["--revision", revision]);
    }
    command.extend(["--output", "/dev/termination-log"]);
    let amount = |cpu: &str, memory: &str| {
        Some(BTreeMap::from([
            ("cpu".to_owned(), Quantity(cpu.into())),
            ("memory".to_owned(), Quantity(memory.into())),
        ]))
    };
    let container = Container {
        name: names::INSPECT.into(),
        command: words(&command),
        resources: Some(ResourceRequirements {
            requests: amount("50m", "64Mi"),
            limits: amount("1", "1Gi"),
            ..ResourceRequirements::default()
        }),
        volume_mounts: Some(common_mounts(valid)),
        ..container(valid, settings)
    };
    let on_gpus = valid.accelerator != crate::validate::ValidAccelerator::Cpu;
    PodSpec {
        containers: vec![container],
        volumes: Some(common_volumes(valid)),
        restart_policy: Some("Never".into()),
        active_deadline_seconds: Some(3600),
        termination_grace_period_seconds: Some(1),
        // Reading headers needs no GPU node: any node that can mount the model will do.
        node_selector: if on_gpus { None } else { node_selector(valid) },
        tolerations: if on_gpus {
            tolerations(valid, true).map(gpu_only)
        } else {
            tolerations(valid, false)
        },
        ..pod_spec(valid)
    }
}

fn gpu_only(mut tolerations: Vec<Toleration>) -> Vec<Toleration> {
    tolerations.retain(|toleration| toleration.key.as_deref() == Some(NVIDIA_GPU));
    tolerations
}
