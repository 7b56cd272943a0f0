//! What is found out about writes that got no answer, before anyone plans again.

use super::*;
use crate::lease::{Election, Leadership};
use crate::standin::{Answer, Asked, Log, api_server, list, refuses, says};
use operator_core::Controller;

fn pod(name: &str) -> Pod {
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "d", "uid": "u", "resourceVersion": "7", "labels": {
            "app.kubernetes.io/managed-by": "cachalot", "cachalot.dev/model-deployment": "m"}},
        "spec": {"nodeName": "n1", "containers": [
            {"name": "engine", "resources": {"requests": {"nvidia.com/gpu": "1"}}}]},
    }))
    .expect("a pod")
}

fn json_of(name: &str) -> Value {
    serde_json::to_value(pod(name)).expect("JSON")
}

fn applier(
    answer: impl Fn(usize, &Asked) -> Answer + Send + Sync + 'static,
) -> (Applier, Arc<World>, Arc<Log>) {
    let (client, log) = api_server(answer);
    let world = World::new();
    let writer = Writer::new(client, Leadership::alone());
    (Applier::new(writer, Arc::clone(&world)), world, log)
}

const NAME: &str = "m-0-abc-0";

fn owner() -> Key {
    Key::new("d", "m")
}

fn key() -> Key {
    Key::new("d", NAME)
}

fn create() -> Action {
    Action::Create(Object::Pod(Box::new(pod(NAME))))
}

fn delete(if_silent: Option<&str>) -> Action {
    Action::Delete {
        kind: Kind::Pod,
        name: NAME.into(),
        uid: "u".into(),
        if_silent: if_silent.map(str::to_owned),
    }
}

fn patch() -> Action {
    Action::PatchPod {
        name: NAME.into(),
        uid: "u".into(),
        labels: BTreeMap::from([("a".into(), "b".into())]),
        annotations: BTreeMap::new(),
    }
}

async fn apply(applier: &Applier, actions: &[Action]) -> Result<Outcome, Error> {
    applier.assume("d", actions);
    applier.apply("d", actions, &|_| ()).await
}

fn methods(log: &Log, from: usize) -> Vec<String> {
    log.all()
        .split_off(from)
        .into_iter()
        .map(|asked| asked.method)
        .collect()
}

/// Ways to say nothing about a write.
fn nothing_said(way: usize) -> Answer {
    match way {
        0 => Answer::Silence,
        1 => refuses(500, "InternalError"),
        2 => refuses(504, "Timeout"),
        _ => says(json!("not a pod")),
    }
}

#[tokio::test(start_paused = true)]
async fn a_create_without_answer_is_repeated_and_its_pod_not_deleted_for_a_while() {
    for way in 0..4 {
        let attempts = if way == 3 { 1 } else { 4 };
        let (applier, world, log) = applier(move |number, asked| match number {
            number if number < attempts => nothing_said(way),
            _ => says(asked.body.clone()),
        });
        apply(&applier, &[create()]).await.expect_err("no answer");
        assert_eq!((log.count(), world.used_gpus("n1")), (attempts, 0));
        applier.settle(&owner()).await.expect("settled");
        assert_eq!(methods(&log, attempts), ["POST"], "way {way}");
        assert!(world.pods.get(&key()).is_some());
        assert_eq!(world.used_gpus("n1"), 1);
        applier.settle(&owner()).await.expect("settled");
        assert_eq!(log.count(), attempts + 1, "it is settled once");
        let outcome = apply(&applier, &[delete(None)]).await.expect("waits");
        assert!(
            outcome
                .again
                .is_some_and(|pause| pause > Duration::from_secs(1))
        );
        assert_eq!(log.count(), attempts + 1, "nothing is deleted yet");
    }
}

