//! Parts of GPUs: who gets one, how it is counted, and why not.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::common::*;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use operator_core::quota::{QuotaLimit, QuotaView};
use operator_core::{Action, Object, Plan, explain};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Memory of the profiles of an H200 by their labels, in MiB.
const SMALL: (&str, u64) = ("1g.18gb", 16_384);
const HALF: (&str, u64) = ("3g.71gb", 71_424);

/// The published config, as far as it differs from the family's defaults: 15 GB of weights.
const QWEN2_7B: &str = r#"{"model_type":"qwen2","vocab_size":152064,"hidden_size":3584,"intermediate_size":18944,
    "num_hidden_layers":28,"num_attention_heads":28,"num_key_value_heads":4,"rope_theta":1000000.0}"#;

fn qwen(accelerator: Value, rest: Value) -> Story {
    let mut spec = json!({"replicas": 1, "accelerator": accelerator});
    merge(&mut spec, rest);
    story(r1(spec)).of_config(QWEN2_7B)
}

fn pods(plan: &Plan) -> Vec<&Pod> {
    let pods = plan.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => Some(&**pod),
        _ => None,
    });
    pods.collect()
}

/// Accelerators that a pod asks for, by resource.
fn asked(pod: &Pod) -> BTreeMap<String, String> {
    let container = &pod.spec.as_ref().unwrap().containers[0];
    let resources = container.resources.as_ref().unwrap();
    let of = |list: &Option<BTreeMap<String, Quantity>>| -> BTreeMap<String, String> {
        let list = list.clone().unwrap().into_iter();
        let ours = list.filter(|(key, _)| key.contains('/'));
        ours.map(|(key, quantity)| (key, quantity.0)).collect()
    };
    assert_eq!(of(&resources.requests), of(&resources.limits));
    of(&resources.requests)
}

fn asked_once(plan: &Plan) -> Vec<(String, String)> {
    let pods = pods(plan);
    assert_eq!(pods.len(), 1, "{plan}");
    asked(pods[0]).into_iter().collect()
}

fn no_place(story: &Story) -> String {
    let plan = story.plan();
    assert!(pods(&plan).is_empty(), "{plan}");
    let (status, _, message) = condition(&plan, "Planned");
    assert_eq!(status, "False");
    message
}

/// Reason and remedy of the only group of nodes that does not fit.
fn why(story: &Story) -> (String, String) {
    let plan = story.plan();
    let explanation = explain(&story.snapshot, &settings(), &plan);
    let mut groups = explanation.nodes.into_iter().filter(|g| g.why.is_some());
    let group = groups.next().expect("a group");
    (group.why.unwrap(), group.remedy.unwrap())
}

fn pair(key: &str, value: &str) -> Vec<(String, String)> {
    vec![(key.to_owned(), value.to_owned())]
}

#[test]
fn nobody_gets_a_part_of_a_gpu_who_did_not_ask() {
    let story = qwen(json!({}), json!({})).on([mig_single("a", HALF.0, HALF.1, 16)]);
    let message = no_place(&story);
    assert!(
        message.contains("16 x NVIDIA-H200-MIG-3g.71gb: MIG devices are used when asked for: set spec.accelerator.mig to allowed or only"),
        "{message}"
    );
    // A whole GPU is planned for; the node with the parts says what it is.
    let story = story.on([h200x8("b")]).taken("b", 8);
    assert!(no_place(&story).contains("its GPUs are divided into NVIDIA-H200-MIG-3g.71gb"));
    let spec = json!({"spec": {"accelerator": {"mig": "allowed"}}});
    let plan = story.edited(spec["spec"].clone()).plan();
    assert_eq!(asked_once(&plan), pair("nvidia.com/gpu", "1"));
}

