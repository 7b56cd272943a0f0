//! The controller loop: observe → decide → apply → report, one pass per ModelDeployment that something happened to.
//!
//! Every decision is `operator_core::plan`'s; this file only says when it is asked and carries out what it answers.
//! Observing and deciding happen under one lock and take microseconds; what a decision will take from a node is counted
//! before the lock is let go, so that two decisions never give away the same GPU. Applying runs concurrently.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use operator_api::{ModelDeployment, Reason};
use operator_core::status::{self, Refusal};
use operator_core::{EventKind, Plan, Settings};
use operator_k8s::apply::{Applied, Applier, action_label};
use operator_k8s::error::{Category, Error};
use operator_k8s::events::{Message, Recorder, Severity};
use operator_k8s::lease::Leadership;
use operator_k8s::read::Reader;
use operator_k8s::sampling::Sampler;
use operator_k8s::watch::{Key, Malformed};
use operator_k8s::world::{Observations, World};
use tokio::sync::Mutex;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;

use crate::admin::Health;
use crate::memory::{self, Memory};
use crate::metrics::{Metrics, Outcome};
use crate::queue::Queue;

mod telling;

use telling::{TOLD_PAUSE, Told, is_news, same};

/// Changes that come together are looked at together.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// How many times as long as its last pass a ModelDeployment is left alone: a thousand pods that become ready one by one
/// would otherwise cause a plan of all and a status each.
const REST_FACTOR: u32 = 8;
/// Longest such rest.
const REST_MAX: Duration = Duration::from_secs(1);
/// How soon the status is made anew when nothing is refused any more.
const ALLOWED_PAUSE: Duration = Duration::from_millis(100);
/// How soon a status that was not written is tried again where nothing else is to be done.
const UNTOLD_PAUSE: Duration = Duration::from_secs(30);
/// A look at everything now and then, in case a change was never told.
const RESYNC: Duration = Duration::from_secs(600);
/// How often the loop turns when nothing happens.
const TURN: Duration = Duration::from_secs(1);
/// Writes from which on a pass leaves much free memory behind.
const BULK: usize = 32;
/// How often it turns while the first lists are being read.
const WARM_UP_TURN: Duration = Duration::from_millis(20);

/// Everything a pass needs.
pub struct Controller {
    /// What is observed.
    pub world: Arc<World>,
    /// Who writes.
    pub applier: Applier,
    /// Who reads what is not watched.
    pub reader: Reader,
    /// What engine pods say.
    pub sampler: Arc<Sampler>,
    /// Who tells people.
    pub recorder: Recorder,
    /// Whether we may write.
    pub leadership: Leadership,
    /// What is counted.
    pub metrics: Metrics,
    /// Whether the loop turns.
    pub health: Health,
    /// When free memory is given back.
    pub memory: Memory,
    /// Passes at once.
    pub workers: usize,
    /// The operator's own configuration.
    pub settings: Settings,
}

/// A pass that did not fail.
enum Done {
    /// The next look, when one is wanted.
    Settled(Option<Duration>),
    /// The same, after a pass that decided and took so long.
    Decided(Option<Duration>, Duration),
    /// The object is gone.
    Gone,
}

/// What passes share.
struct Shared {
    controller: Controller,
    deciding: Mutex<()>,
    /// Whether many are looked at, or wait to be.
    is_crowded: AtomicBool,
    /// What the API server refused, by ModelDeployment, until a pass over it succeeds.
    refused: std::sync::Mutex<HashMap<Key, Refusal>>,
    told: std::sync::Mutex<Told>,
}

