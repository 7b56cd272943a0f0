//! Keeps fresh what engine pods say about themselves, and what Prometheus says about demand.
//!
//! One loop asks every pod when it is due: often while it starts or leaves, seldom while it serves, and with a growing
//! pause when it does not answer (a pod on a simulated node never does). Answers are stored and wake the
//! ModelDeployment concerned only when they differ in something a decision may depend on.
//!
//! A fleet of any size may be asked so much a second and no more: pods whose answers steer something are asked when they
//! are due, and the others share [`TOLD_RATE_MAX`]. Where that does not suffice, the pauses of all of them grow alike.

use std::collections::{BTreeMap, HashMap, HashSet};
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
/// How much more seldom for each pod where none came, went or changed since: once a second among ten thousand.
const CALM_TICK_PER_POD: Duration = Duration::from_micros(100);
/// Questions per second at most of pods whose answers steer nothing. One takes a quarter of a millisecond, and an operator of
/// ten thousand pods that do nothing should take less than a hundredth of a core.
const TOLD_RATE_MAX: f64 = 24.0;
/// How many of them may have been saved up.
const TOLD_BURST_MAX: f64 = 48.0;
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
    /// Pods that serve a model that scales by their load or whose revisions are compared, and Prometheus. Pods of other models are
    /// asked a third as often, and in large fleets more seldom still.
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

#[derive(Debug)]
struct Store {
    pods: BTreeMap<Key, Sampled>,
    demands: HashMap<Key, Demanded>,
    looked: Looked,
}

/// When due pods were looked for, and what may be asked still.
#[derive(Debug)]
struct Looked {
    /// The state of the pods that was seen.
    changes: Option<u64>,
    at: Instant,
    /// Questions that steer nothing and may be asked now.
    told_left: f64,
}

#[derive(Debug)]
struct Sampled {
    /// Of the pod that was asked.
    incarnation: u64,
    /// Absent until it answers; there are ten thousand pods, and this is the largest part of what is kept of each.
    samples: Option<Box<PodSamples>>,
    due: Instant,
    /// How long it was to be left alone.
    pause_ms: u32,
    silent: u8,
    asking: bool,
}

