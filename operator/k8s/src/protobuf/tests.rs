//! What an API server said in both forms, recorded by `golden/make.sh`, and what becomes of it.

use futures::stream;
use k8s_openapi::api::core::v1::Pod;
use kube::Resource;
use operator_core::{Claim, NodeView, PodPhase, PodView};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::guard::Guarded;

/// An answer in pieces of so many bytes.
fn in_pieces(content: &str, bytes: &[u8], size: usize) -> Response<Read> {
    let pieces: Vec<_> = bytes
        .chunks(size)
        .map(|piece| Ok::<_, BoxError>(Frame::data(Bytes::copy_from_slice(piece))))
        .collect();
    let body = StreamBody::new(stream::iter(pieces));
    let answer = Response::builder().header(CONTENT_TYPE, content);
    answer.body(body.boxed_unsync()).expect("an answer")
}

async fn text_of(answer: Response<Read>) -> Result<String, BoxError> {
    let bytes = answer.into_body().collect().await?.to_bytes();
    Ok(String::from_utf8(bytes.to_vec()).expect("UTF-8"))
}

const WATCH: &str = "application/vnd.kubernetes.protobuf;stream=watch";

async fn lines_of(bytes: &[u8], size: usize) -> Result<String, BoxError> {
    let read = Protobuf::default().read(in_pieces(WATCH, bytes, size));
    assert_eq!(read.headers()[CONTENT_TYPE], JSON);
    text_of(read).await
}

fn events<K: DeserializeOwned + Resource<DynamicType = ()>>(
    lines: &str,
) -> Vec<WatchEvent<Guarded<K>>> {
    lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("an event"))
        .collect()
}

/// What a watch told, with what `kept` makes of each object, beside its metadata that mirrors look at.
fn told<K: DeserializeOwned + Resource<DynamicType = ()> + Clone, V>(
    lines: &str,
    kept: impl Fn(&K) -> V,
) -> Vec<(&'static str, String, Option<V>)> {
    let object = |object: &Guarded<K>| {
        let object = object.0.as_ref().expect("it is understood");
        let metadata = object.meta();
        let (name, version) = (&metadata.name, &metadata.resource_version);
        let named = format!(
            "{name:?} {version:?} {:?} {:?}",
            metadata.namespace, metadata.generation
        );
        (named, Some(kept(object)))
    };
    let events = events::<K>(lines);
    let told = events.iter().map(|event| {
        let (kind, (named, kept)) = match event {
            WatchEvent::Added(added) => ("added", object(added)),
            WatchEvent::Modified(modified) => ("modified", object(modified)),
            WatchEvent::Deleted(deleted) => ("deleted", object(deleted)),
            // The two were recorded one after the other, at versions of their own.
            WatchEvent::Bookmark(bookmark) => {
                assert!(bookmark.metadata.resource_version.parse::<u64>().is_ok());
                let annotations = &bookmark.metadata.annotations;
                (
                    "bookmark",
                    (format!("{:?} {annotations:?}", bookmark.types), None),
                )
            }
            WatchEvent::Error(status) => {
                // It names the version of the day.
                let (message, _) = status.message.split_once(", current").unwrap_or_default();
                let details = status.details.as_ref();
                let told = format!(
                    "{} {} {message} {:?} {:?}",
                    status.code,
                    status.reason,
                    status.status,
                    details.map(|details| details.retry_after_seconds)
                );
                ("error", (told, None))
            }
        };
        (kind, named, kept)
    });
    told.collect()
}

const PODS: [&[u8]; 2] = [
    include_bytes!("golden/pods.pb"),
    include_bytes!("golden/pods.json"),
];
const NODES: [&[u8]; 2] = [
    include_bytes!("golden/nodes.pb"),
    include_bytes!("golden/nodes.json"),
];

#[tokio::test]
async fn what_is_kept_of_pods_is_the_same_in_both_forms() {
    let kept = |pod: &Pod| (PodView::of(pod), Claim::of(pod));
    let [protobuf, json] = PODS;
    let read = told(&lines_of(protobuf, 4096).await.expect("events"), kept);
    let wanted = told(std::str::from_utf8(json).expect("JSON"), kept);
    assert_eq!(read, wanted);
    // And the recording has what it is for.
    let rich = read
        .iter()
        .find(|(_, named, _)| named.contains("golden-rich"));
    let (view, claim) = rich
        .and_then(|(_, _, kept)| kept.clone())
        .expect("it was told");
    assert!(view.deleting && !view.ready && view.ready_changed.is_some() && view.created.is_some());
    assert_eq!(
        (view.phase, view.priority, view.container.restarts),
        (PodPhase::Running, 70, 3)
    );
    assert!(view.container.waiting.is_some() && view.container.terminated.is_some());
    assert_eq!((view.requests.gpus, view.requests.claimed), (2, 4));
    assert_eq!(claim.map(|claim| claim.node).as_deref(), Some("golden"));
    let kinds: Vec<_> = read.iter().map(|(kind, ..)| *kind).collect();
    assert!(
        kinds.starts_with(&["added", "added", "bookmark"]),
        "{kinds:?}"
    );
}

#[tokio::test]
async fn what_is_kept_of_nodes_is_the_same_in_both_forms() {
    let [protobuf, json] = NODES;
    let read = told(
        &lines_of(protobuf, 4096).await.expect("events"),
        NodeView::of,
    );
    let wanted = told(std::str::from_utf8(json).expect("JSON"), NodeView::of);
    assert_eq!(read, wanted);
    let view = read[0].2.clone().expect("a node");
    assert!(
        view.unschedulable && view.ready && view.taints.len() >= 2,
        "{view:?}"
    );
    assert_eq!((view.allocatable.gpus, &*view.boot_id), (8, "7d7e0b1c"));
    assert_eq!(view.faults, ["SysLogsXIDError"]);
}

