//! Planning and placement on GPU nodes: what fits, where, and for every other node why not.

use crate::common::*;
use proptest::prelude::*;
use serde_json::json;

/// kube-scheduler adds at most 100 points for each scorer that likes emptier nodes. A preference counts double, so the first
/// leads by 100.
#[test]
fn of_sixteen_offered_nodes_the_first_four_are_preferred_by_halving_weights() {
    let nodes = (0..20).map(|number| h200x8(&format!("h200-{number:02}")));
    let plan = story(r1(json!({"replicas": 1}))).on(nodes).plan();
    let mut pods = plan.actions.iter().filter_map(|action| match action {
        operator_core::Action::Create(operator_core::Object::Pod(pod)) => Some(pod),
        _ => None,
    });
    let pod = pods.next().unwrap();
    assert_eq!(operator_core::objects::preferred_nodes(pod).len(), 16);
    let affinity = pod.spec.as_ref().unwrap().affinity.clone().unwrap();
    let affinity = affinity.node_affinity.unwrap();
    let preferred = affinity.preferred_during_scheduling_ignored_during_execution;
    let weights: Vec<i32> = preferred.iter().flatten().map(|it| it.weight).collect();
    assert_eq!(weights, [100, 50, 25, 12]);
}

#[test]
fn r1_takes_eight_h200_and_lands_only_there() {
    let story = story(r1(json!({"replicas": 2}))).on([
        node("cpu-only", "64", "512Gi"),
        h100x8("h100-0"),
        h200x8("h200-0"),
        h200x8("h200-1"),
    ]);
    let plan = story.plan();
    let summary = plan.status.plan.clone().unwrap();
    assert_eq!((summary.gpus, summary.gpus_per_replica), (16, 8));
    assert_eq!(summary.parallelism, "TP 8, EP 8");
    assert_eq!(summary.product.as_deref(), Some("NVIDIA-H200"));
    assert_eq!(condition(&plan, "Planned").1, "FitFound");
    let story = story.after(&plan, starts);
    let mut nodes: Vec<_> = story
        .snapshot
        .pods
        .iter()
        .filter_map(|pod| pod.node.clone())
        .collect();
    nodes.sort();
    assert_eq!(nodes, ["h200-0", "h200-1"]);
    insta::assert_snapshot!("r1_on_h200", plan.to_string());
}

#[test]
fn what_cannot_fit_says_why_for_each_group_of_nodes() {
    let tainted = with(
        h200x8("sick"),
        json!({"spec": {"taints": [
        {"key": "nvidia.com/gpu-xid-error", "value": "true", "effect": "NoSchedule"}]}}),
    );
    let cordoned = with(
        h200x8("cordoned"),
        json!({"spec": {"unschedulable": true, "taints": []}}),
    );
    let silent = with(
        h200x8("silent"),
        json!({"status": {"conditions": [
        {"type": "Ready", "status": "Unknown"}]}}),
    );
    let story = story(r1(json!({"replicas": 1})))
        .on([
            h100x8("h100-0"),
            h100x8("h100-1"),
            h100x8("h100-2"),
            node("cpu-only", "64", "512Gi"),
            tainted,
            cordoned,
            silent,
            h200x8("busy"),
            gpu_node("old", "Tesla-V100-SXM2-32GB", 32_510, 8),
        ])
        .taken("busy", 3);
    let old = with(
        gpu_node("old", "Tesla-V100-SXM2-32GB", 32_510, 8),
        json!({"metadata": {"labels": {
        "nvidia.com/gpu.compute.major": "7"}}}),
    );
    let plan = story.on([old]).plan();
    assert!(pod_actions(&plan).is_empty());
    let (status, reason, message) = condition(&plan, "Planned");
    assert_eq!((status.as_str(), reason.as_str()), ("False", "NoNodeFits"));
    assert_eq!(plan.status.phase.unwrap().as_str(), "Pending");
    assert!(
        plan.events
            .iter()
            .any(|e| e.reason == "NoNodeFits" && e.note.len() <= 1000)
    );
    insta::assert_snapshot!("why_not", message.replace(". ", ".\n").replace("; ", ";\n"));
}

