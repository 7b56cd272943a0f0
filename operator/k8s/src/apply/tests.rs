//! What an applier does where an API server is slow or refuses, which a real one does not do on demand.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Request, Response};
use kube::client::Body;

use super::*;
use crate::lease::Leadership;

/// How an API server that was written for a test answers the create of a number: after how long, and with which status.
type Answers = fn(usize) -> (Duration, u16);

/// What such a server saw.
#[derive(Default)]
struct Seen {
    asked: AtomicUsize,
    under_way: AtomicUsize,
    under_way_max: AtomicUsize,
    last_asked: Mutex<Option<Instant>>,
    first_refused: Mutex<Option<Instant>>,
    methods: Mutex<Vec<String>>,
}

/// An applier before that server.
fn applier(answers: Answers) -> (Applier, Arc<World>, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let told = Arc::clone(&seen);
    let service = tower::service_fn(move |request: Request<Body>| {
        let seen = Arc::clone(&told);
        async move {
            let number = seen.asked.fetch_add(1, Ordering::Relaxed);
            let now = seen.under_way.fetch_add(1, Ordering::Relaxed) + 1;
            seen.under_way_max.fetch_max(now, Ordering::Relaxed);
            *lock(&seen.last_asked) = Some(Instant::now());
            lock(&seen.methods).push(request.method().to_string());
            let (after, status) = answers(number);
            tokio::time::sleep(after).await;
            seen.under_way.fetch_sub(1, Ordering::Relaxed);
            let body = if status == 201 {
                request.into_body().collect_bytes().await.expect("a pod")
            } else {
                lock(&seen.first_refused).get_or_insert_with(Instant::now);
                let (reason, message) = match status {
                    409 => ("AlreadyExists", "it is there"),
                    _ => ("Forbidden", "exceeded quota: requests.nvidia.com/gpu"),
                };
                let refusal = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status,
                    "reason": reason, "message": message});
                Bytes::from(refusal.to_string())
            };
            let answer = Response::builder().status(status).body(Full::new(body));
            Ok::<_, Infallible>(answer.expect("an answer"))
        }
    });
    let client = kube::Client::new(service, "d");
    let world = World::new();
    let writer = Writer::new(client, Leadership::alone());
    (Applier::new(writer, Arc::clone(&world)), world, seen)
}

/// Creates of pods that take one GPU of node `n1` each.
fn creates(number: usize) -> Vec<Action> {
    let pod = |index: usize| -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": format!("m-{index}-abc-0"), "namespace": "d", "labels": {
                "app.kubernetes.io/managed-by": "cachalot", "cachalot.dev/model-deployment": "m"}},
            "spec": {"nodeName": "n1", "containers": [
                {"name": "engine", "resources": {"requests": {"nvidia.com/gpu": "1"}}}]},
        }))
        .expect("a pod")
    };
    (0..number)
        .map(|index| Action::Create(Object::Pod(Box::new(pod(index)))))
        .collect()
}

fn delete(name: &str, if_silent: Option<&str>) -> Action {
    Action::Delete {
        kind: Kind::Pod,
        name: name.into(),
        uid: "u".into(),
        if_silent: if_silent.map(str::to_owned),
    }
}