#[tokio::test(start_paused = true)]
async fn a_patch_or_delete_without_answer_is_read_back() {
    for way in 0..4 {
        for action in [patch(), delete(None)] {
            // What a delete answers is not looked at, so that nothing said is a body which is no JSON at all.
            if way == 3 && matches!(action, Action::Delete { .. }) {
                continue;
            }
            let attempts = if way == 3 { 1 } else { 4 };
            let (applier, world, log) = applier(move |number, _| match number {
                number if number < attempts => nothing_said(way),
                _ => list("9", "", &[json_of(NAME)]),
            });
            apply(&applier, &[action]).await.expect_err("no answer");
            applier.settle(&owner()).await.expect("settled");
            assert_eq!(methods(&log, attempts), ["GET"], "way {way}");
            assert!(world.pods.get(&key()).is_some());
            applier.settle(&owner()).await.expect("settled");
            assert_eq!(log.count(), attempts + 1, "it is settled once");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_write_leaves_nothing_to_settle() {
    for action in [create(), patch(), delete(None)] {
        let (applier, _, log) = applier(|_, _| refuses(403, "Forbidden"));
        apply(&applier, &[action]).await.expect_err("refused");
        applier.settle(&owner()).await.expect("settled");
        assert_eq!(log.count(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_plans_while_a_pod_in_doubt_cannot_be_read() {
    let (applier, world, log) = applier(|number, _| match number {
        0..8 => refuses(500, "InternalError"),
        _ => list("9", "", &[json_of(NAME)]),
    });
    apply(&applier, &[patch()]).await.expect_err("no answer");
    applier.settle(&owner()).await.expect_err("not read");
    applier.settle(&owner()).await.expect("settled");
    assert!(world.pods.get(&key()).is_some());
    assert_eq!(log.count(), 9);
}

#[tokio::test(start_paused = true)]
async fn a_repeated_create_that_gets_no_answer_leaves_it_in_doubt() {
    let (applier, _, log) = applier(|number, asked| match number {
        0..8 => refuses(500, "InternalError"),
        _ => says(asked.body.clone()),
    });
    apply(&applier, &[create()]).await.expect_err("no answer");
    applier
        .settle(&owner())
        .await
        .expect_err("no answer either");
    applier.settle(&owner()).await.expect("settled");
    assert_eq!(methods(&log, 8), ["POST"]);
}

#[tokio::test(start_paused = true)]
async fn a_create_in_doubt_is_still_repeated_when_it_is_doubted_again() {
    let (applier, _, log) = applier(|_, asked| says(asked.body.clone()));
    applier.unsure.add("d", NAME, Some(&pod(NAME)));
    applier.unsure.add("d", NAME, None);
    applier.settle(&owner()).await.expect("settled");
    assert_eq!(methods(&log, 0), ["POST"]);
}

#[tokio::test(start_paused = true)]
async fn what_comes_after_a_refused_write_is_no_longer_counted() {
    let (applier, world, log) = applier(|_, _| refuses(403, "Forbidden"));
    let actions = [patch(), create()];
    apply(&applier, &actions).await.expect_err("refused");
    assert_eq!((log.count(), world.used_gpus("n1")), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn without_the_lease_a_create_stays_in_doubt() {
    let (client, log) = api_server(|_, _| list("9", "", &[]));
    let (_election, leadership) = Election::new(client.clone(), "d", "l", "me");
    let applier = Applier::new(Writer::new(client, leadership), World::new());
    applier.unsure.add("d", NAME, Some(&pod(NAME)));
    applier.settle(&owner()).await.expect_err("not leader");
    assert_eq!((log.count(), applier.unsure.of(&owner()).len()), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn what_stands_under_the_name_of_a_create_is_read() {
    // Of an earlier life.
    let (taken, world, _) = applier(|number, _| match number {
        0 => refuses(409, "AlreadyExists"),
        _ => list("9", "", &[json_of(NAME)]),
    });
    let outcome = apply(&taken, &[create()]).await.expect("there");
    assert_eq!(outcome.written, 0);
    taken.settle(&owner()).await.expect("settled");
    assert!(world.pods.get(&key()).is_some());
    // Of the attempt that got no answer.
    let (made, world, log) = applier(|number, _| match number {
        0..4 => refuses(504, "Timeout"),
        4 => refuses(409, "AlreadyExists"),
        _ => list("9", "", &[json_of(NAME)]),
    });
    apply(&made, &[create()]).await.expect_err("no answer");
    made.settle(&owner()).await.expect("settled");
    assert_eq!(methods(&log, 4), ["POST", "GET"]);
    assert!(world.pods.get(&key()).is_some());
}

#[tokio::test(start_paused = true)]
async fn what_was_never_made_is_no_longer_counted() {
    let (applier, world, _) = applier(|number, _| match number {
        0..4 => refuses(504, "Timeout"),
        4 => refuses(403, "Forbidden"),
        _ => list("9", "", &[]),
    });
    apply(&applier, &[create()]).await.expect_err("no answer");
    // A plan that was made before it was settled counts on it.
    applier.assume("d", &[create()]);
    applier.settle(&owner()).await.expect("settled");
    assert_eq!(world.used_gpus("n1"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_a_list_may_have_missed_is_read_before_the_next_plan() {
    let (applier, world, log) = applier(|_, _| list("9", "", &[json_of(NAME)]));
    world.pods.miss(|| world.wrote_pod(pod(NAME)));
    assert!(world.pods.get(&key()).is_none());
    applier
        .settle(&Key::new("d", "other"))
        .await
        .expect("not its");
    assert_eq!(log.count(), 0);
    applier.settle(&owner()).await.expect("settled");
    assert!(world.pods.get(&key()).is_some());
    assert_eq!(world.used_gpus("n1"), 1);
}

fn node(ready: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "resourceVersion": "8"},
        "status": {"conditions": [{"type": "Ready", "status": ready}]}})
}

#[tokio::test(start_paused = true)]
async fn a_pod_of_a_node_that_answers_again_is_not_deleted() {
    let (applier, world, log) = applier(|_, _| list("9", "", &[node("True")]));
    let actions = [delete(Some("n1")), create()];
    let outcome = apply(&applier, &actions).await.expect("looked");
    let again = Some(STALE_PAUSE);
    assert_eq!(outcome, Outcome { written: 0, again });
    assert_eq!(methods(&log, 0), ["GET"]);
    let known = world.nodes.get(&Key::new("", "n1")).expect("it is known");
    assert!(known.is_ok_and(|node| node.ready));
    assert_eq!(world.used_gpus("n1"), 0, "the plan is void");
}

#[tokio::test(start_paused = true)]
async fn a_pod_of_a_node_that_is_silent_or_gone_is_deleted() {
    for nodes in [vec![], vec![node("Unknown")]] {
        let (applier, _, log) = applier(move |number, _| match number {
            0 => list("9", "", &nodes),
            _ => says(json_of(NAME)),
        });
        let outcome = apply(&applier, &[delete(Some("n1"))]).await;
        assert_eq!(outcome.expect("deleted").written, 1);
        assert_eq!(methods(&log, 0), ["GET", "DELETE"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_status_that_was_written_is_known_at_once() {
    let answer = json!({"apiVersion": "cachalot.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": "m", "namespace": "d", "resourceVersion": "8"},
        "spec": {"model": {"source": "hf://a/b"}}, "status": {"observedGeneration": 3}});
    let (applier, world, log) = applier(move |_, _| says(answer.clone()));
    let none = ModelDeploymentStatus::default();
    applier
        .report(&owner(), &none, &none)
        .await
        .expect("written");
    assert_eq!(log.last().method, "PATCH");
    let known = world.deployment(&owner()).expect("it is known");
    let status = known.expect("it parses").status.clone();
    assert_eq!(
        status.and_then(|status| status.observed_generation),
        Some(3)
    );
}

#[tokio::test(start_paused = true)]
async fn a_patch_names_the_uid_and_its_answer_is_known_at_once() {
    let (applier, world, log) = applier(|_, _| says(json_of(NAME)));
    apply(&applier, &[patch()]).await.expect("patched");
    assert_eq!(log.last().body["metadata"]["uid"], "u");
    assert!(world.pods.get(&key()).is_some());
}

#[tokio::test(start_paused = true)]
async fn an_adoption_names_both_uids_and_its_answer_is_known_at_once() {
    let owner = || OwnerReference {
        kind: operator_api::KIND.into(),
        name: "m".into(),
        uid: "of-m".into(),
        controller: Some(true),
        ..OwnerReference::default()
    };
    let adopt = |kind, uid: &str| Action::Adopt {
        kind,
        name: NAME.into(),
        uid: uid.into(),
        owner: Box::new(owner()),
    };
    let (applier, world, log) = applier(move |_, asked| {
        if asked.path.contains("configmaps") {
            return says(
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": NAME}}),
            );
        }
        let mut pod = json_of(NAME);
        pod["metadata"]["ownerReferences"] = json!([owner()]);
        says(pod)
    });
    let adopted = apply(&applier, &[adopt(Kind::Pod, "u")]).await;
    assert_eq!(adopted.expect("adopted").written, 1);
    let asked = log.last();
    assert_eq!(asked.method, "PATCH");
    let metadata = &asked.body["metadata"];
    assert_eq!(metadata["uid"], "u");
    assert_eq!(metadata["ownerReferences"][0]["uid"], "of-m");
    assert_eq!(asked.body.as_object().map(|fields| fields.len()), Some(1));
    let known = world.pods.get(&key()).expect("it is known");
    let view = known.ok().and_then(|pod| pod.view()).expect("a pod");
    assert_eq!(view.controller, Controller::with_uid("of-m"));
    assert!(world.take_woken().is_empty(), "what we wrote we know");
    // Config maps too, and a successor of another uid is let alone.
    apply(&applier, &[adopt(Kind::ConfigMap, "v")])
        .await
        .expect("adopted");
    assert!(log.last().path.ends_with(&format!("/configmaps/{NAME}")));
    let (applier, _, _) = self::applier(|_, _| refuses(409, "Conflict"));
    let adopted = apply(&applier, &[adopt(Kind::Pod, "w")]).await;
    assert_eq!(adopted.expect("nothing to do").written, 0);
}
