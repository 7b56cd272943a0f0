//! The examples of the guide are valid and do what their comments say.

use std::sync::Arc;

use crate::common::*;
use operator_api::ModelDeployment;
use operator_core::snapshot::ConfigMapView;
use operator_core::{Controller, names, validate};
use serde::Deserialize;
use serde_json::{Value, json};

const QUICKSTART: &str = include_str!("../../../../docs/guide/quickstart.yaml");
const AUTOSCALING: &str = include_str!("../../../../docs/guide/autoscaling.yaml");
const GPU_FLEET: &str = include_str!("../../../../docs/guide/gpu-fleet.yaml");
const TINY_R1: &str = include_str!("../../../../e2e/models/tiny-r1/config.json");

fn documents(yaml: &str) -> Vec<Value> {
    serde_yaml::Deserializer::from_str(yaml)
        .map(|document| Value::deserialize(document).unwrap())
        .filter(|document| !document.is_null())
        .collect()
}

fn deployments(yaml: &str) -> Vec<ModelDeployment> {
    documents(yaml)
        .into_iter()
        .filter(|document| document["kind"] == "ModelDeployment")
        .map(|document| {
            let placed =
                json!({"metadata": {"namespace": "default", "uid": "mdep-uid", "generation": 1}});
            with(serde_json::from_value(document).unwrap(), placed)
        })
        .collect()
}

/// The story of a deployment whose model has this config.
fn known(deployment: ModelDeployment, config: &str) -> Story {
    let mut story = story(deployment).inspected();
    let facts = serde_json::to_string(&facts_of(config)).unwrap();
    let map = Arc::make_mut(&mut story.snapshot.config_maps[0]);
    map.data = [(names::FACTS_JSON, facts)].into();
    story
}

#[test]
fn every_example_is_valid() {
    for yaml in [QUICKSTART, AUTOSCALING, GPU_FLEET] {
        let deployments = deployments(yaml);
        assert!(!deployments.is_empty());
        for deployment in deployments {
            validate(&deployment).unwrap_or_else(|violations| panic!("{violations}"));
        }
    }
}

#[test]
fn the_quick_start_fits_a_small_machine() {
    let deployment = deployments(QUICKSTART).remove(0);
    let plan = known(deployment, TINY_R1)
        .on([node("lab", "2", "3Gi")])
        .plan();
    assert_eq!(condition(&plan, "Planned").1, "FitFound");
    let bytes = plan.status.plan.unwrap().rank_bytes;
    assert!(bytes.total < 512 << 20, "{bytes:?}");
}

#[test]
fn three_replicas_and_a_surge_fit_two_cores() {
    for mut deployment in deployments(AUTOSCALING) {
        deployment.spec.autoscaling = None;
        deployment.spec.replicas = Some(4);
        let plan = known(deployment, TINY_R1)
            .on([node("lab", "2", "6Gi")])
            .plan();
        assert_eq!(condition(&plan, "Planned").1, "FitFound");
    }
}

#[test]
fn the_gpu_fleet_shows_one_that_fits_and_one_that_cannot() {
    let config = documents(GPU_FLEET)
        .into_iter()
        .find(|document| document["kind"] == "ConfigMap")
        .unwrap();
    let mut phases = Vec::new();
    for deployment in deployments(GPU_FLEET) {
        let mut story = story(deployment).on((0..4).map(|i| h200x8(&format!("simulated-{i}"))));
        story.snapshot.model_config = Some(Arc::new(ConfigMapView {
            name: "config".into(),
            uid: "u".into(),
            controller: Controller::default(),
            data: [(
                "config.json".to_owned(),
                config["data"]["config.json"].as_str().unwrap().to_owned(),
            )]
            .into(),
        }));
        let plan = story.plan();
        phases.push((
            condition(&plan, "Planned").0,
            !pod_actions(&plan).is_empty(),
        ));
    }
    assert_eq!(
        phases,
        [("True".to_owned(), true), ("False".to_owned(), false)]
    );
}