#[tokio::test]
async fn an_end_and_a_refusal_say_why() {
    let (protobuf, json) = (
        include_bytes!("golden/ended.pb"),
        include_str!("golden/ended.json"),
    );
    let none = |_: &Pod| ();
    let read = told(&lines_of(protobuf, 4096).await.expect("events"), none);
    assert_eq!(read, told(json, none));
    assert!(
        read[0].0 == "error" && read[0].1.starts_with("504 Timeout Timeout: Too large"),
        "{read:?}"
    );
    let refused = in_pieces(PROTOBUF, include_bytes!("golden/refused.pb"), 64);
    let read = text_of(Protobuf::default().read(refused))
        .await
        .expect("a status");
    let (mut read, mut wanted): (Value, Value) = (
        serde_json::from_str(&read).expect("JSON"),
        serde_json::from_str(include_str!("golden/refused.json")).expect("JSON"),
    );
    for object in [&mut read, &mut wanted] {
        let fields = object.as_object_mut().expect("a map");
        fields.retain(|field, _| !matches!(&**field, "kind" | "apiVersion" | "metadata"));
    }
    assert_eq!(read, wanted);
    assert_eq!(wanted["code"], 400);
}

#[tokio::test]
async fn events_come_in_pieces_of_any_size_and_half_of_one_at_the_end_is_none() {
    let [protobuf, _] = PODS;
    let whole = lines_of(protobuf, protobuf.len()).await.expect("events");
    for size in [1, 3, 1000] {
        assert_eq!(lines_of(protobuf, size).await.expect("events"), whole);
    }
    let cut = lines_of(&protobuf[..protobuf.len() - 1], 100)
        .await
        .expect("events");
    assert!(whole.starts_with(&cut) && cut.lines().count() + 1 == whole.lines().count());
}

fn watch_of(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).expect("a request")
}

#[tokio::test]
async fn what_is_not_understood_is_asked_for_in_json_from_then_on() {
    let mut unknown = MAGIC.to_vec();
    unknown.extend(
        messages::Unknown {
            type_meta: None,
            raw: Bytes::new(),
        }
        .encode_to_vec(),
    );
    let of_no_kind = messages::WatchEvent {
        kind: "ADDED".into(),
        object: Some(messages::RawExtension {
            raw: unknown.into(),
        }),
    };
    let of_no_kind = of_no_kind.encode_to_vec();
    let bare = |event: &[u8]| {
        [
            &u32::try_from(event.len()).expect("short").to_be_bytes(),
            event,
        ]
        .concat()
    };
    for bytes in [
        bare(b"\xff\xff"),
        bare(b""),
        bare(&of_no_kind),
        vec![0xff; 64],
    ] {
        let protobuf = Protobuf::default();
        let ask = |protobuf: &Protobuf| {
            let asked = protobuf.ask(watch_of("/api/v1/pods?&watch=true"));
            asked.headers().get(ACCEPT).is_some()
        };
        assert!(ask(&protobuf));
        let read = protobuf.read(in_pieces(WATCH, &bytes, 16));
        let error = text_of(read).await.expect_err("it is not understood");
        assert!(!error.to_string().is_empty());
        assert!(!ask(&protobuf.clone()), "{bytes:?}");
    }
}

#[tokio::test]
async fn a_connection_that_breaks_is_told_of_as_it_is_and_protobuf_is_asked_for_again() {
    let protobuf = Protobuf::default();
    let broken = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "cut");
    let body = StreamBody::new(stream::iter([Err::<Frame<Bytes>, BoxError>(broken.into())]));
    let answer = Response::builder()
        .header(CONTENT_TYPE, WATCH)
        .body(body)
        .expect("an answer");
    let error = text_of(protobuf.read(answer)).await.expect_err("it broke");
    let error = error
        .downcast_ref::<std::io::Error>()
        .expect("of the connection");
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    assert!(
        protobuf
            .ask(watch_of("/api/v1/nodes?watch=true"))
            .headers()
            .contains_key(ACCEPT)
    );
}

#[test]
fn only_watches_of_pods_and_nodes_are_asked_for_in_protobuf() {
    for (path, asked) in [
        ("/api/v1/pods?&watch=true", true),
        (
            "https://host/prefix/api/v1/nodes?watch=true&sendInitialEvents=true",
            true,
        ),
        (
            "/api/v1/namespaces/models/pods?labelSelector=a&watch=true",
            true,
        ),
        ("/api/v1/pods?limit=200", false),
        ("/api/v1/pods", false),
        ("/api/v1/configmaps?watch=true", false),
        ("/api/v1/namespaces/pods?watch=true", false),
        ("/api/v1/namespaces/models/pods/p?watch=true", false),
        ("/apis/metrics.k8s.io/v1beta1/pods?watch=true", false),
    ] {
        let request = Protobuf::default().ask(watch_of(path));
        assert_eq!(request.headers().contains_key(ACCEPT), asked, "{path}");
    }
}

#[tokio::test]
async fn other_answers_are_left_as_they_are() {
    let said = json!({"kind": "Status", "code": 404}).to_string();
    for content in [JSON, "application/json;stream=watch", "text/plain"] {
        let read = Protobuf::default().read(in_pieces(content, said.as_bytes(), 5));
        assert_eq!(read.headers()[CONTENT_TYPE], content);
        assert_eq!(text_of(read).await.expect("a text"), said);
    }
}
