use super::*;
use crate::http::Answer;

const PERIODS: Periods = Periods {
    serving: Duration::from_secs(5),
    draining: Duration::from_millis(500),
};

fn answer(status: u16, body: &str) -> Result<Answer, crate::error::Error> {
    Ok(Answer {
        status,
        body: body.into(),
    })
}

fn silence() -> Result<Answer, crate::error::Error> {
    let call = crate::error::Call {
        verb: "get",
        kind: "engine",
        name: "x".into(),
    };
    Err(crate::error::Error::Timeout {
        call,
        limit: Duration::from_secs(1),
    })
}

const READY: &str =
    r#"{"phase":"ready","bytesLoaded":9,"bytesTotal":9,"bytesPerSecond":1.0,"percent":100.0}"#;

fn load(running: u32) -> String {
    format!(
        r#"{{"running":{running},"waiting":0,"kvUsage":0.1,"kvTokensTotal":10,"draining":false,"generationTokensTotal":5,"promptTokensTotal":5}}"#
    )
}

fn scrape(startup: Result<Answer, crate::error::Error>, load: Option<String>) -> Scrape {
    Scrape {
        pod: "p".into(),
        startup: Some(startup),
        load: load.map(|body| answer(200, &body)),
    }
}

#[test]
fn only_differences_are_news() {
    let mut sampled = Sampled::new(1, Instant::now());
    let now = Timestamp::now();
    assert!(sampled.record(&scrape(answer(200, READY), Some(load(0))), now));
    assert!(!sampled.record(&scrape(answer(200, READY), Some(load(0))), now));
    assert!(sampled.record(&scrape(answer(200, READY), Some(load(1))), now));
    assert!(!sampled.record(&scrape(silence(), None), now));
}

#[test]
fn a_pod_that_does_not_answer_is_asked_ever_less_often() {
    let mut sampled = Sampled::new(1, Instant::now());
    let mut asked = 0;
    let mut passed = Duration::ZERO;
    while passed < Duration::from_secs(600) {
        sampled.record(&scrape(silence(), None), Timestamp::now());
        asked += 1;
        passed += sampled.pause(PERIODS, false, true);
    }
    assert!(asked < 20, "asked {asked} times in ten minutes");
    sampled.record(&scrape(answer(200, READY), Some(load(0))), Timestamp::now());
    assert_eq!(sampled.pause(PERIODS, false, true), PERIODS.serving);
    assert_eq!(
        sampled.pause(PERIODS, false, false),
        3 * PERIODS.serving,
        "its load steers nothing"
    );
    assert_eq!(sampled.pause(PERIODS, true, true), PERIODS.draining);
}

#[test]
fn an_answer_that_makes_no_sense_counts_as_silence() {
    let mut sampled = Sampled::new(1, Instant::now());
    assert!(!sampled.record(&scrape(answer(404, "not found"), None), Timestamp::now()));
    assert_eq!(sampled.silent, 1);
    assert!(sampled.samples.is_none(), "nothing is kept of it");
}