#[test]
fn actions_of_one_sort_run_together_and_not_with_those_of_another() {
    let apply = || Action::Apply(Object::ConfigMap(Box::default()));
    let create = || Action::Create(Object::Pod(Box::default()));
    let delete = || delete("p", None);
    let suspect = || self::delete("p", Some("n1"));
    let pod = || Action::Apply(Object::Pod(Box::default()));
    let patch = || Action::PatchPod {
        name: "p".into(),
        uid: "u".into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
    };
    let stages = |mut actions: &[Action]| {
        let mut sizes = Vec::new();
        while !actions.is_empty() {
            let size = together(actions);
            sizes.push(size);
            actions = &actions[size..];
        }
        sizes
    };
    let actions = [apply(), apply(), create(), create(), create(), apply()];
    assert_eq!(stages(&actions), [2, 3, 1]);
    assert_eq!(stages(&[patch(), patch(), delete(), delete()]), [2, 2]);
    assert_eq!(stages(&[create(), patch()]), [1, 1]);
    assert_eq!(stages(&[suspect(), suspect(), pod(), pod()]), [1, 1, 1, 1]);
    assert_eq!(stages(&[delete(), suspect(), delete()]), [1, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn deletes_run_together_up_to_the_one_that_must_wait() {
    let (applier, _, seen) = applier(|_| (Duration::from_millis(10), 201));
    let mut deletes: Vec<Action> = (0..200).map(|n| delete(&format!("m-{n}"), None)).collect();
    let outcome = applier.apply("d", &deletes, &|_| ()).await;
    assert_eq!(outcome.expect("deleted").written, 200);
    assert_eq!(seen.under_way_max.load(Ordering::Relaxed), CONCURRENCY_MAX);
    // A create of the third may still take effect: what comes before it is deleted, it and the rest are not.
    applier.unsure.add("d", "m-2", Some(&Pod::default()));
    deletes.truncate(5);
    let outcome = applier
        .apply("d", &deletes, &|_| ())
        .await
        .expect("deleted");
    assert_eq!(outcome.written, 2);
    assert_eq!(seen.asked.load(Ordering::Relaxed), 202);
    assert!(
        outcome
            .again
            .is_some_and(|pause| pause > Duration::from_secs(60))
    );
}

fn service(name: &str) -> Action {
    let metadata =
        json!({"name": name, "namespace": "d", "labels": {"cachalot.dev/model-deployment": name}});
    let service = serde_json::from_value(json!({ "metadata": metadata })).expect("a Service");
    Action::Apply(Object::Service(Box::new(service)))
}

#[tokio::test(start_paused = true)]
async fn few_services_are_under_way_at_once_whoever_asks() {
    let (applier, _, seen) = applier(|_| (Duration::from_millis(100), 201));
    let of =
        |name: &str| -> Vec<Action> { (0..20).map(|n| service(&format!("{name}-{n}"))).collect() };
    let (one, other) = (of("one"), of("other"));
    let both = tokio::join!(
        applier.apply("d", &one, &|_| ()),
        applier.apply("d", &other, &|_| ())
    );
    assert!(both.0.is_ok() && both.1.is_ok());
    assert_eq!(seen.asked.load(Ordering::Relaxed), 40);
    assert_eq!(seen.under_way_max.load(Ordering::Relaxed), SERVICES_MAX);
}

#[tokio::test(start_paused = true)]
async fn what_was_never_seen_is_created_and_applied_only_where_it_is_there() {
    let service = || [service("m")];
    let (applier, world, seen) = applier(|number| match number {
        0 => (Duration::ZERO, 409),
        _ => (Duration::ZERO, 201),
    });
    // Someone made it meanwhile.
    applier
        .apply("d", &service(), &|_| ())
        .await
        .expect("there");
    assert_eq!(*lock(&seen.methods), ["POST", "PATCH"]);
    // Now it is known.
    assert!(world.services.get(&Key::new("d", "m")).is_some());
    applier
        .apply("d", &service(), &|_| ())
        .await
        .expect("there");
    assert_eq!(*lock(&seen.methods), ["POST", "PATCH", "PATCH"]);
}

#[tokio::test(start_paused = true)]
async fn a_slow_create_holds_up_no_others_and_no_more_than_the_limit_are_under_way() {
    let (applier, _, seen) = applier(|number| {
        let is_slow = number % 10 == 0;
        (Duration::from_millis(if is_slow { 1000 } else { 10 }), 201)
    });
    let start = Instant::now();
    let outcome = applier.apply("d", &creates(1000), &|_| ()).await;
    assert_eq!(outcome.expect("created").written, 1000);
    assert_eq!(seen.under_way_max.load(Ordering::Relaxed), CONCURRENCY_MAX);
    // 100 slow ones among 64 lanes are 1.6 s; waves of 64 would each take as long as their slowest, 16 s together.
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_quota_is_met_once_and_what_was_counted_for_the_pods_is_given_back() {
    let (applier, world, seen) = applier(|_| (Duration::from_millis(10), 403));
    let actions = creates(100);
    applier.assume("d", &actions);
    assert_eq!(world.used_gpus("n1"), 100);
    let error = applier
        .apply("d", &actions, &|_| ())
        .await
        .expect_err("refused");
    assert_eq!(error.category(), Category::Forbidden);
    assert_eq!(seen.asked.load(Ordering::Relaxed), 1);
    assert_eq!(world.used_gpus("n1"), 0);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_begun_after_the_first_failure_and_those_under_way_are_heard_out() {
    let (applier, world, seen) = applier(|number| match number {
        50 => (Duration::from_millis(5), 403),
        _ => (Duration::from_millis(10), 201),
    });
    let actions = creates(1000);
    applier.assume("d", &actions);
    applier
        .apply("d", &actions, &|_| ())
        .await
        .expect_err("refused");
    let asked = seen.asked.load(Ordering::Relaxed);
    assert!((51..=50 + CONCURRENCY_MAX).contains(&asked), "{asked}");
    assert!(*lock(&seen.last_asked) <= *lock(&seen.first_refused));
    // All but the refused one exist, and only those are counted.
    assert_eq!(
        world.used_gpus("n1"),
        u64::try_from(asked - 1).expect("small")
    );
}

#[tokio::test]
async fn what_a_told_plan_takes_is_counted_until_the_next_plan() {
    let (applier, world, _) = applier(|_| (Duration::ZERO, 201));
    let owner = Key::new("d", "m");
    applier.tell(&owner, &creates(3));
    assert_eq!(world.used_gpus("n1"), 3);
    applier.untell(&Key::new("d", "other"));
    assert_eq!(world.used_gpus("n1"), 3);
    applier.untell(&owner);
    assert_eq!(world.used_gpus("n1"), 0);
    // What exists by then stays counted, and is not given back twice.
    applier.tell(&owner, &creates(3));
    applier
        .apply("d", &creates(1), &|_| ())
        .await
        .expect("created");
    applier.untell(&owner);
    applier.untell(&owner);
    assert_eq!(world.used_gpus("n1"), 1);
}

#[test]
fn pods_in_doubt_are_found_by_their_owner() {
    let unsure = Unsure::default();
    for (namespace, pod) in [
        ("d", "m-0-abc-0"),
        ("d", "other-0-abc-0"),
        ("e", "m-0-abc-0"),
    ] {
        unsure.add(namespace, pod, None);
    }
    let owner = Key::new("d", "m");
    assert_eq!(unsure.of(&owner), [(Key::new("d", "m-0-abc-0"), None)]);
    unsure.remove(&Key::new("d", "m-0-abc-0"));
    assert!(unsure.of(&owner).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_create_got_no_answer_is_not_deleted_before_the_api_server_gave_up() {
    let unsure = Unsure::default();
    let delete = |name| delete(name, None);
    unsure.add("d", "m-0-abc-0", Some(&Pod::default()));
    unsure.add("d", "m-1-abc-0", None);
    // Known by now, but a late create could still bring it back under its name.
    unsure.remove(&Key::new("d", "m-0-abc-0"));
    assert_eq!(unsure.held("d", &delete("m-0-abc-0")), Some(HOLD));
    assert_eq!(unsure.held("d", &delete("m-1-abc-0")), None);
    tokio::time::advance(HOLD).await;
    assert_eq!(unsure.held("d", &delete("m-0-abc-0")), None);
}
