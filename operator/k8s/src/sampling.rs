//! Keeps fresh what engine pods say about themselves, and what Prometheus says about demand.
//!
//! One loop asks every pod when it is due: often while it starts or leaves, seldom while it serves, and with a growing
//! pause when it does not answer (a pod on a simulated node never does). Answers are stored and wake the
//! ModelDeployment concerned only when they differ in something a decision may depend on.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use operator_core::{Demand, PodSamples, names};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::lease::Leadership;
use crate::prometheus::{Prometheus, Query};
use crate::scrape::{Scrape, Scraper, Target};
use crate::trim::ChildPod;
use crate::watch::Key;
use crate::world::World;

/// How often due pods are looked for.
const TICK: Duration = Duration::from_millis(250);
/// Questions under way at once.
const IN_FLIGHT_MAX: usize = 128;
/// How often a pod that starts is asked.
const STARTING_PERIOD: Duration = Duration::from_secs(1);
/// How much more seldom pods are asked whose load steers nothing: it is only told in the status.
const TOLD_PERIOD_FACTOR: u32 = 3;
/// The longest such period, for what is older than a minute is not told.
const TOLD_PERIOD_MAX: Duration = Duration::from_secs(30);
/// Longest pause for a pod that does not answer.
const SILENT_PERIOD_MAX: Duration = Duration::from_secs(60);

/// How often to ask.
#[derive(Clone, Copy, Debug)]
pub struct Periods {
    /// Pods that serve a model that scales by their load, and Prometheus. Pods of other models are asked a third as often.
    pub serving: Duration,
    /// Pods that leave.
    pub draining: Duration,
}

/// Told of every question: `pod` and whether it answered, or `prometheus` and `ok`, `empty`, `failed`.
pub type Observer = Box<dyn Fn(Asked) + Send + Sync>;

/// Who was asked and what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// An engine pod; whether it answered.
    Pod(bool),
    /// Prometheus answered with a number.
    PrometheusAnswered,
    /// Prometheus has no such series.
    PrometheusEmpty,
    /// Prometheus failed.
    PrometheusFailed,
}

/// The store of samples and the loop that fills it.
pub struct Sampler {
    world: Arc<World>,
    scraper: Scraper,
    prometheus: Option<Prometheus>,
    periods: Periods,
    observer: Observer,
    store: Mutex<Store>,
}

#[derive(Debug, Default)]
struct Store {
    pods: BTreeMap<Key, Sampled>,
    demands: HashMap<Key, Demanded>,
}

#[derive(Debug)]
struct Sampled {
    /// Of the pod that was asked.
    incarnation: u64,
    /// Absent until it answers; there are ten thousand pods, and this is the largest part of what is kept of each.
    samples: Option<Box<PodSamples>>,
    due: Instant,
    silent: u32,
    asking: bool,
}

#[derive(Debug)]
struct Demanded {
    demand: Option<Demand>,
    due: Instant,
    asking: bool,
}

impl Sampler {
    /// A sampler of the pods in `world`.
    pub fn new(
        world: Arc<World>,
        scraper: Scraper,
        prometheus: Option<Prometheus>,
        periods: Periods,
        observer: Observer,
    ) -> Arc<Self> {
        Arc::new(Sampler {
            world,
            scraper,
            prometheus,
            periods,
            observer,
            store: Mutex::default(),
        })
    }

    /// The samples of a ModelDeployment's pods, by pod name.
    pub fn of(&self, deployment: &Key) -> BTreeMap<String, PodSamples> {
        let prefix = Key::new(
            Arc::clone(&deployment.namespace),
            format!("{}-", deployment.name),
        );
        self.lock()
            .pods
            .range(&prefix..)
            .take_while(|(key, _)| {
                key.namespace == prefix.namespace && key.name.starts_with(&*prefix.name)
            })
            .filter_map(|(key, sampled)| {
                let samples = sampled.samples.as_deref()?;
                Some((key.name.to_string(), samples.clone()))
            })
            .collect()
    }