#[test]
fn under_the_strategy_single_a_part_is_counted_as_a_gpu() {
    let story = qwen(json!({"mig": "only"}), json!({"replicas": 3}))
        .on([mig_single("a", HALF.0, HALF.1, 16), h200x8("whole")])
        .taken("a", 14);
    let plan = story.plan();
    assert_eq!(pods(&plan).len(), 2, "two are left");
    for pod in pods(&plan) {
        assert_eq!(
            asked(pod),
            pair("nvidia.com/gpu", "1").into_iter().collect()
        );
        assert_eq!(operator_core::objects::preferred_nodes(pod), ["a"]);
    }
    let summary = plan.status.plan.clone().unwrap();
    assert_eq!(summary.product.as_deref(), Some("NVIDIA-H200-MIG-3g.71gb"));
    assert_eq!((summary.gpus, summary.gpus_per_replica), (3, 1));
    let message = condition(&plan, "Planned").2;
    assert!(
        message.contains("1 of 3 replicas have no place")
            && message.contains("1 node: GPUs are taken: needs 1, 0 free"),
        "{message}"
    );
    assert!(
        message.contains("per MIG device, 1 x NVIDIA-H200-MIG-3g.71gb per replica"),
        "{message}"
    );
}

#[test]
fn under_the_strategy_mixed_a_part_is_a_resource_of_its_own() {
    let (small, half) = (SMALL, HALF);
    let node = mig_mixed("a", 4, &[(small.0, small.1, 7), (half.0, half.1, 2)]);
    let story = qwen(json!({"mig": "only"}), json!({"replicas": 3})).on([node]);
    let plan = story.plan();
    // 15 GB do not fit 16 GiB of which 95 % are used; the half is the smallest that does.
    assert_eq!(pods(&plan).len(), 2);
    for pod in pods(&plan) {
        let only = pair("nvidia.com/mig-3g.71gb", "1");
        assert_eq!(asked(pod), only.into_iter().collect());
    }
    // What others hold counts, and is told of by its name.
    let story = story.holds("a", "nvidia.com/mig-3g.71gb", 1);
    assert_eq!(pods(&story.plan()).len(), 1);
    let story = story.holds("a", "nvidia.com/mig-3g.71gb", 1);
    assert!(
        no_place(&story).contains("1 node: nvidia.com/mig-3g.71gb is taken: needs 1, 0 free"),
        "{}",
        no_place(&story)
    );
    assert_eq!(
        why(&story).1,
        "free 1 more of nvidia.com/mig-3g.71gb on one of them"
    );
    // The whole GPUs of the same node are another resource.
    let whole = story.edited(json!({"accelerator": {"mig": null}, "replicas": 1}));
    assert_eq!(asked_once(&whole.plan()), pair("nvidia.com/gpu", "1"));
}

#[test]
fn the_smallest_device_on_which_the_plan_fits_is_taken() {
    let node = || mig_mixed("a", 4, &[(SMALL.0, SMALL.1, 7), (HALF.0, HALF.1, 2)]);
    let of = |accelerator: Value| {
        let mut spec = json!({"accelerator": {"type": "nvidia"}, "replicas": 1});
        merge(&mut spec["accelerator"], accelerator);
        let story = story(deployment("m", spec)).inspected().on([node()]);
        asked_once(&story.plan())
    };
    assert_eq!(
        of(json!({"mig": "allowed"})),
        pair("nvidia.com/mig-1g.18gb", "1")
    );
    assert_eq!(
        of(json!({"mig": "allowed", "migProfiles": ["3g.71gb"]})),
        pair("nvidia.com/mig-3g.71gb", "1")
    );
    assert_eq!(
        of(json!({"mig": "allowed", "minMemory": "40Gi"})),
        pair("nvidia.com/mig-3g.71gb", "1")
    );
    assert_eq!(
        of(json!({"mig": "allowed", "minMemory": "100Gi"})),
        pair("nvidia.com/gpu", "1")
    );
    assert_eq!(of(json!({})), pair("nvidia.com/gpu", "1"));
}

