//! GPUs by resource claims: what is published, what is held, what a replica asks for, and why not.

use crate::common::*;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::resource::v1::ResourceClaimTemplate;
use operator_core::devices::{AllocationView, SliceView, by_node};
use operator_core::{Action, Flaw, Object, Plan, check, explain, names};
use proptest::prelude::*;
use serde_json::{Value, json};

const PRODUCT: &str = "NVIDIA H200";
const MEMORY: &str = "143771Mi";

fn claimed(rest: Value) -> operator_api::ModelDeployment {
    let mut spec = json!({"replicas": 1, "accelerator": {"claim": {}}});
    merge(&mut spec, rest);
    r1(spec)
}

/// Nodes that say nothing of GPUs in labels or resources.
fn bare(name: &str) -> k8s_openapi::api::core::v1::Node {
    node(name, "128", "1024Gi")
}

fn pods(plan: &Plan) -> Vec<&Pod> {
    let pods = plan.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => Some(&**pod),
        _ => None,
    });
    pods.collect()
}

fn templates(plan: &Plan) -> Vec<&ResourceClaimTemplate> {
    let templates = plan.actions.iter().filter_map(|action| match action {
        Action::Apply(Object::ResourceClaimTemplate(template)) => Some(&**template),
        _ => None,
    });
    templates.collect()
}

fn no_place(story: &Story) -> String {
    let plan = story.plan();
    assert!(pods(&plan).is_empty(), "{plan}");
    let (status, reason, message) = condition(&plan, "Planned");
    assert_eq!((status.as_str(), reason.as_str()), ("False", "NoNodeFits"));
    message
}

#[test]
fn a_replica_asks_for_its_gpus_by_a_claim_of_its_own() {
    let story = story(claimed(json!({"replicas": 2})))
        .on([bare("a"), bare("b")])
        .publishing(["a", "b"].map(|node| slice(node, PRODUCT, MEMORY, 8)), []);
    let plan = story.plan();
    assert_eq!(pods(&plan).len(), 2);
    let [template] = templates(&plan)[..] else {
        panic!("{plan}");
    };
    let value = serde_json::to_value(template).unwrap();
    let request = &value["spec"]["spec"]["devices"]["requests"][0]["exactly"];
    assert_eq!(request["deviceClassName"], "gpu.nvidia.com");
    assert_eq!(request["count"], 8);
    let cel = request["selectors"][0]["cel"]["expression"]
        .as_str()
        .unwrap();
    assert!(cel.contains("productName == 'NVIDIA H200'"), "{cel}");
    assert!(
        cel.contains(&format!("quantity('{}')", 143_771u64 << 20)),
        "{cel}"
    );
    // Claims carry our labels, so that they are told from claims of others.
    assert_eq!(
        value["spec"]["metadata"]["labels"]["app.kubernetes.io/managed-by"],
        "cachalot"
    );
    for pod in pods(&plan) {
        let spec = serde_json::to_value(pod.spec.as_ref().unwrap()).unwrap();
        assert_eq!(
            spec["resourceClaims"],
            json!([{"name": "cachalot-gpus-8", "resourceClaimTemplateName": template.metadata.name}])
        );
        let resources = &spec["containers"][0]["resources"];
        assert_eq!(resources["claims"], json!([{"name": "cachalot-gpus-8"}]));
        assert!(resources["limits"]["nvidia.com/gpu"].is_null());
    }
    let summary = plan.status.plan.clone().unwrap();
    assert_eq!((summary.gpus, summary.gpus_per_replica), (16, 8));
    assert_eq!(summary.product.as_deref(), Some(PRODUCT));
    // Both nodes are full, and nothing is left to do.
    let story = story.running();
    let story = story.edited(json!({"replicas": 3}));
    let message = condition(&story.plan(), "Planned").2;
    assert!(
        message.contains("2 nodes: GPUs of gpu.nvidia.com is taken: needs 8, 0 free"),
        "{message}"
    );
}

#[test]
fn products_are_named_as_labels_name_them() {
    let of = |product: &str| {
        let spec = json!({"accelerator": {"products": [product]}});
        let story = story(claimed(spec)).on([bare("a")]);
        story
            .publishing([slice("a", PRODUCT, MEMORY, 8)], [])
            .plan()
    };
    assert_eq!(pods(&of("NVIDIA-H200")).len(), 1);
    assert_eq!(pods(&of("NVIDIA-B200")).len(), 0);
}