    /// What Prometheus last said, unless that is long ago.
    pub fn demand(&self, deployment: &Key) -> Option<Demand> {
        self.lock()
            .demands
            .get(deployment)
            .and_then(|demanded| demanded.demand)
    }

    /// Asks for ever, while `leadership` lasts: only who decides needs to know.
    pub async fn run(self: Arc<Self>, leadership: Leadership) {
        let mut questions: JoinSet<()> = JoinSet::new();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                Some(_) = questions.join_next(), if !questions.is_empty() => continue,
            }
            if !leadership.is_held() {
                continue;
            }
            let now = Instant::now();
            for (key, deployment, target) in
                self.due_pods(now, IN_FLIGHT_MAX.saturating_sub(questions.len()))
            {
                let sampler = Arc::clone(&self);
                questions.spawn(async move { sampler.ask_pod(key, deployment, target).await });
            }
            for deployment in self.due_demands(now, IN_FLIGHT_MAX.saturating_sub(questions.len())) {
                let sampler = Arc::clone(&self);
                questions.spawn(async move { sampler.ask_prometheus(deployment).await });
            }
        }
    }

    /// Pods that are due, marked as being asked; forgets pods that are gone.
    fn due_pods(&self, now: Instant, room: usize) -> Vec<(Key, Key, Target)> {
        let pods = self.world.pods.read();
        let mut store = self.lock();
        let (mut due, mut new, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        // Both lie in the order of their keys: one walk over both, several times a second, and no search.
        let mut known = store.pods.iter_mut().peekable();
        for (key, entry) in pods.iter() {
            // A key is mostly the very one that the mirror holds, and that is seen without reading ten thousand names.
            while let Some((old, _)) = known.next_if(|(old, _)| !old.is(key) && *old < key) {
                gone.push(old.clone());
            }
            let sampled = known.next_if(|(old, _)| old.is(key) || *old == key);
            if due.len() >= room {
                continue;
            }
            let Ok(child) = &**entry else { continue };
            let mut sampled = sampled.map(|(_, sampled)| sampled);
            if let Some(sampled) = &mut sampled {
                if sampled.incarnation != child.incarnation {
                    **sampled = Sampled::new(child.incarnation, now);
                }
                // A pod that begins to leave is asked at once.
                let is_soon = || sampled.due > now + self.periods.draining && child.drains;
                if sampled.asking || (sampled.due > now && !is_soon()) {
                    continue;
                }
            }
            let has_started = sampled
                .as_ref()
                .is_some_and(|sampled| sampled.has_started());
            let Some((deployment, target)) = target(key, child, has_started) else {
                continue;
            };
            match sampled {
                Some(sampled) => sampled.asking = true,
                None => new.push((key.clone(), Sampled::new(child.incarnation, now))),
            }
            due.push((key.clone(), deployment, target));
        }
        gone.extend(known.map(|(old, _)| old.clone()));
        for key in gone {
            store.pods.remove(&key);
        }
        for (key, mut sampled) in new {
            sampled.asking = true;
            store.pods.insert(key, sampled);
        }
        due
    }

    async fn ask_pod(&self, key: Key, deployment: Key, target: Target) {
        let scrapes = self.scraper.scrape(vec![target]).await;
        let at = Timestamp::now();
        let Some(scrape) = scrapes.into_iter().next() else {
            return;
        };
        (self.observer)(Asked::Pod(scrape.is_answered()));
        let draining = self
            .world
            .pods
            .get(&key)
            .and_then(Result::ok)
            .is_some_and(|child| child.drains);
        let steers = self
            .world
            .deployments
            .get(&deployment)
            .and_then(Result::ok)
            .is_some_and(|wish| wish.scales);
        let mut store = self.lock();
        let Some(sampled) = store.pods.get_mut(&key) else {
            return;
        };
        sampled.asking = false;
        let news = sampled.record(&scrape, at);
        sampled.due = Instant::now() + sampled.pause(self.periods, draining, steers);
        drop(store);
        // Whoever waits for a pod to fall idle needs every answer.
        if news || draining {
            self.world.wake(&deployment);
        }
    }

    /// ModelDeployments that scale by themselves and are due.
    fn due_demands(&self, now: Instant, room: usize) -> Vec<Key> {
        if self.prometheus.is_none() {
            return Vec::new();
        }
        let deployments = self.world.deployments.read();
        let scales = |key: &Key| {
            let entry = deployments.get(key);
            entry.is_some_and(|entry| entry.as_ref().is_ok_and(|wish| wish.scales))
        };
        let mut store = self.lock();
        store.demands.retain(|key, _| scales(key));
        let mut due = Vec::new();
        for key in deployments.keys().filter(|key| scales(key)) {
            if due.len() >= room {
                break;
            }
            let demanded = store.demands.entry(key.clone()).or_insert(Demanded {
                demand: None,
                due: now,
                asking: false,
            });
            if !demanded.asking && demanded.due <= now {
                demanded.asking = true;
                due.push(key.clone());
            }
        }
        due
    }

    async fn ask_prometheus(&self, key: Key) {
        let Some(prometheus) = &self.prometheus else {
            return;
        };
        let demand = match measure(prometheus, &key).await {
            Ok(Some(demand)) => {
                (self.observer)(Asked::PrometheusAnswered);
                Some(demand)
            }
            Ok(None) => {
                (self.observer)(Asked::PrometheusEmpty);
                None
            }
            Err(error) => {
                (self.observer)(Asked::PrometheusFailed);
                tracing::warn!(deployment = %key, %error, "Prometheus was not asked; the pods are measured directly");
                None
            }
        };
        let mut store = self.lock();
        let Some(demanded) = store.demands.get_mut(&key) else {
            return;
        };
        demanded.asking = false;
        demanded.due = Instant::now() + self.periods.serving;
        demanded.demand = demand;
        drop(store);
        self.world.wake(&key);
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Both numbers, or none: half a measurement steers nothing.
async fn measure(
    prometheus: &Prometheus,
    key: &Key,
) -> Result<Option<Demand>, crate::error::Error> {
    let queued = prometheus
        .query(Query::Waiting, &key.namespace, &key.name)
        .await?;
    let kv = prometheus
        .query(Query::KvUsage, &key.namespace, &key.name)
        .await?;
    Ok(queued
        .zip(kv)
        .map(|(queued_requests, kv_utilization)| Demand {
            at: Timestamp::now(),
            queued_requests,
            kv_utilization,
        }))
}

/// Whose pod it is and where it listens; none for one that has nothing to tell.
fn target(key: &Key, child: &ChildPod, has_started: bool) -> Option<(Key, Target)> {
    let pod = child.is_asked.then(|| child.view())??;
    let deployment = pod.label(names::MODEL_DEPLOYMENT);
    let deployment = Key::new(Arc::clone(&key.namespace), deployment);
    let target = Target {
        pod: key.name.to_string(),
        port: u16::try_from(names::ENGINE_PORT).unwrap_or(8000),
        serves: pod.ready && has_started,
        address: pod.address?,
    };
    Some((deployment, target))
}

impl Sampled {
    fn new(incarnation: u64, now: Instant) -> Self {
        Sampled {
            incarnation,
            samples: None,
            due: now,
            silent: 0,
            asking: false,
        }
    }

    fn has_started(&self) -> bool {
        self.samples
            .as_ref()
            .is_some_and(|samples| samples.has_started())
    }

    /// Takes in an answer; true when a decision may depend on the difference.
    fn record(&mut self, scrape: &Scrape, at: Timestamp) -> bool {
        let said = |samples: &Option<Box<PodSamples>>| {
            samples.as_ref().map(|samples| {
                let latest = samples.latest.as_ref();
                (
                    samples.startup.clone(),
                    latest.map(|sample| sample.report.clone()),
                )
            })
        };
        let before = said(&self.samples);
        match &scrape.startup {
            None => self.silent = 0,
            Some(Ok(answer)) => match self.record_startup(&answer.body) {
                Ok(()) => self.silent = 0,
                Err(error) => {
                    self.silent = self.silent.saturating_add(1);
                    tracing::debug!(pod = %scrape.pod, status = answer.status, %error, "/startupz is not understood");
                }
            },
            Some(Err(error)) => {
                self.silent = self.silent.saturating_add(1);
                tracing::debug!(pod = %scrape.pod, %error, "engine does not answer");
            }
        }
        match &scrape.load {
            Some(Ok(answer)) if answer.status == 200 => {
                let samples = self.samples.get_or_insert_default();
                if let Err(error) = samples.record_load(at, &answer.body) {
                    tracing::debug!(pod = %scrape.pod, %error, "/load is not understood");
                }
            }
            Some(Ok(answer)) => {
                tracing::debug!(pod = %scrape.pod, status = answer.status, "/load refused")
            }
            Some(Err(error)) => tracing::debug!(pod = %scrape.pod, %error, "/load does not answer"),
            None => {}
        }
        before != said(&self.samples)
    }

    /// Takes in the text of `/startupz`. What is no report, as of whatever else listens there, is not kept.
    fn record_startup(&mut self, text: &str) -> Result<(), serde_json::Error> {
        let mut samples = self.samples.take().unwrap_or_default();
        let recorded = samples.record_startup(text);
        if recorded.is_ok() || *samples != PodSamples::default() {
            self.samples = Some(samples);
        }
        recorded
    }

    fn pause(&self, periods: Periods, draining: bool, steers: bool) -> Duration {
        let serves = self
            .samples
            .as_ref()
            .is_some_and(|samples| samples.latest.is_some());
        let base = match () {
            () if draining => periods.draining,
            () if !serves => STARTING_PERIOD,
            () if steers => periods.serving,
            () => (periods.serving * TOLD_PERIOD_FACTOR)
                .min(TOLD_PERIOD_MAX)
                .max(periods.serving),
        };
        if self.silent == 0 || draining {
            return base;
        }
        (base * (1 << self.silent.min(6))).min(SILENT_PERIOD_MAX)
    }
}

#[cfg(test)]
mod tests {
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

    fn running(name: &str) -> k8s_openapi::api::core::v1::Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": name, "namespace": "d", "uid": format!("uid-{name}"), "labels": {
                "app.kubernetes.io/managed-by": "cachalot", names::MODEL_DEPLOYMENT: "m", names::COMPONENT: names::ENGINE}},
            "spec": {"containers": [{"name": "engine"}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
        }))
        .expect("a pod")
    }

    #[tokio::test]
    async fn each_pod_is_asked_once_when_due_and_forgotten_when_gone() {
        let world = World::new();
        let scraper = Scraper::new(Duration::from_millis(100));
        let sampler = Sampler::new(Arc::clone(&world), scraper, None, PERIODS, Box::new(|_| ()));
        let asked = |now, room| {
            let due = sampler.due_pods(now, room);
            let names = due.iter().map(|(key, ..)| key.name.to_string());
            names.collect::<Vec<_>>()
        };
        let now = Instant::now();
        for name in ["m-0", "m-2", "m-4"] {
            world.wrote_pod(running(name));
        }
        assert_eq!(asked(now, 2), ["m-0", "m-2"], "there is room for two");
        world.wrote_pod(running("m-1"));
        assert_eq!(asked(now, 9), ["m-1", "m-4"], "the others are being asked");
        let started = scrape(answer(200, READY), Some(load(0)));
        for (key, sampled) in &mut sampler.lock().pods {
            sampled.asking = &*key.name == "m-4";
            sampled.record(&started, Timestamp::now());
        }
        let due = sampler.due_pods(now, 9);
        assert_eq!(due.len(), 3);
        assert!(due.iter().all(|(.., target)| target.serves));
        world.pods.forget_all();
        assert!(asked(now, 9).is_empty() && sampler.lock().pods.is_empty());
    }
}