/// A pod of the ModelDeployment that its name begins with.
fn running(name: &str) -> k8s_openapi::api::core::v1::Pod {
    let owner = name.split('-').next();
    serde_json::from_value(serde_json::json!({
        "metadata": {"name": name, "namespace": "d", "uid": format!("uid-{name}"), "labels": {
            "app.kubernetes.io/managed-by": "cachalot", names::MODEL_DEPLOYMENT: owner, names::COMPONENT: names::ENGINE}},
        "spec": {"containers": [{"name": "engine"}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    }))
    .expect("a pod")
}

fn sampler(pods: impl IntoIterator<Item = String>) -> Arc<Sampler> {
    let world = World::new();
    for name in pods {
        world.wrote_pod(running(&name));
    }
    let scraper = Scraper::new(Duration::from_millis(100));
    Sampler::new(world, scraper, None, PERIODS, Box::new(|_| ()))
}

/// Looks for due pods every tick of `seconds`, each of which answers at once; how often each was asked.
fn asked_within(sampler: &Sampler, begin: Instant, seconds: u32) -> BTreeMap<Key, u32> {
    let mut asked = BTreeMap::new();
    for tick in 0..seconds * 4 {
        let now = begin + TICK * tick;
        for (key, ..) in sampler.due_pods(now, IN_FLIGHT_MAX) {
            let mut store = sampler.lock();
            let sampled = store.pods.get_mut(&key).expect("it is known");
            sampled.asking = false;
            let [drains, steers] = ["l-", "s-"].map(|owner| key.name.starts_with(owner));
            let pause = sampled.pause(PERIODS, drains, steers);
            sampled.wait(now, pause);
            *asked.entry(key).or_insert(0) += 1;
        }
    }
    asked
}

#[tokio::test]
async fn a_large_fleet_is_asked_in_turn_and_no_more_than_a_small_one_can_be() {
    let sampler = sampler((0..600).map(|number| format!("m-{number}")));
    let begin = Instant::now();
    let asked = asked_within(&sampler, begin, 100);
    let questions: u32 = asked.values().sum();
    let most = (TOLD_RATE_MAX * 100.0 + TOLD_BURST_MAX) as u32;
    assert!((most * 9 / 10..=most).contains(&questions), "{questions}");
    assert_eq!(asked.len(), 600, "all pods have their turn");
    let (least, most) = (asked.values().min(), asked.values().max());
    assert!(
        most.zip(least)
            .is_some_and(|(most, least)| most - least <= 2),
        "{least:?} to {most:?}"
    );
}

#[tokio::test]
async fn pods_whose_load_steers_something_are_asked_on_time_in_any_fleet() {
    let names = (0..600).map(|number| format!("m-{number}"));
    let sampler = sampler(names.chain((0..10).map(|number| format!("s-{number}"))));
    let scaling = serde_json::json!({
        "apiVersion": "cachalot.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "s", "namespace": "d"},
        "spec": {"model": {"source": "file:///m"}, "autoscaling": {"minReplicas": 1, "maxReplicas": 10}},
    });
    let begin = Instant::now();
    asked_within(&sampler, begin, 60);
    let started = scrape(answer(200, READY), Some(load(0)));
    for (key, sampled) in &mut sampler.lock().pods {
        if key.name.starts_with("s-") {
            sampled.record(&started, Timestamp::now());
        }
    }
    let before = asked_within(&sampler, begin + Duration::from_secs(60), 60);
    let before = before.iter().filter(|(key, _)| key.name.starts_with("s-"));
    let before: Vec<u32> = before.map(|(_, times)| *times).collect();
    assert!(
        before.iter().all(|times| *times < 8),
        "like all others: {before:?}"
    );
    let scaling = serde_json::from_value(scaling).expect("a ModelDeployment");
    sampler.world.wrote_deployment(scaling);
    let mut leaving = running("l-0");
    let since = (names::DRAIN_SINCE.to_owned(), Timestamp::now().to_string());
    leaving.metadata.annotations = Some([since].into());
    sampler.world.wrote_pod(leaving);
    let begin = begin + Duration::from_secs(120);
    let all = asked_within(&sampler, begin, 60);
    let leaves = all.get(&Key::new("d", "l-0")).copied();
    assert!(
        leaves.is_some_and(|times| (115..=121).contains(&times)),
        "twice a second: {leaves:?}"
    );
    let after = all.into_iter();
    let after: Vec<u32> = after
        .filter_map(|(key, times)| key.name.starts_with("s-").then_some(times))
        .collect();
    assert_eq!(after.len(), 10);
    assert!(
        after.iter().all(|times| (11..=13).contains(times)),
        "every five seconds: {after:?}"
    );
}

#[tokio::test]
async fn pods_are_looked_through_less_often_while_none_changes() {
    let sampler = sampler((0..5000).map(|number| format!("m-{number}")));
    let looks = |from: Instant| {
        let ticks = (0..16).map(|tick| from + TICK * tick);
        let looked = ticks.filter(|now| {
            sampler.due_pods(*now, 0);
            sampler.lock().looked.at == *now
        });
        looked.count()
    };
    let now = Instant::now();
    assert_eq!(
        looks(now),
        8,
        "half a second for 5000 pods, in four seconds"
    );
    let later = now + Duration::from_secs(10);
    sampler.due_pods(later, 0);
    sampler.world.wrote_pod(running("m-new"));
    sampler.due_pods(later, 0);
    assert!(sampler.lock().pods.contains_key(&Key::new("d", "m-new")));
}

#[tokio::test]
async fn each_pod_is_asked_once_when_due_and_forgotten_when_gone() {
    let sampler = sampler([]);
    let world = &sampler.world;
    let asked = |now, room| {
        let due = sampler.due_pods(now, room);
        let names = due.iter().map(|(key, ..)| key.name.to_string());
        names.collect::<Vec<_>>()
    };
    let now = Instant::now();
    for name in ["m-0", "m-2", "m-4"] {
        world.wrote_pod(running(name));
    }
    let first = asked(now, 2);
    assert_eq!(first.len(), 2, "there is room for two");
    world.wrote_pod(running("m-1"));
    let mut all = asked(now, 9);
    assert_eq!(all.len(), 2, "the others are being asked");
    all.extend(first);
    all.sort();
    assert_eq!(all, ["m-0", "m-1", "m-2", "m-4"]);
    let started = scrape(answer(200, READY), Some(load(0)));
    for (key, sampled) in &mut sampler.lock().pods {
        sampled.asking = &*key.name == "m-4";
        sampled.record(&started, Timestamp::now());
    }
    let due = sampler.due_pods(now + TICK, 9);
    assert_eq!(due.len(), 3);
    assert!(due.iter().all(|(.., target)| target.serves));
    world.pods.forget_all();
    assert!(asked(now, 9).is_empty() && sampler.lock().pods.is_empty());
}