#[test]
fn nothing_connects_parts_so_a_replica_has_one() {
    let parts = || mig_single("a", SMALL.0, SMALL.1, 56);
    let message = no_place(&qwen(json!({"mig": "only"}), json!({})).on([parts()]));
    assert!(
        message.contains("1 node with 56 x NVIDIA-H200-MIG-1g.18gb: one of them: it needs")
            && message.contains("nothing connects MIG devices, so more of them do not help"),
        "{message}"
    );
    let two = json!({"parallelism": {"tensor": 2}});
    let message = no_place(&qwen(json!({"mig": "allowed"}), two.clone()).on([parts()]));
    assert!(
        message.contains("spec.parallelism asks for 2 devices, and nothing connects MIG devices"),
        "{message}"
    );
    // Fifty-six parts are not fifty-six GPUs of one node either.
    let story = qwen(
        json!({"mig": "allowed"}),
        json!({"parallelism": {"tensor": 4}}),
    );
    let story = story.on([parts(), gpu_node("b", "NVIDIA-H200", 143_771, 2)]);
    assert_eq!(condition(&story.plan(), "Planned").1, "MemoryDoesNotFit");
    let story = qwen(json!({"mig": "allowed"}), two)
        .on([parts(), h200x8("b")])
        .taken("b", 8);
    let mut groups = explain(&story.snapshot, &settings(), &story.plan()).nodes;
    groups.retain(|group| group.nodes == ["a"]);
    assert_eq!(
        groups[0].remedy.as_deref(),
        Some("none: a replica needs 2 devices, and nothing connects MIG devices with each other")
    );
}

#[test]
fn parts_that_are_shared_or_not_divided_alike_are_not_used() {
    let shared = with(
        mig_mixed("a", 0, &[(HALF.0, HALF.1, 2)]),
        json!({"metadata": {"labels": {"nvidia.com/mig-3g.71gb.sharing-strategy": "time-slicing"}}}),
    );
    let invalid = mig_single("b", "INVALID", 0, 0);
    let story = qwen(json!({"mig": "only"}), json!({})).on([shared, invalid]);
    let message = no_place(&story);
    assert!(
        message.contains("1 node: GPUs are shared by pods"),
        "{message}"
    );
    let unlabelled = with(
        mig_mixed("a", 0, &[(HALF.0, HALF.1, 2)]),
        json!({"status": {"allocatable": {"nvidia.com/mig-3g.71gb": "0"}}}),
    );
    let message = no_place(&qwen(json!({"mig": "only"}), json!({})).on([unlabelled]));
    assert!(
        message.contains("MIG devices by their labels, but none to allocate"),
        "{message}"
    );
}

#[test]
fn a_node_that_is_divided_anew_takes_no_replica_meanwhile() {
    let state = |state: &str| {
        with(
            mig_single("a", HALF.0, HALF.1, 16),
            json!({"metadata": {"labels": {"nvidia.com/mig.config.state": state}}}),
        )
    };
    for busy in ["pending", "rebooting"] {
        let story = qwen(json!({"mig": "only"}), json!({})).on([state(busy)]);
        let message = no_place(&story);
        assert!(
            message.contains(&format!("divided anew: nvidia.com/mig.config.state={busy}")),
            "{message}"
        );
        assert!(why(&story).1.starts_with("wait until the MIG manager"));
    }
    let story = qwen(json!({"mig": "only"}), json!({})).on([state("success")]);
    assert_eq!(pods(&story.plan()).len(), 1);
}

#[test]
fn replicas_on_whole_gpus_stay_when_parts_appear() {
    let story = qwen(json!({"mig": "allowed"}), json!({}))
        .on([h200x8("a")])
        .running();
    let revision = story.plan().status.revision;
    let story = story.on([mig_mixed("b", 0, &[(HALF.0, HALF.1, 2)])]);
    let plan = story.plan();
    assert!(plan.actions.is_empty(), "{plan}");
    assert_eq!(plan.status.revision, revision);
}