/// A pod that is due.
struct Due<'a> {
    key: &'a Key,
    child: &'a ChildPod,
    /// Pauses that it waits already: all that cannot be asked at once wait alike.
    waits: f64,
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
            store: Mutex::new(Store {
                pods: BTreeMap::new(),
                demands: HashMap::new(),
                looked: Looked {
                    changes: None,
                    at: Instant::now(),
                    told_left: TOLD_BURST_MAX,
                },
            }),
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

    /// Pods that are due, marked as being asked, those first that wait longest; forgets pods that are gone.
    fn due_pods(&self, now: Instant, room: usize) -> Vec<(Key, Key, Target)> {
        let steered = self.steered();
        let pods = self.world.pods.read();
        let mut store = self.lock();
        let changes = self.world.pods.changes();
        let Some(told_max) = store.looked.begin(now, changes, pods.len()) else {
            return Vec::new();
        };
        let (mut steering, mut told) = (Vec::new(), Vec::new());
        let (mut new, mut gone) = (Vec::new(), Vec::new());
        // Both lie in the order of their keys: one walk over both, and no search.
        let mut known = store.pods.iter_mut().peekable();
        for (key, entry) in pods.iter() {
            // A key is mostly the very one that the mirror holds, and that is seen without reading ten thousand names.
            while let Some((old, _)) = known.next_if(|(old, _)| !old.is(key) && *old < key) {
                gone.push(old.clone());
            }
            let sampled = known.next_if(|(old, _)| old.is(key) || *old == key);
            let Some(child) = entry.as_ref().ok().filter(|child| child.is_asked) else {
                continue;
            };
            let mut waits = 0.0;
            if let Some((_, sampled)) = sampled {
                if sampled.incarnation != child.incarnation {
                    *sampled = Sampled::new(child.incarnation, now);
                }
                let draining = child.drains.then_some(self.periods.draining);
                let Some(since) = sampled.waits(now, draining) else {
                    continue;
                };
                waits = since;
            } else {
                new.push((key, child.incarnation));
            }
            let due = Due { key, child, waits };
            let is_steered = || {
                child
                    .owner(key)
                    .is_some_and(|owner| steered.contains(&owner))
            };
            if child.drains || (!steered.is_empty() && is_steered()) {
                steering.push(due);
            } else {
                told.push(due);
            }
        }
        gone.extend(known.map(|(old, _)| old.clone()));
        for key in gone {
            store.pods.remove(&key);
        }
        for (key, incarnation) in new {
            let sampled = Sampled::new(incarnation, now);
            store.pods.insert(key.clone(), sampled);
        }
        keep_longest(&mut steering, room);
        keep_longest(&mut told, told_max.min(room - steering.len()));
        store.looked.told_left -= told.len() as f64;
        let asked = steering.into_iter().chain(told).filter_map(|due| {
            let sampled = store.pods.get_mut(due.key)?;
            let (deployment, target) = target(due.key, due.child, sampled.has_started())?;
            sampled.asking = true;
            Some((due.key.clone(), deployment, target))
        });
        asked.collect()
    }

    /// ModelDeployments for which something is done because of what their engines say.
    fn steered(&self) -> HashSet<Key> {
        let deployments = self.world.deployments.read();
        let steered = deployments
            .iter()
            .filter(|(_, entry)| entry.as_ref().is_ok_and(|wish| wish.is_steered()));
        steered.map(|(key, _)| key.clone()).collect()
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
            .is_some_and(|wish| wish.is_steered());
        let mut store = self.lock();
        let Some(sampled) = store.pods.get_mut(&key) else {
            return;
        };
        sampled.asking = false;
        let news = sampled.record(&scrape, at);
        sampled.wait(
            Instant::now(),
            sampled.pause(self.periods, draining, steers),
        );
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

/// Leaves `room` of them, those that wait longest.
fn keep_longest(due: &mut Vec<Due<'_>>, room: usize) {
    if due.len() > room {
        due.select_nth_unstable_by(room, |one, other| other.waits.total_cmp(&one.waits));
        due.truncate(room);
    }
}

/// Whose pod it is and where it listens; none if it is not understood.
fn target(key: &Key, child: &ChildPod, has_started: bool) -> Option<(Key, Target)> {
    let pod = child.view()?;
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

impl Looked {
    /// Begins a look; how many questions may be asked that steer nothing. None where it is too early for a look.
    fn begin(&mut self, now: Instant, changes: u64, pods: usize) -> Option<usize> {
        let passed = now.saturating_duration_since(self.at);
        let calm = CALM_TICK_PER_POD * u32::try_from(pods).unwrap_or(u32::MAX);
        if self.changes == Some(changes) && passed < calm {
            return None;
        }
        self.changes = Some(changes);
        self.at = now;
        self.told_left =
            (self.told_left + passed.as_secs_f64() * TOLD_RATE_MAX).min(TOLD_BURST_MAX);
        Some(self.told_left as usize)
    }
}

impl Sampled {
    fn new(incarnation: u64, now: Instant) -> Self {
        Sampled {
            incarnation,
            samples: None,
            due: now,
            pause_ms: 0,
            silent: 0,
            asking: false,
        }
    }

    fn wait(&mut self, now: Instant, pause: Duration) {
        self.due = now + pause;
        self.pause_ms = pause.as_millis().try_into().unwrap_or(u32::MAX);
    }

    /// How many of its pauses it waits since it is due; none where it is not. A pod that begins to leave, whose pause is then
    /// `draining`, is due at once.
    fn waits(&self, now: Instant, draining: Option<Duration>) -> Option<f64> {
        let is_soon = draining.is_some_and(|pause| self.due > now + pause);
        if self.asking || (self.due > now && !is_soon) {
            return None;
        }
        let late = now.saturating_duration_since(self.due).as_millis() as f64;
        Some(late / f64::from(self.pause_ms).max(STARTING_PERIOD.as_millis() as f64))
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
        (base * (1 << u32::from(self.silent.min(6)))).min(SILENT_PERIOD_MAX)
    }
}

#[cfg(test)]
mod tests;
