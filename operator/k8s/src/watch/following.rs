//! What a watch does where an API server breaks off, forgets or is down.

use std::sync::atomic::AtomicUsize;

use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::*;
use crate::standin::{Answer, Asked, Log, api_server, list, refuses, says, status};

fn object(name: &str, version: &str, size: usize) -> Value {
    let data: BTreeMap<String, &str> = (0..size).map(|n| (n.to_string(), "")).collect();
    json!({"apiVersion": "v1", "kind": "ConfigMap", "data": data,
        "metadata": {"name": name, "namespace": "d", "resourceVersion": version}})
}

fn event(kind: &str, object: Value) -> Value {
    json!({"type": kind, "object": object})
}

struct Following {
    mirror: Arc<Mirror<usize>>,
    log: Arc<Log>,
    told: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Following {
    /// An API server that has pages only; the question for a stream is not counted.
    fn in_pages(answer: impl Fn(usize, &Asked) -> Answer + Send + Sync + 'static) -> Self {
        Self::of(move |number, asked| match number {
            0 => refuses(422, "Invalid"),
            _ => answer(number - 1, asked),
        })
    }

    /// What was asked after that question.
    fn asked(&self) -> Vec<Asked> {
        self.log.all().split_off(1)
    }

    fn of(answer: impl Fn(usize, &Asked) -> Answer + Send + Sync + 'static) -> Self {
        let (client, log) = api_server(answer);
        let mirror = Mirror::<usize>::new("ConfigMap");
        let told = Arc::new(AtomicUsize::new(0));
        let (followed, counted) = (Arc::clone(&mirror), Arc::clone(&told));
        let task = tokio::spawn(async move {
            let api = Api::namespaced(client, "d");
            let trim = |map: ConfigMap| Ok(Some(map.data.unwrap_or_default().len()));
            let changed = |_: Change<'_, usize>| {
                counted.fetch_add(1, Ordering::Relaxed);
            };
            follow(followed, api, watcher::Config::default(), trim, changed).await;
        });
        Following {
            mirror,
            log,
            told,
            task,
        }
    }

    fn content(&self) -> Vec<(String, usize)> {
        let entries = self.mirror.read();
        let entries = entries.iter();
        entries
            .map(|(key, entry)| (key.name.to_string(), **entry.as_ref().expect("a value")))
            .collect()
    }
}

/// Time for what is under way, pauses included.
async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

