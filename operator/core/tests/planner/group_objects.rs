//! What the groups of a deployment share beside their pods: a Service, a network policy, a secret.

use std::sync::Arc;

use crate::common::*;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use operator_core::{Action, Flaw, Kind, Object, Plan, check};
use serde_json::{Value, json};

/// Two ranks on the processors, each a pod.
fn pair(spec: Value) -> Story {
    let mut whole = json!({"parallelism": {"tensor": 2}});
    merge(&mut whole, spec);
    story(deployment("m", whole))
        .inspected()
        .on([node("a", "4", "8Gi"), node("b", "4", "8Gi")])
}

/// Actions on what is shared.
fn shared(plan: &Plan) -> Vec<String> {
    let all = actions(plan).into_iter();
    all.filter(|action| action.ends_with(" m-ranks")).collect()
}

fn policy(plan: &Plan) -> NetworkPolicy {
    let mut found = plan.actions.iter().filter_map(|action| match action {
        Action::Apply(Object::NetworkPolicy(policy)) => Some((**policy).clone()),
        _ => None,
    });
    found.next().unwrap()
}

fn pods(plan: &Plan) -> Vec<Pod> {
    let pods = plan.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => Some((**pod).clone()),
        _ => None,
    });
    pods.collect()
}

#[test]
fn what_groups_share_is_there_before_their_pods_and_put_right_when_changed() {
    let story = pair(json!({}));
    let plan = story.plan();
    let words = actions(&plan);
    let place = |text: &str| words.iter().position(|action| action.starts_with(text));
    let policy_at = place("apply NetworkPolicy m-ranks").unwrap();
    assert!(policy_at < place("create Pod").unwrap(), "{words:?}");
    let made = story.after(&plan, answers);
    assert_eq!(shared(&made.plan()), [] as [&str; 0]);

    let mut opened = made.clone();
    let mut changed = (**made.snapshot.ranks_policy.as_ref().unwrap()).clone();
    changed.spec.as_mut().unwrap().ingress.as_mut().unwrap()[1].from = None;
    opened.snapshot.ranks_policy = Some(Arc::new(changed));
    assert_eq!(shared(&opened.plan()), ["apply NetworkPolicy m-ranks"]);
    opened.snapshot.ranks_policy = None;
    assert_eq!(shared(&opened.plan()), ["apply NetworkPolicy m-ranks"]);
    opened.settings.network_policies = false;
    assert_eq!(shared(&opened.plan()), [] as [&str; 0]);
}

/// Only pods of the deployment reach the ports where ranks meet, whichever they are; everyone reaches HTTP.
#[test]
fn the_policy_lets_strangers_reach_http_only() {
    let plan = pair(json!({})).plan();
    let spec = serde_json::to_value(policy(&plan).spec).unwrap();
    let engines = json!({"matchLabels": {
        "cachalot.dev/model-deployment": "m", "cachalot.dev/component": "engine",
    }});
    let expected = json!({
        "podSelector": engines,
        "policyTypes": ["Ingress"],
        "ingress": [
            {"ports": [{"port": 8000, "protocol": "TCP"}]},
            {"from": [{"podSelector": engines}]},
        ],
    });
    assert_eq!(spec, expected);
    for pod in pods(&plan) {
        let labels = pod.metadata.labels.unwrap();
        let wanted = engines["matchLabels"].as_object().unwrap();
        assert!(wanted.iter().all(|(key, value)| labels[key] == *value));
    }
}

#[test]
fn what_groups_shared_goes_with_the_last_of_them() {
    let story = pair(json!({})).running();
    let alone = story.edited(json!({"parallelism": {"tensor": 1}}));
    // The new revision has one pod, and the old group is still there.
    let first = alone.plan();
    assert_eq!(shared(&first), [] as [&str; 0]);
    let mut later = alone.after(&first, answers);
    for _ in 0..8 {
        later = later.later(60).swept();
        let plan = later.plan();
        let is_over = later.snapshot.pods.iter().all(|pod| pod.ranks() == 1);
        let expected: &[&str] = match is_over && later.snapshot.ranks_service.is_some() {
            true => &["delete Service m-ranks", "delete NetworkPolicy m-ranks"],
            false => &[],
        };
        assert_eq!(shared(&plan), expected);
        later = later.after(&plan, answers);
    }
    assert!(later.snapshot.ranks_service.is_none() && later.snapshot.ranks_policy.is_none());
    assert_eq!(later.snapshot.pods.len(), 1);
}