#[test]
fn a_rollout_back_to_a_revision_on_parts_makes_the_same_pods() {
    let story = qwen(
        json!({"mig": "only"}),
        json!({"replicas": 2, "rollout": {"partition": 2}}),
    )
    .on([mig_mixed("a", 4, &[(HALF.0, HALF.1, 4)])])
    .running();
    let revision = story.plan().status.revision.unwrap();
    // The new revision is held back by the partition; what is lost comes back as it was.
    let story = story.edited(json!({"context": {"maxTokens": 8192}}));
    let story = story.replica(0, |pod| fails(pod, now())).later(60);
    let plan = story.plan();
    let names: Vec<_> = pods(&plan)
        .iter()
        .map(|pod| pod.metadata.name.clone().unwrap())
        .collect();
    assert!(
        names.iter().all(|name| name.contains(&revision)),
        "{names:?} {plan}"
    );
    let settled = story.running();
    let all = settled.snapshot.pods.iter();
    let on_parts = all.filter(|pod| pod.requests.mig.total() == 1).count();
    assert_eq!(on_parts, 2);
}

#[test]
fn a_quota_on_parts_is_kept_apart_from_one_on_gpus() {
    let quota = |resource: &str, most: u64| {
        let limit = QuotaLimit { most, used: 0 };
        Arc::new(QuotaView {
            name: "parts".into(),
            limits: [(resource.to_owned(), limit)].into(),
        })
    };
    let mut story = qwen(json!({"mig": "only"}), json!({"replicas": 3})).on([mig_mixed(
        "a",
        0,
        &[(HALF.0, HALF.1, 8)],
    )]);
    story.snapshot.quotas = vec![quota("nvidia.com/gpu", 0)];
    assert_eq!(pods(&story.plan()).len(), 3);
    story.snapshot.quotas = vec![quota("nvidia.com/mig-3g.71gb", 2)];
    let plan = story.plan();
    assert_eq!(pods(&plan).len(), 2);
    let (_, reason, message) = condition(&plan, "Planned");
    assert_eq!(reason, "GpuQuotaExceeded");
    assert!(
        message.contains("ResourceQuota parts allows 2 nvidia.com/mig-3g.71gb in namespace default and 2 are asked for already; a replica needs 1. Raise requests.nvidia.com/mig-3g.71gb"),
        "{message}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Counted here anew, from the objects alone.
    #[test]
    fn no_node_gives_more_parts_than_it_has(
        nodes in prop::collection::vec((0..3u64, 0..4u64, 0..3u64), 1..4),
        held in prop::collection::vec(0..3u64, 4),
        replicas in 0..8i32,
        mig in prop::sample::select(vec!["allowed", "only"]),
        binding in prop::sample::select(vec!["scheduler", "direct"]),
    ) {
        let rest = json!({"replicas": replicas, "placement": {"binding": binding}});
        let mut story = qwen(json!({"mig": mig}), rest);
        let mut left: BTreeMap<(String, String), u64> = BTreeMap::new();
        for (index, (gpus, small, half)) in nodes.iter().enumerate() {
            let name = format!("n{index}");
            let held = held[index].min(*half);
            story = story
                .on([mig_mixed(&name, *gpus, &[(SMALL.0, SMALL.1, *small), (HALF.0, HALF.1, *half)])])
                .holds(&name, "nvidia.com/mig-3g.71gb", held);
            left.insert((name.clone(), "nvidia.com/gpu".into()), *gpus);
            left.insert((name, "nvidia.com/mig-3g.71gb".into()), half - held);
        }
        let plan = story.plan();
        let kinds: std::collections::BTreeSet<_> =
            pods(&plan).iter().map(|pod| asked(pod)).collect();
        prop_assert!(kinds.len() <= 1, "one revision, one kind: {kinds:?}");
        for pod in pods(&plan) {
            let nodes = operator_core::objects::preferred_nodes(pod);
            for (resource, count) in asked(pod) {
                let left = left.get_mut(&(nodes[0].clone(), resource)).unwrap();
                prop_assert!(*left > 0, "{plan}");
                prop_assert_eq!(count, "1");
                *left -= 1;
            }
        }
        // And no replica waits while what it is planned for is there.
        let made = pods(&plan).len() as u64;
        if made < u64::try_from(replicas).unwrap()
            && let Some(kind) = kinds.into_iter().next()
        {
            let resource = kind.into_keys().next().unwrap();
            let free: u64 = left.iter().filter(|((_, r), _)| *r == resource).map(|(_, n)| n).sum();
            prop_assert_eq!(free, 0, "{}", plan);
        }
    }
}
