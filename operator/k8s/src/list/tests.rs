//! Lists in pages, and what an inventory does without.

use serde_json::{Value, json};

use super::*;
use crate::standin::{Answer, Asked, Log, api_server, list, refuses};

fn pods(names: &[&str]) -> Vec<Value> {
    let pod = |name: &&str| json!({"metadata": {"name": name, "namespace": "d"}, "spec": {"containers": []}});
    names.iter().map(pod).collect()
}

fn server(
    answer: impl Fn(usize, &Asked) -> Answer + Send + Sync + 'static,
) -> (Client, std::sync::Arc<Log>) {
    api_server(answer)
}

#[tokio::test(start_paused = true)]
async fn a_list_is_read_page_by_page_and_each_page_until_it_comes() {
    let (client, log) = server(|number, _| match number {
        0 => list("9", "two", &pods(&["a", "b"])),
        1 => refuses(503, "ServiceUnavailable"),
        2 => list("9", "three", &pods(&["c"])),
        _ => list("9", "", &pods(&["d"])),
    });
    let api: Api<k8s_openapi::api::core::v1::Pod> = Api::all(client);
    let found = all(&api, "Pod", "app=x").await.expect("listed");
    let names: Vec<_> = found
        .iter()
        .filter_map(|pod| pod.metadata.name.as_deref())
        .collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    let asked = log.all();
    let tokens = ["", "continue=two", "continue=two", "continue=three"];
    assert_eq!(asked.len(), tokens.len());
    for (asked, token) in asked.iter().zip(tokens) {
        for part in [token, "limit=500", "labelSelector=app%3Dx"] {
            assert!(asked.query.contains(part), "{part} in {}", asked.query);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_list_without_end_is_given_up() {
    let (client, log) = server(|_, _| list("9", "more", &[]));
    let api: Api<k8s_openapi::api::core::v1::Pod> = Api::all(client);
    let error = all(&api, "Pod", "").await.expect_err("it has no end");
    assert!(
        error.to_string().contains("more than 1000000 objects"),
        "{error}"
    );
    assert_eq!(log.count(), PAGES_MAX);
}

/// An API server that has a pod and refuses one kind.
fn refusing(kind: &'static str, code: u16) -> (Client, std::sync::Arc<Log>) {
    server(move |_, asked| match asked.path.rsplit('/').next() {
        Some(last) if last == kind => refuses(code, "x"),
        Some("pods") => list("9", "", &pods(&["a"])),
        _ => list("9", "", &[]),
    })
}

#[tokio::test(start_paused = true)]
async fn reports_do_without_nodes_that_may_not_be_seen_and_without_nothing_else() {
    let (client, log) = refusing("nodes", 403);
    let found = inventory(&client, Some("d"), Extent::Reports)
        .await
        .expect("listed");
    assert!(found.nodes.is_empty() && found.pods.len() == 1);
    let namespaced = log
        .all()
        .into_iter()
        .filter(|asked| asked.path.contains("/namespaces/d/"));
    assert_eq!(namespaced.count(), 2, "no other namespace is looked into");
    for (kind, code) in [("nodes", 500), ("pods", 403), ("modeldeployments", 403)] {
        let (client, _) = refusing(kind, code);
        let found = inventory(&client, None, Extent::Reports).await;
        assert!(found.is_err(), "{kind} {code}");
    }
}

#[tokio::test(start_paused = true)]
async fn plans_do_without_priorities_and_claims_and_say_so() {
    let (client, _) = refusing("priorityclasses", 403);
    let found = inventory(&client, None, Extent::Plans)
        .await
        .expect("listed");
    assert!(found.claims_unread.is_none() && found.pods.len() == 1);
    for code in [403, 404] {
        let (client, _) = refusing("resourceslices", code);
        let found = inventory(&client, None, Extent::Plans)
            .await
            .expect("listed");
        let why = found.claims_unread.expect("it is said");
        assert!(why.contains("ResourceSlice"), "{why}");
    }
    for (kind, code) in [
        ("priorityclasses", 500),
        ("resourceslices", 500),
        ("nodes", 403),
        ("resourcequotas", 403),
    ] {
        let (client, _) = refusing(kind, code);
        let found = inventory(&client, None, Extent::Plans).await;
        assert!(found.is_err(), "{kind} {code}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_config_that_is_named_is_read_where_its_model_is() {
    let wish = json!({"apiVersion": "cachalot.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": "m", "namespace": "d"},
        "spec": {"model": {"source": "hf://a/b", "configMapRef": {"name": "config"}}}});
    let (client, log) = server(move |_, asked| match asked.path.rsplit('/').next() {
        Some("modeldeployments") => list("9", "", std::slice::from_ref(&wish)),
        Some("config") => refuses(404, "NotFound"),
        _ => list("9", "", &[]),
    });
    inventory(&client, None, Extent::Plans)
        .await
        .expect("listed");
    let path = "/api/v1/namespaces/d/configmaps/config";
    assert!(log.all().iter().any(|asked| asked.path == path));
}