#[test]
fn what_belongs_to_someone_else_is_told_of_or_left_alone() {
    let foreign: NetworkPolicy =
        serde_json::from_value(json!({"metadata": {"name": "m-ranks", "uid": "theirs"}})).unwrap();
    let mut story = pair(json!({}));
    story.snapshot.ranks_policy = Some(Arc::new(foreign));
    let plan = story.plan();
    let (_, reason, message) = condition(&plan, "Planned");
    assert_eq!(reason, "NameTaken");
    assert!(
        message.contains("a NetworkPolicy named m-ranks"),
        "{message}"
    );
    assert!(pods(&plan).is_empty());
    let mut without = story.clone();
    without.settings.network_policies = false;
    assert_eq!(pods(&without.plan()).len(), 2);
    let single = story.edited(json!({"parallelism": {"tensor": 1}})).plan();
    assert_eq!(shared(&single), [] as [&str; 0]);
    assert_eq!(pods(&single).len(), 1);
}

#[test]
fn only_what_was_seen_is_deleted() {
    let story = pair(json!({})).running();
    let mut plan = story.plan();
    for (kind, uid, expected) in [
        (Kind::Service, "uid-of-service", 0),
        (Kind::Service, "another", 1),
        (Kind::NetworkPolicy, "uid-of-policy", 0),
        (Kind::NetworkPolicy, "another", 1),
        (Kind::PodDisruptionBudget, "uid-of-policy", 1),
    ] {
        plan.actions = vec![Action::Delete {
            kind,
            name: "m-ranks".into(),
            uid: uid.into(),
            if_silent: None,
        }];
        let flaws = check(&plan, &story.snapshot, &story.settings);
        let unobserved = flaws
            .iter()
            .filter(|flaw| matches!(flaw, Flaw::Unobserved(_)));
        assert_eq!(unobserved.count(), expected, "{kind:?} {uid}");
    }
}

#[test]
fn every_rank_is_given_the_secret_and_who_has_no_group_is_not() {
    let secret = json!({"groupSecretRef": {"name": "ranks"}});
    let story = pair(json!({"parallelism": secret.clone()}));
    let made = pods(&story.plan());
    assert_eq!(made.len(), 2);
    for pod in &made {
        let spec = serde_json::to_value(pod.spec.as_ref().unwrap()).unwrap();
        let command = spec["containers"][0]["command"].as_array().unwrap();
        let flag = command
            .iter()
            .position(|word| word == "--group-secret-file");
        assert_eq!(command[flag.unwrap() + 1], "/etc/cachalot-group/secret");
        let named = |list: &Value| {
            let mut found = list.as_array().unwrap().iter();
            found.find(|it| it["name"] == "group-secret").cloned()
        };
        assert_eq!(
            named(&spec["volumes"]).unwrap()["secret"],
            json!({"secretName": "ranks", "items": [{"key": "secret", "path": "secret"}], "defaultMode": 0o440})
        );
        let mount = named(&spec["containers"][0]["volumeMounts"]).unwrap();
        assert_eq!(
            (&mount["mountPath"], &mount["readOnly"]),
            (&json!("/etc/cachalot-group"), &json!(true))
        );
    }
    // Another secret makes other pods.
    let other = story
        .clone()
        .edited(json!({"parallelism": {"groupSecretRef": {"name": "new"}}}));
    assert_ne!(pods(&other.plan())[0].metadata.name, made[0].metadata.name);
    let mut alone = secret;
    alone["tensor"] = json!(1);
    let single = pods(&pair(json!({"parallelism": alone})).plan());
    let text = serde_json::to_string(&single).unwrap();
    assert_eq!((single.len(), text.contains("group-secret")), (1, false));
    let bad = story.edited(json!({"parallelism": {"groupSecretRef": {"name": "No"}}}));
    let bad = bad.plan();
    let (_, reason, message) = condition(&bad, "Valid");
    assert!(
        message.contains("spec.parallelism.groupSecretRef.name"),
        "{reason} {message}"
    );
}