fn content(names: &[(&str, usize)]) -> Vec<(String, usize)> {
    let names = names.iter();
    names
        .map(|(name, size)| ((*name).to_owned(), *size))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn a_list_and_what_is_told_after_it_are_mirrored() {
    let following = Following::in_pages(|number, _| match number {
        0 => list(
            "10",
            "",
            &[
                object("a", "3", 1),
                object("b", "4", 1),
                object("c", "5", 1),
            ],
        ),
        1 => Answer::Says(
            200,
            vec![
                event("MODIFIED", object("a", "11", 2)),
                event("DELETED", object("b", "12", 1)),
                event("ADDED", object("e", "13", 5)),
                // Told twice.
                event("MODIFIED", object("a", "11", 2)),
                event("BOOKMARK", object("", "20", 0)),
            ],
        ),
        _ => Answer::Silence,
    });
    pass(5).await;
    assert!(following.mirror.is_ready());
    assert_eq!(
        following.content(),
        content(&[("a", 2), ("c", 1), ("e", 5)])
    );
    assert_eq!(following.told.load(Ordering::Relaxed), 6);
    // The stream ended; it goes on from the bookmark, and nothing is listed again.
    let asked = following.asked();
    assert_eq!(asked.len(), 3);
    assert!(asked[0].query.contains("limit=200"), "{}", asked[0].query);
    assert!(
        asked[2].query.contains("resourceVersion=20"),
        "{}",
        asked[2].query
    );
}

#[tokio::test(start_paused = true)]
async fn what_was_missed_while_the_watch_was_too_old_is_made_up_for() {
    let following = Following::in_pages(|number, _| match number {
        0 => list("10", "", &[object("a", "3", 1), object("b", "4", 1)]),
        1 => Answer::Says(200, vec![event("ERROR", status(410, "Expired"))]),
        2 => list("30", "", &[object("b", "21", 2), object("c", "22", 1)]),
        _ => Answer::Silence,
    });
    pass(5).await;
    assert_eq!(following.content(), content(&[("b", 2), ("c", 1)]));
    assert!(following.mirror.is_ready());
    assert_eq!(following.mirror.errors(), 1);
    let trouble = following.mirror.trouble().expect("it is told");
    assert!(trouble.contains("watch"), "{trouble}");
}

#[tokio::test(start_paused = true)]
async fn a_list_that_breaks_off_counts_for_nothing() {
    let following = Following::in_pages(|number, _| match number {
        0 => list("10", "next", &[object("a", "3", 1)]),
        1 => refuses(410, "Expired"),
        2 => list("30", "next", &[object("b", "21", 1)]),
        3 => list("30", "", &[object("c", "22", 1)]),
        _ => Answer::Silence,
    });
    pass(0).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(following.asked().len(), 2);
    assert!(!following.mirror.is_ready(), "half a list is none");
    pass(5).await;
    assert!(following.mirror.is_ready());
    assert_eq!(following.content(), content(&[("b", 1), ("c", 1)]));
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_is_down_or_forgets_at_once_is_asked_ever_less_often() {
    let down = Following::in_pages(|_, _| refuses(503, "ServiceUnavailable"));
    let forgetful = Following::in_pages(|_, asked| {
        if asked.query.contains("watch=true") {
            return Answer::Says(200, vec![event("ERROR", status(410, "Expired"))]);
        }
        list("10", "", &[object("a", "3", 1)])
    });
    pass(120).await;
    let (down, lists) = (down.log.count(), forgetful.log.count() / 2);
    assert!((8..20).contains(&down), "{down} questions in two minutes");
    assert!((8..20).contains(&lists), "{lists} lists in two minutes");
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_cannot_begin_is_begun_from_the_same_version() {
    let following = Following::in_pages(|number, _| match number {
        0 => list("10", "", &[object("a", "3", 1)]),
        1 | 2 => refuses(500, "InternalError"),
        3 => Answer::Says(200, vec![event("DELETED", object("a", "11", 1))]),
        4 => says(json!({})),
        _ => Answer::Silence,
    });
    pass(3).await;
    assert!(following.content().is_empty());
    let versions = |asked: &Asked| asked.query.contains("resourceVersion=10");
    assert!(following.asked()[1..4].iter().all(versions));
}

/// The end of a streamed list.
fn complete(version: &str) -> Value {
    let mut object = object("", version, 0);
    object["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
    event("BOOKMARK", object)
}

fn is_stream(asked: &Asked) -> bool {
    asked.query.contains("sendInitialEvents=true")
}

#[tokio::test(start_paused = true)]
async fn a_list_is_read_as_a_stream_and_goes_on_as_the_watch() {
    let following = Following::of(|number, _| match number {
        0 => Answer::Says(
            200,
            vec![
                event("ADDED", object("a", "3", 1)),
                event("ADDED", object("b", "4", 1)),
                complete("10"),
                event("DELETED", object("b", "12", 1)),
                event("ADDED", object("c", "13", 3)),
            ],
        ),
        _ => Answer::Silence,
    });
    pass(5).await;
    assert!(following.mirror.is_ready());
    assert_eq!(following.content(), content(&[("a", 1), ("c", 3)]));
    assert_eq!(following.mirror.errors(), 0);
    let asked = following.log.all();
    assert!(is_stream(&asked[0]), "{}", asked[0].query);
    // Broken off, it goes on where it was.
    assert_eq!(asked.len(), 2);
    assert!(!is_stream(&asked[1]), "{}", asked[1].query);
    assert!(asked[1].query.contains("resourceVersion=13"));
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_begun_anew_drops_what_is_gone_meanwhile() {
    let following = Following::of(|number, _| match number {
        0 => Answer::Says(
            200,
            vec![
                event("ADDED", object("a", "3", 1)),
                complete("10"),
                event("ERROR", status(410, "Expired")),
            ],
        ),
        1 => Answer::Says(
            200,
            vec![event("ADDED", object("b", "14", 1)), complete("20")],
        ),
        _ => Answer::Silence,
    });
    pass(5).await;
    assert_eq!(following.content(), content(&[("b", 1)]));
    assert!(is_stream(&following.log.all()[1]));
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_before_it_is_complete_is_not_begun_again_and_again() {
    let following = Following::of(|number, asked| match (is_stream(asked), &asked.query) {
        // Enough to be told from a few.
        (true, _) if number > 50 => Answer::Silence,
        (true, _) => Answer::Says(200, vec![event("ADDED", object("a", "3", 1))]),
        (false, query) if query.contains("watch=true") => Answer::Silence,
        (false, _) => list("10", "", &[object("b", "4", 1)]),
    });
    pass(1).await;
    assert!(following.mirror.is_ready());
    // What half a stream told of and the list did not is gone.
    assert_eq!(following.content(), content(&[("b", 1)]));
    let asked = following.log.all();
    assert!(asked.iter().filter(|asked| is_stream(asked)).count() <= 2);
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_is_down_is_asked_for_a_stream_until_it_is_up() {
    let following = Following::of(|number, _| match number {
        0 | 1 => refuses(503, "ServiceUnavailable"),
        2 => refuses(403, "Forbidden"),
        3 => Answer::Says(
            200,
            vec![event("ADDED", object("a", "3", 1)), complete("10")],
        ),
        _ => Answer::Silence,
    });
    pass(30).await;
    assert_eq!(following.content(), content(&[("a", 1)]));
    assert!(following.log.all()[..4].iter().all(is_stream));
    assert_eq!(following.mirror.errors(), 3);
}