#[test]
fn a_claim_for_administration_takes_nothing() {
    let claim = held("a", &["gpu-0"]);
    assert!(AllocationView::of(&claim).is_some());
    let mut watches = serde_json::to_value(claim).unwrap();
    watches["status"]["allocation"]["devices"]["results"][0]["adminAccess"] = json!(true);
    let watches = serde_json::from_value(watches).unwrap();
    assert_eq!(AllocationView::of(&watches), None);
}

#[test]
fn what_claims_of_others_hold_is_taken() {
    let with_held = |devices: &[&str]| {
        let story = story(claimed(json!({}))).on([bare("a")]);
        story.publishing([slice("a", PRODUCT, MEMORY, 8)], [held("a", devices)])
    };
    assert_eq!(pods(&with_held(&[]).plan()).len(), 1);
    let message = no_place(&with_held(&["gpu-3"]));
    assert!(message.contains("is taken: needs 8, 7 free"), "{message}");
    // A part that someone holds is a whole GPU less.
    let message = no_place(&with_held(&["gpu-3-mig-1g18gb-14-0"]));
    assert!(message.contains("is taken: needs 8, 7 free"), "{message}");
    let story = with_held(&["gpu-3"]);
    let groups = explain(&story.snapshot, &settings(), &story.plan()).nodes;
    assert_eq!(
        groups[0].remedy.as_deref(),
        Some("free 1 more of GPUs of gpu.nvidia.com on one of them")
    );
}

#[test]
fn only_whole_healthy_gpus_of_complete_pools_are_counted() {
    let of = |change: Value| {
        let slice = with(slice("a", PRODUCT, MEMORY, 2), json!({"spec": change}));
        let view = SliceView::of(&slice);
        let nodes = by_node(&view, &[] as &[AllocationView]);
        nodes.get("a").map(|devices| devices.total)
    };
    let device = |change: Value| {
        let whole = serde_json::to_value(slice("a", PRODUCT, MEMORY, 1)).unwrap();
        let mut device = whole["spec"]["devices"][0].clone();
        merge(&mut device, change);
        of(json!({"devices": [device]}))
    };
    assert_eq!(of(json!({})), Some(2));
    assert_eq!(of(json!({"driver": "other.example"})), None);
    assert_eq!(of(json!({"nodeName": null, "allNodes": true})), None);
    let incomplete = json!({"pool": {"name": "a", "generation": 1, "resourceSliceCount": 2}});
    assert_eq!(of(incomplete), None);
    assert_eq!(device(json!({})), Some(1));
    assert_eq!(
        device(json!({"attributes": {"type": {"string": "mig"}}})),
        None
    );
    let old = json!({"attributes": {"cudaComputeCapability": {"version": "7.5.0"}}});
    assert_eq!(device(old), None);
    let odd = json!({"attributes": {"productName": {"string": "x' || true || 'y"}}});
    assert_eq!(device(odd), None, "it would end up in an expression");
    let sick = json!({"taints": [{"key": "gpu.nvidia.com/xid", "effect": "NoSchedule"}]});
    assert_eq!(device(sick), None);
    assert_eq!(device(json!({"capacity": null})), None);
}

#[test]
fn an_older_generation_of_a_pool_does_not_count() {
    let generation = |number: i64, gpus: u64| {
        let pool =
            json!({"spec": {"pool": {"name": "a", "generation": number, "resourceSliceCount": 1}}});
        SliceView::of(&with(slice("a", PRODUCT, MEMORY, gpus), pool)).unwrap()
    };
    let nodes = by_node(
        &[generation(1, 8), generation(2, 7)],
        &[] as &[AllocationView],
    );
    assert_eq!(nodes["a"].total, 7);
}

#[test]
fn without_news_of_claims_the_way_out_is_named_and_others_go_on() {
    let story = story(claimed(json!({}))).on([h200x8("a")]);
    let message = no_place(&story);
    assert!(
        message.contains("set resourceClaims.enabled of the chart (--resource-claims)"),
        "{message}"
    );
    let message = no_place(&story.clone().publishing([], []));
    assert!(message.contains("is the DRA driver running?"), "{message}");
    let plain = story.edited(json!({"accelerator": {"claim": null}}));
    assert_eq!(pods(&plain.plan()).len(), 1);
}

#[test]
fn nodes_of_the_two_ways_are_told_apart() {
    let nodes = || [h200x8("plugin"), bare("driver")];
    let published = || [slice("driver", PRODUCT, MEMORY, 4)];
    let by_claim = story(claimed(json!({})))
        .on(nodes())
        .publishing(published(), []);
    let message = no_place_of(&by_claim, "MemoryDoesNotFit");
    assert!(message.contains("1 node with 4 x NVIDIA H200"), "{message}");
    let plain = story(r1(json!({"replicas": 2})))
        .on(nodes())
        .publishing(published(), []);
    let message = condition(&plain.plan(), "Planned").2;
    assert!(
        message.contains("1 node: its GPUs are given out by resource claims alone"),
        "{message}"
    );
}

