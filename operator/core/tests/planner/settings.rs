//! What becomes of `spec.speculation` and `spec.context.kvCacheDtype` on their way to the engine.

use crate::common::*;
use operator_core::{Action, Object, Plan, names};
use serde_json::{Value, json};

const LLAMA: &str = r#"{"model_type":"llama","vocab_size":512,"hidden_size":64,"intermediate_size":128,
    "num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":4,"max_position_embeddings":1024}"#;

/// What the plan tells the engine, and the revision of its pods.
fn told(plan: &Plan) -> (Value, String) {
    let mut objects = plan.actions.iter().filter_map(|action| match action {
        Action::Apply(object) | Action::Create(object) => Some(object),
        _ => None,
    });
    let engine = objects.clone().find_map(|object| match object {
        Object::ConfigMap(map) => map.data.as_ref()?.get(names::ENGINE_JSON).cloned(),
        _ => None,
    });
    let revision = objects.find_map(|object| match object {
        Object::Pod(pod) => pod.metadata.labels.as_ref()?.get(names::REVISION).cloned(),
        _ => None,
    });
    let engine = serde_json::from_str(&engine.expect("a config of the engine"));
    (engine.expect("JSON"), revision.expect("a pod"))
}

fn planned(spec: Value) -> Plan {
    story(deployment("m", spec))
        .on([node("a", "8", "16Gi")])
        .inspected()
        .plan()
}

#[test]
fn drafts_are_asked_for_planned_and_a_revision_of_their_own() {
    let (without, plain) = told(&planned(json!({})));
    let (with, drafting) = told(&planned(json!({"speculation": {"draftTokens": 2}})));
    assert_eq!(with["numSpeculativeTokens"], 2);
    assert_ne!(plain, drafting);
    // The prediction layer's weights and cache are counted.
    let bytes = |engine: &Value| engine["plannedBytes"].as_u64().expect("planned");
    assert!(bytes(&with) > bytes(&without));
    // Zero is what nobody asked for.
    let (zero, same) = told(&planned(json!({"speculation": {"draftTokens": 0}})));
    assert_eq!((zero, same), (without, plain));
}

#[test]
fn drafts_of_a_family_without_a_prediction_layer_are_refused_by_the_name_of_the_field() {
    let spec = json!({"model": {"configMapRef": {"name": "c"}}, "speculation": {"draftTokens": 1}});
    let plan = story(deployment("m", spec))
        .on([node("a", "8", "16Gi")])
        .of_config(LLAMA)
        .plan();
    let (status, reason, message) = condition(&plan, "Planned");
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("False", "NotServedYet")
    );
    assert!(
        message.contains("spec.speculation.draftTokens = 1"),
        "{message}"
    );
    assert!(pod_actions(&plan).is_empty());
}

#[test]
fn a_cache_in_eight_bits_is_planned_smaller_and_a_revision_of_its_own() {
    let planned = |context| {
        let deployment = r1(json!({"context": context}));
        told(&story(deployment).on([h200x8("a"), h200x8("b")]).plan())
    };
    let (plain, revision) = planned(json!({}));
    let (small, other) = planned(json!({"kvCacheDtype": "fp8"}));
    assert_eq!(small["kvCacheDtype"], "fp8");
    assert_ne!(revision, other);
    // 656 bytes a token and layer in place of 1152, for 16 sequences of 16384 tokens in 61 layers.
    let bytes = |engine: &Value| engine["plannedBytes"].as_u64().expect("planned");
    let saved = (1152 - 656) * 61 * 16 * 16_384;
    assert_eq!(bytes(&plain) - bytes(&small), saved);
    assert_eq!(planned(json!({"kvCacheDtype": "auto"})), (plain, revision));
}

#[test]
fn a_cache_in_eight_bits_of_a_model_without_latents_is_refused_by_the_name_of_the_field() {
    let spec = json!({
        "model": {"configMapRef": {"name": "c"}},
        "accelerator": {"type": "nvidia"},
        "context": {"kvCacheDtype": "fp8"},
    });
    let plan = story(deployment("m", spec))
        .on([h200x8("a")])
        .of_config(LLAMA)
        .plan();
    let (status, reason, message) = condition(&plan, "Planned");
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("False", "MemoryDoesNotFit")
    );
    assert!(message.contains("kvCacheDtype = fp8"), "{message}");
    assert!(pod_actions(&plan).is_empty());
}