#[test]
fn a_model_that_fits_no_kind_says_what_would_do() {
    let plan = story(r1(json!({"replicas": 1})))
        .on([h100x8("h100-0")])
        .plan();
    let (_, reason, message) = condition(&plan, "Planned");
    assert_eq!(reason, "MemoryDoesNotFit");
    assert!(
        message.contains("1 node with 8 x NVIDIA-H100-80GB-HBM3: with 8 of them it needs"),
        "{message}"
    );
    assert_eq!(plan.status.phase.unwrap().as_str(), "Failed");
}

/// The published configs, as far as they differ from the families' defaults.
const QWEN3_30B_A3B: &str = r#"{"model_type":"qwen3_moe","num_hidden_layers":48,"head_dim":128,
    "max_position_embeddings":40960,"rope_theta":1000000,"norm_topk_prob":true}"#;
const QWEN2_7B: &str = r#"{"model_type":"qwen2","vocab_size":152064,"hidden_size":3584,"intermediate_size":18944,
    "num_hidden_layers":28,"num_attention_heads":28,"num_key_value_heads":4,"rope_theta":1000000.0}"#;

#[test]
fn a_model_with_grouped_attention_takes_as_many_gpus_as_divide_it() {
    let a100 = || gpu_node("a100-0", "NVIDIA-A100-SXM4-40GB", 40_960, 8);
    let plan = story(r1(json!({"replicas": 1})))
        .of_config(QWEN3_30B_A3B)
        .on([a100()])
        .plan();
    let summary = plan.status.plan.unwrap();
    assert_eq!(summary.parallelism, "TP 2, EP 2");
    assert_eq!(summary.gpus_per_replica, 2);
    let plan = story(r1(json!({"replicas": 1})))
        .of_config(QWEN2_7B)
        .on([gpu_node("small-0", "NVIDIA-A2", 4096, 8)])
        .plan();
    let (_, reason, message) = condition(&plan, "Planned");
    assert_eq!(reason, "MemoryDoesNotFit");
    // Eight do not divide 28 heads, which is no reason to hide what four lack.
    assert!(message.contains("with 4 of them it needs"), "{message}");
}

#[test]
fn fp8_matrices_are_shared_by_as_many_as_have_whole_blocks() {
    let nodes = ["a", "b", "c", "d"].map(h100x8);
    let plan = story(r1(json!({"parallelism": {"tensor": 32}})))
        .on(nodes)
        .plan();
    let (_, reason, message) = condition(&plan, "Planned");
    assert_eq!(reason, "MemoryDoesNotFit");
    // The shared expert of DeepSeek-V3 has 2048 rows, 16 blocks.
    let why =
        "tensor = 32: leaves a rank less than a block of 128 of the shared experts' 2048 rows";
    assert!(message.contains(why), "{message}");
}

#[test]
fn without_gpu_labels_the_way_out_is_named() {
    let plan = story(r1(json!({"replicas": 1})))
        .on([node("a", "8", "16Gi")])
        .plan();
    let (_, reason, message) = condition(&plan, "Planned");
    assert_eq!(reason, "NoNodeFits");
    assert!(
        message.contains("gpu-feature-discovery") && message.contains("nvidia.com/gpu.memory"),
        "{message}"
    );
}