fn no_place_of(story: &Story, wanted: &str) -> String {
    let (_, reason, message) = condition(&story.plan(), "Planned");
    assert_eq!(reason, wanted);
    message
}

#[test]
fn a_template_is_made_before_its_pods_kept_while_used_and_then_removed() {
    let story = story(claimed(json!({})))
        .on([bare("a"), bare("b")])
        .publishing(["a", "b"].map(|node| slice(node, PRODUCT, MEMORY, 8)), [])
        .running();
    let first = story.snapshot.claim_templates.clone();
    assert_eq!(first.len(), 1);
    // Somebody deletes it: it comes back.
    let mut bereft = story.clone();
    bereft.snapshot.claim_templates.clear();
    assert_eq!(templates(&bereft.plan()).len(), 1);
    // Another revision: the old template goes with its last pod.
    let story = story.edited(json!({"context": {"maxTokens": 8192}}));
    let plan = story.plan();
    assert_eq!(templates(&plan).len(), 1);
    assert!(
        !plan.to_string().contains("delete ResourceClaimTemplate"),
        "{plan}"
    );
    // Nothing is done while the old replica finishes its requests; then it leaves.
    let story = story.running().later(3600).running();
    assert_eq!(story.snapshot.claim_templates.len(), 1);
    assert_ne!(story.snapshot.claim_templates[0].name, first[0].name);
}

#[test]
fn the_checker_refuses_a_pod_whose_claim_has_no_template() {
    let story = story(claimed(json!({})))
        .on([bare("a")])
        .publishing([slice("a", PRODUCT, MEMORY, 8)], []);
    let mut plan = story.plan();
    plan.actions
        .retain(|action| !matches!(action, Action::Apply(Object::ResourceClaimTemplate(_))));
    let flaws = check(&plan, &story.snapshot, &story.settings);
    assert!(
        matches!(flaws.as_slice(), [Flaw::NoTemplate(pod)] if pod.starts_with("r1-0-")),
        "{flaws:?}"
    );
}

#[test]
fn the_kind_of_gpu_is_part_of_the_revision() {
    let revision = |product: &str| {
        let story = story(claimed(json!({}))).on([bare("a")]);
        let story = story.publishing([slice("a", product, MEMORY, 8)], []);
        story.plan().status.revision.unwrap()
    };
    // The template of a revision names the kind and cannot be changed.
    assert_ne!(revision("NVIDIA H200"), revision("NVIDIA H200 NVL"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Counted here anew, from what is published and held alone.
    #[test]
    fn no_node_gives_more_gpus_than_it_publishes(
        nodes in prop::collection::vec((0..9u64, 0..4u64), 1..5),
        replicas in 0..12i32,
        tensor in prop::sample::select(vec![1u64, 2, 4]),
    ) {
        let spec = json!({
            "replicas": replicas, "accelerator": {"type": "nvidia", "claim": {}},
            "parallelism": {"tensor": tensor},
        });
        let mut story = story(deployment("m", spec)).inspected();
        let mut left = std::collections::BTreeMap::new();
        for (index, (gpus, taken)) in nodes.iter().enumerate() {
            let name = format!("n{index}");
            let names: Vec<String> = (0..*taken).map(|gpu| format!("gpu-{gpu}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            story = story.on([bare(&name)]).publishing(
                [slice(&name, PRODUCT, MEMORY, *gpus)],
                [held(&name, &names)],
            );
            left.insert(name, gpus.saturating_sub(*taken));
        }
        let plan = story.plan();
        for pod in pods(&plan) {
            let node = operator_core::objects::preferred_nodes(pod).remove(0);
            let left = left.get_mut(&node).unwrap();
            // Where no node has enough, several share a replica.
            let annotations = pod.metadata.annotations.as_ref().unwrap();
            let ranks = annotations.get(names::RANKS).map_or(1, |ranks| ranks.parse().unwrap());
            let gpus = tensor / ranks;
            prop_assert!(*left >= gpus, "{plan}");
            *left -= gpus;
        }
        let rank = |pod: &&Pod| pod.metadata.labels.as_ref().unwrap().get(names::RANK).cloned();
        let leaders = pods(&plan).into_iter().filter(|pod| rank(pod).is_none_or(|rank| rank == "0"));
        let made = leaders.count();
        let more_fit = left.values().any(|left| *left >= tensor);
        prop_assert!(made == usize::try_from(replicas).unwrap() || !more_fit, "{plan}");
    }
}
