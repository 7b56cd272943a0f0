//! Elections before one Lease, with an API server that is silent, fails, or is quicker than we are.

use std::sync::Mutex;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::standin::{Answer, Asked, Log, api_server, refuses, says};
use crate::wakes::lock;

/// The one Lease, as an API server keeps it.
#[derive(Default)]
struct Kept {
    lease: Option<Value>,
    version: u64,
    /// Someone else writes it after every look.
    is_contended: bool,
}

impl Kept {
    fn answer(&mut self, asked: &Asked) -> Answer {
        let answer = match (&*asked.method, &self.lease) {
            ("GET", None) => refuses(404, "NotFound"),
            ("GET", Some(lease)) => says(lease.clone()),
            ("POST", Some(_)) => refuses(409, "AlreadyExists"),
            ("POST", None) => self.keep(asked.body.clone()),
            _ if asked.body["metadata"]["resourceVersion"] != json!(self.version.to_string()) => {
                refuses(409, "Conflict")
            }
            _ => self.keep(asked.body.clone()),
        };
        if self.is_contended
            && asked.method == "GET"
            && let Some(lease) = self.lease.clone()
        {
            self.keep(lease);
        }
        answer
    }

    fn keep(&mut self, mut lease: Value) -> Answer {
        self.version += 1;
        lease["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.lease = Some(lease.clone());
        says(lease)
    }

    fn set_holder(&mut self, holder: &str) {
        let mut lease = self.lease.clone().expect("a lease");
        lease["spec"]["holderIdentity"] = json!(holder);
        self.keep(lease);
    }

    fn holder(&self) -> String {
        let lease = self.lease.as_ref().expect("a lease");
        lease["spec"]["holderIdentity"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}

/// How the API server is towards one candidate.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Well,
    Silent,
    Failing,
}

struct Candidate {
    leadership: Leadership,
    log: Arc<Log>,
    mood: Arc<Mutex<Mood>>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Drop for Candidate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Candidate {
    fn new(kept: &Arc<Mutex<Kept>>, identity: &str) -> Self {
        let mood = Arc::new(Mutex::new(Mood::Well));
        let (kept, felt) = (Arc::clone(kept), Arc::clone(&mood));
        let (client, log) = api_server(move |_, asked| match *lock(&felt) {
            Mood::Well => lock(&kept).answer(asked),
            Mood::Silent => Answer::Silence,
            Mood::Failing => refuses(500, "InternalError"),
        });
        let (election, leadership) = Election::new(client, "d", "l", identity);
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(election.run(async move {
            let _ = stopped.await;
        }));
        Candidate {
            leadership,
            log,
            mood,
            stop: Some(stop),
            task,
        }
    }

    fn leads(&self) -> bool {
        self.leadership.is_held()
    }

    fn set(&self, mood: Mood) {
        *lock(&self.mood) = mood;
    }

    fn stop(&mut self) {
        let _ = self.stop.take().map(|stop| stop.send(()));
    }
}

/// Lets seconds pass; the first second at which `test` holds.
async fn pass(seconds: u64, test: impl Fn() -> bool) -> Option<u64> {
    let began = Instant::now();
    let mut first = None;
    while began.elapsed() < Duration::from_secs(seconds) {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if first.is_none() && test() {
            first = Some(began.elapsed().as_secs());
        }
    }
    first
}

#[tokio::test(start_paused = true)]
async fn one_leads_at_a_time_and_the_other_follows_soon_when_it_stops() {
    let kept = Arc::default();
    let mut one = Candidate::new(&kept, "one");
    assert!(pass(5, || one.leads()).await.is_some());
    let acquired = || lock(&kept).lease.clone().expect("a lease")["spec"]["acquireTime"].clone();
    let first = acquired();
    let other = Candidate::new(&kept, "other");
    assert_eq!(pass(120, || other.leads() || !one.leads()).await, None);
    assert_eq!(acquired(), first, "a renewal is no new beginning");
    let asked = one.log.count();
    assert!(
        (80..130).contains(&asked),
        "asked {asked} times in two minutes"
    );
    one.stop();
    let both = || assert!(!(one.leads() && other.leads()));
    let followed = pass(10, || {
        both();
        other.leads()
    });
    assert!(followed.await.is_some_and(|second| second <= 3));
    let lease = lock(&kept).lease.clone().expect("a lease");
    assert_eq!(lease["spec"]["leaseTransitions"], 1);
    assert_ne!(acquired(), first);
}

#[tokio::test(start_paused = true)]
async fn what_is_given_back_names_nobody() {
    let kept = Arc::default();
    let mut one = Candidate::new(&kept, "one");
    pass(5, || false).await;
    one.stop();
    assert!(pass(1, || !one.leads()).await.is_some());
    assert_eq!(lock(&kept).holder(), "");
}

#[tokio::test(start_paused = true)]
async fn a_lease_of_another_version_is_waited_for_as_long_as_it_says() {
    let kept = Arc::<Mutex<Kept>>::default();
    lock(&kept).keep(json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "l", "namespace": "d"},
        "spec": {"holderIdentity": "old", "leaseDurationSeconds": 60, "renewTime": "2026-11-24T00:00:00.000000Z"}}));
    let one = Candidate::new(&kept, "one");
    let led = pass(80, || one.leads()).await;
    assert!(led.is_some_and(|second| second >= 60), "{led:?}");
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_hears_nothing_stops_before_another_begins() {
    for mood in [Mood::Silent, Mood::Failing] {
        let kept = Arc::default();
        let mut one = Candidate::new(&kept, "one");
        pass(5, || false).await;
        let other = Candidate::new(&kept, "other");
        pass(5, || false).await;
        assert!(one.leads());
        one.leadership.changes.mark_unchanged();
        one.set(mood);
        assert_eq!(pass(5, || !one.leads()).await, None, "its time is not over");
        assert!(pass(6, || !one.leads()).await.is_some(), "its time is over");
        assert!(!other.leads(), "and only its own");
        let followed = pass(20, || other.leads()).await;
        assert!(followed.is_some() && !one.leads());
        let told = tokio::time::timeout(Duration::from_secs(1), one.leadership.changed());
        assert!(told.await.is_ok(), "the controller is told");
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_finds_another_name_in_the_lease_stops_at_once_and_gives_nothing_back() {
    let kept = Arc::<Mutex<Kept>>::default();
    let mut one = Candidate::new(&kept, "one");
    pass(5, || false).await;
    lock(&kept).set_holder("other");
    assert!(pass(3, || !one.leads()).await.is_some());
    lock(&kept).set_holder("one");
    assert!(pass(3, || one.leads()).await.is_some());
    // Taken between its last look and its end.
    lock(&kept).set_holder("other");
    one.stop();
    pass(1, || false).await;
    assert_eq!(lock(&kept).holder(), "other");
}

#[tokio::test(start_paused = true)]
async fn a_renewal_from_an_old_picture_ends_the_leadership() {
    let kept = Arc::<Mutex<Kept>>::default();
    let one = Candidate::new(&kept, "one");
    pass(5, || false).await;
    assert!(one.leads());
    lock(&kept).is_contended = true;
    assert!(pass(3, || !one.leads()).await.is_some());
    assert_eq!(pass(10, || one.leads()).await, None);
}

#[tokio::test(start_paused = true)]
async fn time_counts_from_before_a_renewal() {
    let kept = Arc::<Mutex<Kept>>::default();
    let (client, log) = api_server(move |number, asked| match number {
        0..2 => Answer::Late(at(4), Box::new(lock(&kept).answer(asked))),
        _ => Answer::Silence,
    });
    let (election, leadership) = Election::new(client, "d", "l", "one");
    let task = tokio::spawn(election.run(std::future::pending()));
    let held = pass(12, || leadership.is_held()).await;
    assert_eq!(held, Some(8), "a look and a write of four seconds each");
    assert!(!leadership.is_held(), "ten seconds after it began to look");
    assert_eq!(log.count(), 3, "what is late is not repeated");
    task.abort();
}

const fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn without_an_election_nothing_is_ever_told() {
    let mut alone = Leadership::alone();
    assert!(alone.is_held());
    let told = tokio::time::timeout(Duration::from_secs(3600), alone.changed()).await;
    assert!(told.is_err(), "the controller's loop would never rest");
}