#[test]
fn a_fleet_that_has_room_for_some_is_degraded_and_says_what_it_waits_for() {
    let story =
        story(r1(json!({"replicas": 3}))).on([h200x8("a"), h200x8("b"), node("c", "8", "16Gi")]);
    let plan = story.plan();
    assert_eq!(
        pod_actions(&plan),
        ["create Pod r1-0-0", "create Pod r1-1-0"]
    );
    let plan = story.after(&plan, answers).plan();
    assert!(plan.actions.is_empty(), "{plan}");
    assert_eq!(plan.status.ready.as_deref(), Some("2/3"));
    assert_eq!(plan.status.phase.unwrap().as_str(), "Degraded");
    for kind in ["Planned", "Progressing", "Ready"] {
        assert_eq!(condition(&plan, kind).1, "NoNodeFits", "{kind}");
    }
    let message = plan.status.message.unwrap();
    assert!(
        message
            .starts_with("1 of 3 replicas have no place. 2 nodes: GPUs are taken: needs 8, 0 free"),
        "{message}"
    );
}

#[test]
fn products_are_preferred_in_the_order_given() {
    let big = || gpu_node("b200-0", "NVIDIA-B200", 183_359, 8);
    let product = |spec| {
        let plan = story(r1(spec)).on([h200x8("h200-0"), big()]).plan();
        plan.status.plan.unwrap().product.unwrap()
    };
    assert_eq!(
        product(json!({"accelerator": {"products": ["NVIDIA-B200", "NVIDIA-H200"]}})),
        "NVIDIA-B200"
    );
    assert_eq!(
        product(json!({"accelerator": {"products": ["NVIDIA-H200", "NVIDIA-B200"]}})),
        "NVIDIA-H200"
    );
    assert_eq!(
        product(json!({"accelerator": {"minMemory": "150Gi"}})),
        "NVIDIA-B200"
    );
}

#[test]
fn nodes_that_come_and_go_do_not_change_what_runs() {
    let story = story(r1(
        json!({"replicas": 1, "accelerator": {"products": ["NVIDIA-B200", "NVIDIA-H200"]}}),
    ))
    .on([h200x8("h200-0")])
    .running();
    let revision = story.plan().status.revision;
    let story = story.on([gpu_node("b200-0", "NVIDIA-B200", 183_359, 8)]);
    let plan = story.plan();
    assert!(plan.actions.is_empty(), "{plan}");
    assert_eq!(plan.status.revision, revision);
}

#[test]
fn small_models_are_packed_so_that_whole_nodes_stay_free() {
    let spec = json!({
        "accelerator": {"type": "nvidia"}, "replicas": 3,
        "model": {"source": "file:///models/small"},
    });
    let story = story(deployment("m", spec))
        .on([h100x8("a"), h100x8("b")])
        .taken("b", 5)
        .inspected();
    let plan = story.plan();
    let story = story.after(&plan, starts);
    let nodes: Vec<_> = story
        .snapshot
        .pods
        .iter()
        .filter_map(|pod| pod.node.clone())
        .collect();
    assert_eq!(nodes, ["b", "b", "b"]);
    assert_eq!(plan.status.plan.unwrap().gpus, 3);
}