impl Controller {
    /// Works until `stop`, then waits at most `patience` for the passes under way.
    pub async fn run(self, stop: impl Future<Output = ()>, patience: Duration) {
        let started = Instant::now();
        let workers = self.workers;
        let shared = Arc::new(Shared {
            controller: self,
            deciding: Mutex::new(()),
            is_crowded: AtomicBool::new(false),
            refused: std::sync::Mutex::default(),
            told: std::sync::Mutex::default(),
        });
        let this = &shared.controller;
        let mut queue: Queue<Key> = Queue::default();
        let mut passes: JoinSet<Result<Done, Error>> = JoinSet::new();
        let mut keys: HashMap<Id, Key> = HashMap::new();
        let mut leading = false;
        let mut released = Duration::ZERO;
        let mut leadership = this.leadership.clone();
        tokio::pin!(stop);
        loop {
            this.health.turned();
            let now = started.elapsed();
            let may_work = this.leadership.is_held() && this.world.waiting_for().is_empty();
            if may_work && !leading {
                // What happened while another operator led is not known one by one: look at everything.
                tracing::info!(
                    model_deployments = this.world.deployments.read().len(),
                    "leading"
                );
                for key in this.world.deployments.read().keys() {
                    queue.ask(key, now);
                }
                this.memory.used();
            }
            leading = may_work;
            for key in this.world.take_woken() {
                queue.ask(&key, now + DEBOUNCE);
            }
            while may_work && passes.len() < workers {
                let Some(key) = queue.take(started.elapsed()) else {
                    break;
                };
                let shared = Arc::clone(&shared);
                let task = passes.spawn({
                    let key = key.clone();
                    async move { shared.pass(key).await }
                });
                keys.insert(task.id(), key);
            }
            let depth = queue.depth(now);
            this.metrics.queue(depth);
            let is_crowded = depth > 0 || passes.len() > workers / 4;
            shared.is_crowded.store(is_crowded, Ordering::Relaxed);
            if this.world.tidy() {
                this.memory.used();
            }
            if this.memory.is_due(now - released) {
                memory::release();
                released = now;
            }
            let full = passes.len() >= workers;
            let pause = match queue.next_due() {
                Some(due) if may_work && !full => due.saturating_sub(started.elapsed()).min(TURN),
                // The first lists are about to be complete.
                _ if this.leadership.is_held() && !may_work => WARM_UP_TURN,
                _ => TURN,
            };
            tokio::select! {
                () = &mut stop => break,
                Some(ended) = passes.join_next_with_id(), if !passes.is_empty() => {
                    settle(&mut queue, &mut keys, ended, started.elapsed());
                }
                () = this.world.woken() => {}
                () = leadership.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        let rest = async { while passes.join_next().await.is_some() {} };
        if tokio::time::timeout(patience, rest).await.is_err() {
            tracing::warn!("passes were still under way; the next operator repeats them");
        }
    }
}

/// Books the end of a pass. A pass that panicked counts as failed: a bug met by one object must not stop the others,
/// and must not be met again and again without a pause.
fn settle(
    queue: &mut Queue<Key>,
    keys: &mut HashMap<Id, Key>,
    ended: Result<(Id, Result<Done, Error>), JoinError>,
    now: Duration,
) {
    let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
    let Some(key) = keys.remove(&id) else { return };
    let failure = match ended {
        Ok((_, Ok(done @ (Done::Settled(_) | Done::Decided(..))))) => {
            let (again, took) = match done {
                Done::Decided(again, took) => (again, took),
                Done::Settled(again) => (again, Duration::ZERO),
                Done::Gone => (None, Duration::ZERO),
            };
            let held_until = now + (took * REST_FACTOR).min(REST_MAX);
            let again = now + again.unwrap_or(RESYNC).min(RESYNC);
            return queue.done(&key, Some(again), held_until);
        }
        Ok((_, Ok(Done::Gone))) => return queue.forget(&key),
        Ok((_, Err(error))) => format!("{}: {error}", error.category().as_str()),
        Err(error) => format!("bug: {error}"),
    };
    let pause = queue.failed(&key, now, operator_k8s::retry::jitter());
    tracing::warn!(deployment = %key, failure, pause_ms = pause.as_millis(), "pass failed");
}

impl Shared {
    async fn pass(&self, key: Key) -> Result<Done, Error> {
        let this = &self.controller;
        let timer = this.metrics.pass();
        let deployment = match this.world.deployment(&key) {
            None => {
                this.metrics.forget(&key.namespace, &key.name);
                this.world.waits_for_room(&key, false);
                this.applier.untell(&key);
                self.refused().remove(&key);
                self.told().forget(&key);
                timer.ended(Outcome::Gone);
                return Ok(Done::Gone);
            }
            Some(Err(malformed)) => {
                let again = self.tell_malformed(&key, &malformed).await;
                this.applier.untell(&key);
                timer.ended(Outcome::Malformed);
                return Ok(Done::Settled(again));
            }
            Some(Ok(deployment)) => deployment,
        };
        // Kubernetes' garbage collector removes the children; making new ones would race with it.
        if deployment.metadata.deletion_timestamp.is_some() {
            this.applier.untell(&key);
            timer.ended(Outcome::Unchanged);
            return Ok(Done::Settled(None));
        }
        let uid = deployment.metadata.uid.clone().unwrap_or_default();
        match self.reconcile(&key, deployment).await {
            Ok((wrote, again)) => {
                let took = timer.ended(if wrote {
                    Outcome::Applied
                } else {
                    Outcome::Unchanged
                });
                tracing::debug!(deployment = %key, wrote, micros = took.as_micros(), "pass ended");
                Ok(Done::Decided(again, took))
            }
            Err(error) => {
                timer.ended(Outcome::Failed);
                this.metrics.error(error.category());
                // A lost lease is the operator's own affair.
                if error.category() != Category::NotLeader {
                    let refusal = error.refusal();
                    let told = refusal.as_ref().map(|refusal| refusal.message.clone());
                    this.recorder.say(Message {
                        regarding: reference(&key, &uid),
                        severity: Severity::Warning,
                        reason: error.category().reason().to_string(),
                        action: "Reconcile".into(),
                        note: told.unwrap_or_else(|| error.to_string()),
                    });
                    if let Some(refusal) = refusal {
                        self.tell_refused(&key, refusal).await;
                    }
                }
                Err(error)
            }
        }
    }

    /// One pass; returns whether anything was written and when to look again.
    async fn reconcile(
        &self,
        key: &Key,
        deployment: Arc<ModelDeployment>,
    ) -> Result<(bool, Option<Duration>), Error> {
        let this = &self.controller;
        let waits = self.told().waits(key, Instant::now());
        if waits.is_some() {
            return Ok((false, waits));
        }
        this.applier.settle(key).await?;
        let model_config = match &deployment.spec.model.config_map_ref {
            None => None,
            Some(reference) => {
                this.reader
                    .config_map(&key.namespace, &reference.name)
                    .await?
            }
        };
        let only_tells;
        let plan = {
            let _deciding = self.deciding.lock().await;
            let seen = Observations {
                model_config,
                samples: this.sampler.of(key),
                demand: this.sampler.demand(key),
                refusal: self.refused().get(key).cloned(),
            };
            this.applier.untell(key);
            let now = operator_k8s::now();
            let snapshot = this.world.snapshot(key, Arc::clone(&deployment), seen, now);
            let mut plan = operator_core::plan(&snapshot, &this.settings);
            // What the plan takes is counted below, in the very cluster that the snapshot shares.
            drop(snapshot);
            only_tells = self.only_tells(&deployment, &plan);
            if only_tells {
                this.applier.tell(key, &std::mem::take(&mut plan.actions));
                self.told().tell(key, Instant::now());
                plan.wake_after = Some(TOLD_PAUSE);
            }
            this.applier.assume(&key.namespace, &plan.actions);
            plan
        };
        tracing::trace!(deployment = %key, %plan, "decided");
        let Plan {
            actions,
            status,
            events,
            wake_after,
        } = plan;
        let uid = deployment.metadata.uid.clone().unwrap_or_default();
        let stored = deployment.status.clone().unwrap_or_default();
        let report = !same(&stored, &status);
        // The status says what was decided, whatever comes of it, and does not wait for the writes: of many
        // ModelDeployments that were applied at once, each has its plan in its status before the first pods are made.
        let reporting = async {
            if !report {
                return Ok(());
            }
            let reported = this.applier.report(key, &stored, &status).await;
            let result = if reported.is_ok() { "done" } else { "failed" };
            this.metrics.action("report", result);
            reported
        };
        let told = |applied: &Applied<'_>| self.count(key, applied);
        let applying = this.applier.apply(&key.namespace, &actions, &told);
        let (reported, applied) = tokio::join!(reporting, applying);
        if applied.is_err() {
            this.applier.give_up(&key.namespace, &actions);
        }
        if actions.len() > BULK {
            this.memory.used();
        }
        this.world.waits_for_room(key, waits_for_room(&status));
        this.metrics.replicas(
            &key.namespace,
            &key.name,
            i64::from(status.wanted_replicas.unwrap_or(0)),
            i64::from(status.ready_replicas.unwrap_or(0)),
        );
        let applied = applied?;
        match reported {
            // Deleted meanwhile.
            Err(error) if error.category() == Category::NotFound => {}
            other => other?,
        }
        for event in events {
            this.recorder.say(Message {
                regarding: reference(key, &uid),
                severity: match event.kind {
                    EventKind::Normal => Severity::Normal,
                    EventKind::Warning => Severity::Warning,
                },
                reason: event.reason.to_string(),
                action: "Reconcile".into(),
                note: event.note,
            });
        }
        // All that was wanted was allowed; the status tells so after the next look.
        let all_tried = !only_tells && applied.again.is_none();
        let is_allowed = all_tried && self.refused().remove(key).is_some();
        let again = applied.again.or(wake_after);
        let again = again
            .into_iter()
            .chain(is_allowed.then_some(ALLOWED_PAUSE))
            .min();
        Ok((applied.written > 0 || report, again))
    }

    /// Whether a pass over a new generation ends with its status, and its writes wait for the next one: while many
    /// wait, people learn of each what is planned before anything is made of any. Its places are counted meanwhile.
    fn only_tells(&self, deployment: &ModelDeployment, plan: &Plan) -> bool {
        let observed = |status: &operator_api::ModelDeploymentStatus| status.observed_generation;
        let told = deployment.status.as_ref().and_then(observed);
        self.is_crowded.load(Ordering::Relaxed) && is_news(told, observed(&plan.status))
    }

    fn count(&self, key: &Key, applied: &Applied<'_>) {
        let result = match &applied.result {
            Ok(true) => "done",
            Ok(false) => "already",
            Err(_) => "failed",
        };
        self.controller
            .metrics
            .action(action_label(applied.action), result);
        tracing::info!(deployment = %key, action = %applied.action, result, "applied");
    }

    fn refused(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Refusal>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of a refusal in the status, unless it tells so already, and in the plans to come.
    async fn tell_refused(&self, key: &Key, refusal: Refusal) {
        self.refused().insert(key.clone(), refusal.clone());
        let this = &self.controller;
        let Some(Ok(deployment)) = this.world.deployment(key) else {
            return;
        };
        let stored = deployment.status.clone().unwrap_or_default();
        let generation = deployment.metadata.generation;
        let wanted = status::with_refusal(&stored, &refusal, generation, operator_k8s::now());
        if same(&stored, &wanted) {
            return;
        }
        let reported = this.applier.report(key, &stored, &wanted).await;
        self.count_report(key, &reported);
    }

    /// Tells in events and in the status that an object is not understood; when to try again what could not be told.
    async fn tell_malformed(&self, key: &Key, malformed: &Malformed) -> Option<Duration> {
        tracing::warn!(deployment = %key, why = %malformed.message, "ModelDeployment is not understood");
        let words = format!(
            "{}. Correct the field, or remove it and apply again; replicas that run are left as they are",
            malformed.message
        );
        self.controller.recorder.say(Message {
            regarding: reference(key, &malformed.uid),
            severity: Severity::Warning,
            reason: Reason::SpecNotUnderstood.as_str().into(),
            action: "Reconcile".into(),
            note: words.clone(),
        });
        let stored = malformed.conditions.as_ref()?;
        let now = operator_k8s::now();
        let wanted = status::not_understood(stored, &words, malformed.generation, now);
        if *stored == wanted {
            return None;
        }
        let applier = &self.controller.applier;
        let reported = applier.report_malformed(key, &wanted, &words).await;
        self.count_report(key, &reported);
        reported.is_err().then_some(UNTOLD_PAUSE)
    }

    fn count_report(&self, key: &Key, reported: &Result<(), Error>) {
        let result = if reported.is_ok() { "done" } else { "failed" };
        self.controller.metrics.action("report", result);
        if let Err(error) = reported {
            tracing::warn!(deployment = %key, %error, "trouble is not told in the status");
        }
    }
}

fn waits_for_room(status: &operator_api::ModelDeploymentStatus) -> bool {
    let waiting: BTreeSet<&str> = [
        "NoNodeFits",
        "MemoryDoesNotFit",
        "GpuQuotaExceeded",
        "Preempting",
        "Preempted",
    ]
    .into();
    status
        .conditions
        .iter()
        .any(|c| c.type_ == "Planned" && c.status == "False" && waiting.contains(c.reason.as_str()))
}

fn reference(key: &Key, uid: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some(format!("{}/{}", operator_api::GROUP, operator_api::VERSION)),
        kind: Some(operator_api::KIND.into()),
        namespace: Some(key.namespace.to_string()),
        name: Some(key.name.to_string()),
        uid: Some(uid.to_string()),
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod passes;

#[cfg(test)]
mod tests {
    use super::*;

    /// What a queue holds of a key after a pass that ended like this 100 s after the start.
    async fn booked(
        end: impl Future<Output = Result<Done, Error>> + Send + 'static,
    ) -> Option<Duration> {
        let (mut queue, mut keys) = (Queue::default(), HashMap::new());
        let (key, now) = (Key::new("d", "m"), Duration::from_secs(100));
        queue.ask(&key, now);
        queue.take(now);
        let mut passes = JoinSet::new();
        keys.insert(passes.spawn(end).id(), key.clone());
        let ended = passes.join_next_with_id().await.expect("a pass");
        settle(&mut queue, &mut keys, ended, now);
        assert!(keys.is_empty(), "it is booked once");
        // Someone asks at once, of whoever is not gone.
        let due = queue.next_due()?;
        queue.ask(&key, now);
        let soon = queue.next_due()?;
        assert!(soon >= now && soon <= due);
        Some(soon - now)
    }

    #[tokio::test]
    async fn a_pass_that_failed_or_panicked_is_repeated_after_a_pause() {
        let call = operator_k8s::error::Call::on("get", "Pod", "d", "p");
        let failed = booked(async { Err(Error::NotLeader { call }) }).await;
        let panicked = booked(async { std::panic::resume_unwind(Box::new("a bug")) }).await;
        for pause in [failed, panicked] {
            assert!(
                pause.is_some_and(|pause| pause > Duration::from_millis(300)),
                "{pause:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_pass_is_followed_by_a_rest_that_is_short_and_who_is_gone_is_forgotten() {
        let decided = |took| async move { Ok(Done::Decided(None, Duration::from_millis(took))) };
        assert_eq!(
            booked(decided(10)).await,
            Some(10 * REST_FACTOR * Duration::from_millis(1))
        );
        assert_eq!(booked(decided(60_000)).await, Some(REST_MAX));
        assert_eq!(
            booked(async { Ok(Done::Settled(None)) }).await,
            Some(Duration::ZERO)
        );
        assert_eq!(booked(async { Ok(Done::Gone) }).await, None);
    }

    #[tokio::test]
    async fn everything_is_looked_at_now_and_then_whatever_a_plan_says() {
        for again in [None, Some(Duration::from_secs(86_400))] {
            let (mut queue, key) = (Queue::default(), Key::new("d", "m"));
            queue.ask(&key, Duration::ZERO);
            queue.take(Duration::ZERO);
            let mut passes = JoinSet::new();
            let pass = passes.spawn(async move { Ok(Done::Settled(again)) });
            let mut keys = HashMap::from([(pass.id(), key)]);
            let ended = passes.join_next_with_id().await.expect("a pass");
            settle(&mut queue, &mut keys, ended, Duration::ZERO);
            assert_eq!(queue.next_due(), Some(RESYNC));
        }
    }

    #[test]
    fn those_whose_plan_lacks_room_wait_for_it() {
        let status = |reason: &str, status: &str| -> operator_api::ModelDeploymentStatus {
            serde_json::from_value(
                serde_json::json!({"conditions": [{"type": "Planned", "status": status,
                "reason": reason, "message": "", "lastTransitionTime": "2026-11-24T00:00:00Z"}]}),
            )
            .expect("a status")
        };
        for reason in [
            "NoNodeFits",
            "MemoryDoesNotFit",
            "GpuQuotaExceeded",
            "Preempting",
            "Preempted",
        ] {
            assert!(waits_for_room(&status(reason, "False")), "{reason}");
            assert!(!waits_for_room(&status(reason, "True")), "{reason}");
        }
        assert!(!waits_for_room(&status("SpecInvalid", "False")));
    }
}
