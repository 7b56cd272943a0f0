//! What made a revision, kept beside its engine configuration, so that replicas of it can be made
//! again after the spec has moved on: for a partition, a step, a pause, or the way back.
//!
//! A record is believed only if it makes the very revision it is filed under. One that an operator
//! of another version renders differently is as good as none.

use engine_spec::{ModelFacts, Parallelism};
use operator_api::{ModelDeploymentSpec, Rollout};
use serde::{Deserialize, Serialize};

use crate::fit::{self, DeviceKind, Layout};
use crate::names;
use crate::objects;
use crate::plan::Settings;
use crate::replicas::Side;
use crate::snapshot::Snapshot;
use crate::validate::{ValidDeployment, validate};

/// Everything a revision follows from.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    spec: ModelDeploymentSpec,
    engine_image: String,
    image_pull_policy: String,
    device: DeviceKind,
    parallelism: Parallelism,
    #[serde(default = "one_pod", skip_serializing_if = "is_one_pod")]
    pods: u32,
    facts: ModelFacts,
}

fn one_pod() -> u32 {
    1
}

fn is_one_pod(pods: &u32) -> bool {
    *pods == 1
}

/// The record of the revision that `spec` makes; what does not force new pods is left out, so that
/// the text is the same as long as the revision is.
pub fn record(
    spec: &ModelDeploymentSpec,
    layout: &Layout,
    settings: &Settings,
    facts: &ModelFacts,
) -> String {
    let mut spec = spec.clone();
    spec.replicas = Some(1);
    spec.autoscaling = None;
    spec.rollout = Rollout {
        drain_timeout_seconds: spec.rollout.drain_timeout_seconds,
        ..Rollout::default()
    };
    spec.placement.binding = None;
    spec.placement.topology = None;
    spec.placement.spot = None;
    names::canonical(serde_json::json!(Record {
        spec,
        engine_image: settings.engine_image.clone(),
        image_pull_policy: settings.image_pull_policy.clone(),
        device: layout.kind.clone(),
        parallelism: layout.parallelism,
        pods: layout.pods,
        facts: facts.clone(),
    }))
}

/// The side of a revision that was recorded; none when there is no record, or it makes another one.
/// `current` is the wish as it is now: what forces no new pods is taken from it.
pub fn recorded(
    snapshot: &Snapshot,
    current: &ValidDeployment,
    settings: &Settings,
    revision: &str,
) -> Option<Side> {
    let name = format!("{}-{revision}", current.name);
    let map = snapshot.config_maps.iter().find(|map| map.name == name)?;
    let text = map.data.get(names::REVISION_JSON)?;
    let record: Record = serde_json::from_str(text).ok()?;
    let mut deployment = (*snapshot.deployment).clone();
    deployment.spec = record.spec;
    let mut valid = validate(&deployment).ok()?;
    valid.placement.binding = current.placement.binding;
    valid
        .placement
        .spread_by
        .clone_from(&current.placement.spread_by);
    valid
        .placement
        .keep_within
        .clone_from(&current.placement.keep_within);
    valid.placement.on_demand_min = current.placement.on_demand_min;
    let settings = Settings {
        engine_image: record.engine_image,
        image_pull_policy: record.image_pull_policy,
        // Users may write config maps, and must not name directories of nodes.
        node_cache: settings.node_cache.clone(),
        network_policies: settings.network_policies,
    };
    let layout = fit::layout_on(&valid, &record.facts, record.device, record.parallelism)
        .ok()?
        .over(record.pods);
    let made = objects::revision(&valid, &layout, &settings);
    (made.as_str() == revision).then_some(Side {
        valid,
        layout,
        revision: made,
        settings,
        wanted: 0,
        holders: Vec::new(),
    })
}