#[test]
fn replicas_are_spread_over_zones_when_asked() {
    let zoned = |name: &str, zone: &str| {
        with(
            h200x8(name),
            json!({"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}}),
        )
    };
    let spec = json!({"replicas": 3, "placement": {"topology": {"spreadBy": "topology.kubernetes.io/zone"}}});
    let story = story(r1(spec)).on([
        zoned("a1", "a"),
        zoned("a2", "a"),
        zoned("b1", "b"),
        zoned("c1", "c"),
    ]);
    let story = story.after(&story.plan(), starts);
    let nodes: Vec<_> = story
        .snapshot
        .pods
        .iter()
        .filter_map(|pod| pod.node.clone())
        .collect();
    assert_eq!(nodes, ["a1", "b1", "c1"]);
}

#[test]
fn objects_are_as_agreed() {
    let plan = story(r1(
        json!({"replicas": 1, "placement": {"priorityClassName": "high"},
        "podTemplate": {"env": [{"name": "RUST_LOG", "value": "debug"}], "labels": {"team": "a"}}}),
    ))
    .on([h200x8("h200-0"), h200x8("h200-1")])
    .plan();
    let mut objects = String::new();
    for action in &plan.actions {
        let (operator_core::Action::Create(object) | operator_core::Action::Apply(object)) = action
        else {
            panic!("{action}")
        };
        let text = match object {
            operator_core::Object::Pod(object) => serde_yaml::to_string(object),
            operator_core::Object::ConfigMap(object) => serde_yaml::to_string(object),
            operator_core::Object::Service(object) => serde_yaml::to_string(object),
            operator_core::Object::PodDisruptionBudget(object) => serde_yaml::to_string(object),
            operator_core::Object::ResourceClaimTemplate(object) => serde_yaml::to_string(object),
            operator_core::Object::NetworkPolicy(object) => serde_yaml::to_string(object),
        };
        objects.push_str(&format!("# {action}\n{}", text.unwrap()));
    }
    insta::assert_snapshot!("objects", objects);
}

#[test]
fn a_claim_is_mounted_and_the_engine_is_told_the_path_in_the_pod() {
    let spec = json!({"model": {"source": "pvc://weights/r1/v2"}});
    let plan = story(deployment("m", spec))
        .on([node("a", "8", "16Gi")])
        .inspected()
        .plan();
    let text = format!("{:?}", plan.actions);
    assert!(
        text.contains("file:///models/pvc/r1/v2"),
        "the engine's configuration"
    );
    assert!(text.contains(r#"claim_name: "weights", read_only: Some(true)"#));
    assert!(text.contains(r#"mount_path: "/models/pvc""#));
}

#[test]
fn secrets_become_optional_environment_of_known_keys_only() {
    let spec = json!({"model": {"source": "hf://org/name", "secretRef": {"name": "token"}}});
    let plan = story(deployment("m", spec))
        .on([node("a", "8", "16Gi")])
        .plan();
    let text = format!("{:?}", plan.actions);
    for key in ["HF_TOKEN", "HF_ENDPOINT", "AWS_SECRET_ACCESS_KEY"] {
        assert!(
            text.contains(&format!(
                r#"key: "{key}", name: "token", optional: Some(true)"#
            )),
            "{key}: {text}"
        );
    }
    assert!(!text.contains("env_from: Some"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever nodes there are and whatever runs on them: the plan keeps every rule (checked in
    /// `plan()`), and each replica that is wanted is either created or told of.
    #[test]
    fn every_wanted_replica_has_a_place_or_a_reason(
        replicas in 0..12i32,
        nodes in prop::collection::vec((0..4usize, 0..9u64), 0..12),
        tensor in prop::option::of(prop::sample::select(vec![1, 2, 4, 8])),
    ) {
        let spec = json!({
            "accelerator": {"type": "nvidia"}, "replicas": replicas,
            "model": {"source": "file:///models/small"},
            "parallelism": tensor.filter(|t| *t <= 4).map(|t| json!({"tensor": t})),
        });
        let mut story = story(deployment("m", spec)).inspected();
        for (index, (kind, taken)) in nodes.iter().enumerate() {
            let name = format!("node-{index}");
            let node = match kind {
                0 => node(&name, "16", "64Gi"),
                1 => h100x8(&name),
                2 => gpu_node(&name, "NVIDIA-L4", 23_034, 1),
                _ => with(h200x8(&name), json!({"spec": {"unschedulable": true}})),
            };
            story = story.on([node]).taken(&name, *taken);
        }
        let plan = story.plan();
        let created = i32::try_from(pod_actions(&plan).len()).unwrap();
        let (status, _, message) = condition(&plan, "Planned");
        prop_assert!(created <= replicas);
        if created < replicas {
            prop_assert_eq!(status, "False");
            prop_assert!(!message.is_empty());
        } else if replicas > 0 {
            prop_assert_eq!(status, "True");
        }
    }
}
