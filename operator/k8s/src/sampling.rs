//! Keeps fresh what engine pods say about themselves, and what Prometheus says about demand.
//!
//! One loop asks every pod when it is due: often while it starts or leaves, seldom while it serves, and with a growing
//! pause when it does not answer (a pod on a simulated node never does). Answers are stored and wake the
//! ModelDeployment concerned only when they differ in something a decision may depend on.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use operator_core::{Demand, PodPhase, PodSamples, PodView, names};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::lease::Leadership;
use crate::prometheus::{Prometheus, Query};
use crate::scrape::{Scrape, Scraper, Target};
use crate::watch::Key;
use crate::world::World;

/// How often due pods are looked for.
const TICK: Duration = Duration::from_millis(250);
/// Questions under way at once.
const IN_FLIGHT_MAX: usize = 128;
/// How often a pod that starts is asked.
const STARTING_PERIOD: Duration = Duration::from_secs(1);
/// Longest pause for a pod that does not answer.
const SILENT_PERIOD_MAX: Duration = Duration::from_secs(60);

/// How often to ask.
#[derive(Clone, Copy, Debug)]
pub struct Periods {
    /// Pods that serve, and Prometheus.
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
    uid: String,
    samples: PodSamples,
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
            .map(|(key, sampled)| (key.name.to_string(), sampled.samples.clone()))
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
        store.pods.retain(|key, _| pods.contains_key(key));
        let mut due = Vec::new();
        for (key, entry) in pods.iter() {
            if due.len() >= room {
                break;
            }
            let Ok(child) = entry else { continue };
            let Some(address) = asks(&child.view) else {
                continue;
            };
            let sampled = store
                .pods
                .entry(key.clone())
                .or_insert_with(|| Sampled::new(&child.view.uid, now));
            if sampled.uid != child.view.uid {
                *sampled = Sampled::new(&child.view.uid, now);
            }
            // A pod that begins to leave is asked at once.
            let soon = is_draining(&child.view) && sampled.due > now + self.periods.draining;
            if sampled.asking || (sampled.due > now && !soon) {
                continue;
            }
            sampled.asking = true;
            let target = Target {
                pod: key.name.to_string(),
                address: address.to_string(),
                port: u16::try_from(names::ENGINE_PORT).unwrap_or(8000),
            };
            due.push((
                key.clone(),
                Key::new(Arc::clone(&key.namespace), &*child.deployment),
                target,
            ));
        }
        due
    }

    async fn ask_pod(&self, key: Key, deployment: Key, target: Target) {
        let scrapes = self.scraper.scrape(vec![target]).await;
        let at = Timestamp::now();
        let Some(scrape) = scrapes.into_iter().next() else {
            return;
        };
        (self.observer)(Asked::Pod(scrape.startup.is_ok()));
        let draining = self
            .world
            .pods
            .get(&key)
            .and_then(Result::ok)
            .is_some_and(|child| is_draining(&child.view));
        let mut store = self.lock();
        let Some(sampled) = store.pods.get_mut(&key) else {
            return;
        };
        sampled.asking = false;
        let news = sampled.record(&scrape, at);
        sampled.due = Instant::now() + sampled.pause(self.periods, draining);
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
            deployments.get(key).is_some_and(|entry| {
                entry
                    .as_ref()
                    .is_ok_and(|mdep| mdep.spec.autoscaling.is_some())
            })
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

/// The address to ask, for engine pods that run. Of a group only the first rank has load to tell of.
fn asks(pod: &PodView) -> Option<&str> {
    let engine = pod
        .labels
        .get(names::COMPONENT)
        .is_some_and(|component| component == names::ENGINE);
    if engine && pod.rank() == 0 && pod.phase == PodPhase::Running && !pod.deleting {
        pod.address.as_deref()
    } else {
        None
    }
}

fn is_draining(pod: &PodView) -> bool {
    pod.annotations.get(names::DRAIN_SINCE).is_some()
}

impl Sampled {
    fn new(uid: &str, now: Instant) -> Self {
        Sampled {
            uid: uid.to_string(),
            samples: PodSamples::default(),
            due: now,
            silent: 0,
            asking: false,
        }
    }

    /// Takes in an answer; true when a decision may depend on the difference.
    fn record(&mut self, scrape: &Scrape, at: Timestamp) -> bool {
        let before = (
            self.samples.startup.clone(),
            self.samples
                .latest
                .as_ref()
                .map(|sample| sample.report.clone()),
        );
        match &scrape.startup {
            Ok(answer) => match self.samples.record_startup(&answer.body) {
                Ok(()) => self.silent = 0,
                Err(error) => {
                    self.silent = self.silent.saturating_add(1);
                    tracing::debug!(pod = %scrape.pod, status = answer.status, %error, "/startupz is not understood");
                }
            },
            Err(error) => {
                self.silent = self.silent.saturating_add(1);
                tracing::debug!(pod = %scrape.pod, %error, "engine does not answer");
            }
        }
        match &scrape.load {
            Some(Ok(answer)) if answer.status == 200 => {
                if let Err(error) = self.samples.record_load(at, &answer.body) {
                    tracing::debug!(pod = %scrape.pod, %error, "/load is not understood");
                }
            }
            Some(Ok(answer)) => {
                tracing::debug!(pod = %scrape.pod, status = answer.status, "/load refused")
            }
            Some(Err(error)) => tracing::debug!(pod = %scrape.pod, %error, "/load does not answer"),
            None => {}
        }
        before
            != (
                self.samples.startup.clone(),
                self.samples
                    .latest
                    .as_ref()
                    .map(|sample| sample.report.clone()),
            )
    }

    fn pause(&self, periods: Periods, draining: bool) -> Duration {
        let base = match () {
            () if draining => periods.draining,
            () if self.samples.latest.is_none() => STARTING_PERIOD,
            () => periods.serving,
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
            startup,
            load: load.map(|body| answer(200, &body)),
        }
    }

    #[test]
    fn only_differences_are_news() {
        let mut sampled = Sampled::new("u", Instant::now());
        let now = Timestamp::now();
        assert!(sampled.record(&scrape(answer(200, READY), Some(load(0))), now));
        assert!(!sampled.record(&scrape(answer(200, READY), Some(load(0))), now));
        assert!(sampled.record(&scrape(answer(200, READY), Some(load(1))), now));
        assert!(!sampled.record(&scrape(silence(), None), now));
    }

    #[test]
    fn a_pod_that_does_not_answer_is_asked_ever_less_often() {
        let mut sampled = Sampled::new("u", Instant::now());
        let mut asked = 0;
        let mut passed = Duration::ZERO;
        while passed < Duration::from_secs(600) {
            sampled.record(&scrape(silence(), None), Timestamp::now());
            asked += 1;
            passed += sampled.pause(PERIODS, false);
        }
        assert!(asked < 20, "asked {asked} times in ten minutes");
        sampled.record(&scrape(answer(200, READY), Some(load(0))), Timestamp::now());
        assert_eq!(sampled.pause(PERIODS, false), PERIODS.serving);
        assert_eq!(sampled.pause(PERIODS, true), PERIODS.draining);
    }

    #[test]
    fn an_answer_that_makes_no_sense_counts_as_silence() {
        let mut sampled = Sampled::new("u", Instant::now());
        assert!(!sampled.record(&scrape(answer(404, "not found"), None), Timestamp::now()));
        assert_eq!(sampled.silent, 1);
    }
}
