//! What the API server is asked for by each write, and what its refusals mean.

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use serde_json::{Value, json};

use super::*;
use crate::lease::Election;
use crate::standin::{Answer, Asked, Log, api_server, list, refuses, says};

fn pod() -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "d", "uid": "u"}})
}

fn writer(
    answer: impl Fn(usize, &Asked) -> Answer + Send + Sync + 'static,
) -> (Writer, std::sync::Arc<Log>) {
    let (client, log) = api_server(answer);
    (Writer::new(client, Leadership::alone()), log)
}

fn parsed<K: DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).expect("an object")
}

#[tokio::test(start_paused = true)]
async fn without_the_lease_nothing_is_written() {
    let (client, log) = api_server(|_, _| says(pod()));
    let (_election, leadership) = Election::new(client.clone(), "d", "l", "me");
    let writer = Writer::new(client, leadership);
    assert!(!writer.may_write());
    let pod: Pod = parsed(pod());
    let results = [
        writer.create("Pod", "d", &pod).await.err(),
        writer.apply("Pod", "d", &pod).await.err(),
        writer.patch_pod("d", "p", json!({"uid": "u"})).await.err(),
        writer.release_pod("d", "p", "u").await.err(),
        writer.delete::<Pod>("Pod", "d", "p", "u").await.err(),
        writer
            .merge_status::<Pod>("Pod", "d", "p", &json!({}), json!({}))
            .await
            .err(),
    ];
    for error in results {
        assert_eq!(error.expect("refused").category(), Category::NotLeader);
    }
    assert_eq!(log.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_delete_is_of_one_uid_and_waits_for_no_children() {
    let (writer, log) = writer(|_, _| says(pod()));
    let written = writer.delete::<Pod>("Pod", "d", "p", "u").await;
    assert_eq!(written.expect("deleted"), Written::Done(()));
    let asked = log.last();
    assert_eq!(
        (&*asked.method, &*asked.path),
        ("DELETE", "/api/v1/namespaces/d/pods/p")
    );
    assert_eq!(asked.body["preconditions"], json!({"uid": "u"}));
    assert_eq!(asked.body["propagationPolicy"], "Background");
}

#[tokio::test(start_paused = true)]
async fn what_is_gone_or_was_replaced_is_neither_patched_nor_deleted_and_no_error() {
    for (code, reason) in [(404, "NotFound"), (409, "Conflict")] {
        let (writer, log) = writer(move |_, _| refuses(code, reason));
        let deleted = writer.delete::<Pod>("Pod", "d", "p", "u").await;
        assert_eq!(deleted.expect("gone"), Written::Already, "{reason}");
        let patched = writer.patch_pod("d", "p", json!({"uid": "u"})).await;
        assert_eq!(patched.expect("gone"), Written::Already, "{reason}");
        let released = writer.release_pod("d", "p", "u").await;
        assert_eq!(released.expect("gone"), Written::Already, "{reason}");
        assert_eq!(log.count(), 3, "none is repeated");
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_takes_the_gates_off_the_pod_of_one_uid() {
    let (writer, log) = writer(|_, _| says(pod()));
    writer.release_pod("d", "p", "u").await.expect("released");
    let expected = json!({"metadata": {"uid": "u", "annotations": {"cachalot.dev/preempts": null}},
        "spec": {"schedulingGates": null}});
    let asked = log.last();
    assert_eq!(asked.body, expected);
    assert_eq!(asked.content, "application/merge-patch+json");
}

#[tokio::test(start_paused = true)]
async fn an_apply_is_by_one_manager_and_takes_its_fields_from_others() {
    let map = json!({"metadata": {"name": "m", "namespace": "d", "resourceVersion": "7"}, "data": {"a": "b"}});
    let (writer, log) = writer(|_, asked| says(asked.body.clone()));
    let map: ConfigMap = parsed(map);
    writer.apply("ConfigMap", "d", &map).await.expect("applied");
    let asked = log.last();
    assert_eq!(
        (&*asked.method, &*asked.content),
        ("PATCH", "application/apply-patch+yaml")
    );
    assert!(asked.query.contains("force=true"), "{}", asked.query);
    assert!(
        asked.query.contains("fieldManager=cachalot"),
        "{}",
        asked.query
    );
    assert_eq!(asked.body["kind"], "ConfigMap");
    assert_eq!(
        asked.body["metadata"],
        json!({"name": "m", "namespace": "d"})
    );
}

#[tokio::test(start_paused = true)]
async fn a_status_is_merged_where_statuses_are_and_loses_what_is_no_longer_wanted() {
    let (writer, log) = writer(|_, _| says(pod()));
    let (stored, wanted) = (
        json!({"phase": "A", "reason": "old"}),
        json!({"phase": "B"}),
    );
    let reported = writer.merge_status::<Pod>("Pod", "d", "p", &stored, wanted);
    reported.await.expect("reported");
    let asked = log.last();
    assert_eq!(asked.path, "/api/v1/namespaces/d/pods/p/status");
    assert_eq!(
        asked.body,
        json!({"status": {"phase": "B", "reason": null}})
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_read_again_is_that_object_as_it_is_now() {
    let (writer, log) = writer(|_, _| list("9", "", &[]));
    let found = writer.read_back::<Pod>("Pod", "d", "p").await;
    assert!(found.expect("read").is_none());
    assert!(writer.read_node("n").await.expect("read").is_none());
    for (asked, name) in log.all().iter().zip(["p", "n"]) {
        let selector = format!("fieldSelector=metadata.name%3D{name}");
        assert!(asked.query.contains(&selector), "{}", asked.query);
        // With a version the API server may answer from what it remembers.
        assert!(!asked.query.contains("resourceVersion"), "{}", asked.query);
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_after_an_attempt_without_answer_leaves_open_what_happened() {
    let pod: Pod = parsed(pod());
    let (writer, log) = writer(|number, _| match number {
        0 => Answer::Silence,
        _ => refuses(403, "Forbidden"),
    });
    let error = writer.create("Pod", "d", &pod).await.expect_err("refused");
    assert_eq!((log.count(), error.category()), (2, Category::Forbidden));
    // The first may have used up what the second was refused for.
    assert!(error.is_open(), "{error}");
    let error = writer.create("Pod", "d", &pod).await.expect_err("refused");
    assert!(!error.is_open(), "{error}");
}
