//! Carries out the actions of a plan, in order, and tells the world what the API server answered.
//!
//! Actions of one sort that follow each other run concurrently: they are of different objects, and what needs them comes
//! after them. Creates that follow each other do so with a slow start: one, then one more for each that succeeded, up to
//! [`CONCURRENCY_MAX`]. A quota or an admission rule that refuses the first pod is then met once and not a thousand times.
//! The first failure ends the pass; whatever was done before it is harmless to repeat.
//!
//! A write to a pod whose answer was lost may have taken effect. Until the pod was read back nobody may plan for its
//! ModelDeployment: a plan that does not know of a create gives its index away twice, one that does not know of a drain
//! takes another replica away. [`Applier::settle`] reads back, and a pass begins with it. A create that got no answer
//! may even take effect after it was read back; it is therefore repeated first, and the pod is not deleted for [`HOLD`]:
//! while the name is taken, nothing can take effect late.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::resource::v1::ResourceClaimTemplate;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, OwnerReference};
use kube::Resource;
use kube::core::{NamespaceResourceScope, PartialObjectMeta};
use operator_api::{ModelDeployment, ModelDeploymentStatus};
use operator_core::{Action, Kind, Object};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::error::{Category, Error};
use crate::wakes::lock;
use crate::watch::Key;
use crate::world::World;
use crate::write::{Writer, Written};

/// Creates under way at once for one ModelDeployment.
const CONCURRENCY_MAX: usize = 64;

/// Services written at once, of all ModelDeployments. The API server (1.36) gives out cluster addresses one at a time and
/// holds a lock over each; what stands in that queue for longer than a call may take is lost work.
const SERVICES_MAX: usize = 8;

/// How long a create that got no answer may still take effect: API servers give up after a minute.
const HOLD: Duration = Duration::from_secs(70);

/// Pause before a plan that was made from old news is made anew.
const STALE_PAUSE: Duration = Duration::from_millis(20);

/// How one action ended, for metrics and logs.
#[derive(Debug)]
pub struct Applied<'a> {
    /// The action.
    pub action: &'a Action,
    /// True: written now; false: an earlier pass had done it.
    pub result: Result<bool, Error>,
}

/// What came of a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Actions that were written.
    pub written: usize,
    /// Set when the rest of the plan was not tried: after how long to plan again.
    pub again: Option<Duration>,
}

/// Applies plans.
#[derive(Clone)]
pub struct Applier {
    writer: Writer,
    world: Arc<World>,
    unsure: Arc<Unsure>,
    /// Pods of plans that were told and are not carried out yet, by ModelDeployment.
    told: Arc<Mutex<BTreeMap<Key, Vec<String>>>>,
    services: Arc<Semaphore>,
}

/// Pods that may or may not be as a write wanted them; those of a create that got no answer with what it was to make.
#[derive(Debug, Default)]
struct Unsure {
    pods: Mutex<BTreeMap<Key, Option<Box<Pod>>>>,
    /// Until when pods are not deleted because a create of theirs may still take effect.
    held: Mutex<BTreeMap<Key, Instant>>,
}

impl Unsure {
    fn add(&self, namespace: &str, pod: &str, created: Option<&Pod>) {
        let mut pods = lock(&self.pods);
        let entry = pods.entry(Key::new(namespace, pod)).or_default();
        if let Some(created) = created {
            *entry = Some(Box::new(created.clone()));
            let mut held = lock(&self.held);
            let now = Instant::now();
            held.retain(|_, until| *until > now);
            held.insert(Key::new(namespace, pod), now + HOLD);
        }
    }

    /// How long a delete has to wait because a create of that name may still take effect.
    fn held(&self, namespace: &str, action: &Action) -> Option<Duration> {
        let Action::Delete {
            kind: Kind::Pod,
            name,
            ..
        } = action
        else {
            return None;
        };
        let until = *lock(&self.held).get(&Key::new(namespace, name.as_str()))?;
        let left = until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    fn remove(&self, pod: &Key) {
        lock(&self.pods).remove(pod);
    }

    /// Those that may be of `owner`: its pods are named `<its name>-…`, and so are those of longer names.
    fn of(&self, owner: &Key) -> Vec<(Key, Option<Box<Pod>>)> {
        let prefix = format!("{}-", owner.name);
        lock(&self.pods)
            .iter()
            .filter(|(pod, _)| pod.namespace == owner.namespace && pod.name.starts_with(&prefix))
            .map(|(pod, created)| (pod.clone(), created.clone()))
            .collect()
    }
}

impl Applier {
    /// An applier that tells `world` what it wrote.
    pub fn new(writer: Writer, world: Arc<World>) -> Self {
        Applier {
            writer,
            world,
            unsure: Arc::default(),
            told: Arc::default(),
            services: Arc::new(Semaphore::new(SERVICES_MAX)),
        }
    }

    /// Reads back the pods of `owner` whose last write has no known outcome, and those that a list did not name though
    /// they were written while it was read.
    ///
    /// # Errors
    /// One of them cannot be read: nobody may plan yet.
    pub async fn settle(&self, owner: &Key) -> Result<(), Error> {
        for pod in self.world.take_doubted(owner) {
            self.unsure.add(&pod.namespace, &pod.name, None);
        }
        for (pod, created) in self.unsure.of(owner) {
            if let Some(created) = created
                && self.repeat(&pod, &created).await?
            {
                self.unsure.remove(&pod);
                continue;
            }
            let found = self
                .writer
                .read_back::<Pod>("Pod", &pod.namespace, &pod.name)
                .await?;
            match found {
                Some(found) => self.world.wrote_pod(found),
                // It was never made, or is gone; of a pod that was there the watch tells.
                None => self.world.unassume(&pod.namespace, &pod.name),
            }
            self.unsure.remove(&pod);
        }
        Ok(())
    }

    /// Repeats a create that got no answer; true when it is made now. Where the name is taken, or the API server refuses
    /// for good, what is there has to be read.
    async fn repeat(&self, key: &Key, pod: &Pod) -> Result<bool, Error> {
        match self.writer.create("Pod", &key.namespace, pod).await {
            Ok(Written::Done(pod)) => {
                self.world.wrote_pod(pod);
                Ok(true)
            }
            Ok(Written::Already) => Ok(false),
            Err(error) if error.is_open() || error.category() == Category::NotLeader => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// Remembers a pod whose write failed in a way that does not say whether it took effect.
    fn doubt(&self, namespace: &str, pod: &str, created: Option<&Pod>, error: &Error) {
        if error.is_open() {
            self.unsure.add(namespace, pod, created);
        }
    }

    /// Carries out `actions` in `namespace`; `told` hears of each.
    ///
    /// # Errors
    /// The first call that failed; the actions after it were not tried.
    pub async fn apply(
        &self,
        namespace: &str,
        actions: &[Action],
        told: &(dyn Fn(&Applied<'_>) + Sync),
    ) -> Result<Outcome, Error> {
        let mut written = 0;
        let mut rest = actions;
        let mut width = 1;
        while let Some(first) = rest.first() {
            let alike = rest[..together(rest)].iter();
            let free = alike.take_while(|action| self.unsure.held(namespace, action).is_none());
            let (now, later) = rest.split_at(free.count().max(1));
            let again = match self.unsure.held(namespace, first) {
                None if self.is_refuted(first).await? => Some(STALE_PAUSE),
                held => held,
            };
            if again.is_some() {
                self.give_up(namespace, rest);
                return Ok(Outcome { written, again });
            }
            let mut all = now.len().min(CONCURRENCY_MAX);
            let creates = matches!(first, Action::Create(_));
            let width = if creates { &mut width } else { &mut all };
            match self.run(namespace, now, width, told).await {
                (count, None) => written += count,
                (_, Some(error)) => {
                    self.give_up(namespace, later);
                    return Err(error);
                }
            }
            rest = later;
        }
        Ok(Outcome {
            written,
            again: None,
        })
    }

    /// Carries out actions of which the next ones do not wait for those before, at most `width` at once; each success lets
    /// one more be under way. How many were written, and the first failure, after which no further one was begun.
    async fn run(
        &self,
        namespace: &str,
        actions: &[Action],
        width: &mut usize,
        told: &(dyn Fn(&Applied<'_>) + Sync),
    ) -> (usize, Option<Error>) {
        let (mut written, mut failed) = (0, None);
        let mut calls = FuturesUnordered::new();
        let mut waiting = actions.iter();
        loop {
            while failed.is_none()
                && calls.len() < *width
                && let Some(action) = waiting.next()
            {
                calls.push(self.one(namespace, action));
            }
            let Some(applied) = calls.next().await else {
                break;
            };
            told(&applied);
            match applied.result {
                Ok(was_written) => {
                    written += usize::from(was_written);
                    *width = (*width + 1).min(CONCURRENCY_MAX);
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        self.give_up(namespace, waiting.as_slice());
        (written, failed)
    }

    /// Counts what the pods to be created will take, before any of them exists.
    pub fn assume(&self, namespace: &str, actions: &[Action]) {
        for action in actions {
            if let Action::Create(Object::Pod(pod)) = action {
                self.world.assume(namespace, pod);
            }
        }
    }

    /// Counts what the plan of `owner` takes, though a later pass will carry it out, until [`Applier::untell`].
    pub fn tell(&self, owner: &Key, actions: &[Action]) {
        self.assume(&owner.namespace, actions);
        let pods = actions.iter().filter_map(|action| match action {
            Action::Create(object @ Object::Pod(_)) => Some(object.name().to_owned()),
            _ => None,
        });
        lock(&self.told).insert(owner.clone(), pods.collect());
    }

    /// Takes back what [`Applier::tell`] counted: the next plan of `owner` is about to be made, or none ever.
    pub fn untell(&self, owner: &Key) {
        for pod in lock(&self.told).remove(owner).unwrap_or_default() {
            self.world.unassume(&owner.namespace, &pod);
        }
    }

    /// Takes back what was counted for pods that will not be created now.
    pub fn give_up(&self, namespace: &str, actions: &[Action]) {
        for action in actions {
            if let Action::Create(object @ Object::Pod(_)) = action {
                self.world.unassume(namespace, object.name());
            }
        }
    }

    /// Makes the status `wanted`, where `stored` is what was last seen of it.
    ///
    /// # Errors
    /// The lease is lost, the object is gone, or the API server refuses or does not answer.
    pub async fn report(
        &self,
        key: &Key,
        stored: &ModelDeploymentStatus,
        wanted: &ModelDeploymentStatus,
    ) -> Result<(), Error> {
        let value = |status| serde_json::to_value(status).unwrap_or_default();
        let (stored, wanted) = (value(stored), value(wanted));
        let stored: ModelDeployment = self
            .writer
            .merge_status(
                "ModelDeployment",
                &key.namespace,
                &key.name,
                &stored,
                wanted,
            )
            .await?;
        self.world.wrote_deployment(stored);
        Ok(())
    }

    /// Makes the conditions of an object that is not understood `conditions`, and its message; nothing else of it is known.
    ///
    /// # Errors
    /// The lease is lost, the object is gone, or the API server refuses or does not answer.
    pub async fn report_malformed(
        &self,
        key: &Key,
        conditions: &[Condition],
        message: &str,
    ) -> Result<(), Error> {
        let wanted = json!({ "conditions": conditions, "message": message });
        self.writer
            .merge_status::<PartialObjectMeta<ModelDeployment>>(
                "ModelDeployment",
                &key.namespace,
                &key.name,
                &Value::Null,
                wanted,
            )
            .await?;
        Ok(())
    }

    async fn one<'a>(&self, namespace: &str, action: &'a Action) -> Applied<'a> {
        let result = match action {
            Action::Create(object) => self.create(namespace, object).await,
            Action::Apply(object) => self.put(namespace, object).await,
            Action::PatchPod {
                name,
                uid,
                labels,
                annotations,
            } => {
                self.patch_pod(namespace, name, uid, labels, annotations)
                    .await
            }
            Action::Release { name, uid } => self.release(namespace, name, uid).await,
            Action::Adopt {
                kind,
                name,
                uid,
                owner,
            } => self.adopt(namespace, *kind, name, uid, owner).await,
            Action::Delete {
                kind,
                name,
                uid,
                if_silent: _,
            } => self.delete(namespace, *kind, name, uid).await,
        };
        Applied { action, result }
    }

    /// Whether what an action supposes about a node is not so by a fresh read; what that finds goes into the world, so
    /// that the next plan knows it too.
    async fn is_refuted(&self, action: &Action) -> Result<bool, Error> {
        let Action::Delete {
            if_silent: Some(name),
            ..
        } = action
        else {
            return Ok(false);
        };
        let Some(node) = self.writer.read_node(name).await? else {
            return Ok(false);
        };
        let is_ready = operator_core::NodeView::of(&node).ready;
        if is_ready {
            tracing::info!(%action, node = name, "the node answers again; the plan is made anew");
            self.world.read_node(node);
        }
        Ok(is_ready)
    }

    async fn create(&self, namespace: &str, object: &Object) -> Result<bool, Error> {
        let Object::Pod(pod) = object else {
            return self.put(namespace, object).await;
        };
        match self.writer.create("Pod", namespace, pod.as_ref()).await {
            Ok(Written::Done(pod)) => {
                self.world.wrote_pod(pod);
                Ok(true)
            }
            Ok(Written::Already) => {
                // An earlier attempt of ours, or an earlier life; what is there may be older than the plan.
                self.unsure.add(namespace, object.name(), None);
                Ok(false)
            }
            Err(error) => {
                self.world.unassume(namespace, object.name());
                self.doubt(namespace, object.name(), Some(pod), &error);
                Err(error)
            }
        }
    }

    async fn put(&self, namespace: &str, object: &Object) -> Result<bool, Error> {
        let world = &self.world;
        let key = Key::new(namespace, object.name());
        match object {
            Object::Pod(pod) => {
                world.wrote_pod(self.writer.apply::<Pod>("Pod", namespace, pod).await?)
            }
            Object::ConfigMap(map) => {
                let known = world.config_maps.get(&key).is_some();
                world.wrote_config_map(
                    self.bring("ConfigMap", namespace, map.as_ref(), known)
                        .await?,
                );
            }
            Object::Service(service) => {
                // It is never closed.
                let _turn = self.services.acquire().await;
                let known = world.services.get(&key).is_some();
                world.wrote_service(
                    self.bring("Service", namespace, service.as_ref(), known)
                        .await?,
                );
            }
            Object::PodDisruptionBudget(budget) => {
                let known = world.budgets.get(&key).is_some();
                let kind = "PodDisruptionBudget";
                world.wrote_budget(self.bring(kind, namespace, budget.as_ref(), known).await?);
            }
            Object::NetworkPolicy(policy) => {
                let known = world.policies.get(&key).is_some();
                let kind = "NetworkPolicy";
                world.wrote_policy(self.bring(kind, namespace, policy.as_ref(), known).await?);
            }
            Object::ResourceClaimTemplate(template) => {
                let kind = "ResourceClaimTemplate";
                let template = self
                    .bring(kind, namespace, template.as_ref(), false)
                    .await?;
                world.wrote_claim_template(template);
            }
        }
        Ok(true)
    }

    /// Makes an object as wanted. One that was never seen is created, which costs the API server a tenth of a server-side
    /// apply; where it is there nevertheless, it is applied.
    async fn bring<K>(
        &self,
        kind: &'static str,
        namespace: &str,
        object: &K,
        is_known: bool,
    ) -> Result<K, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + Serialize
            + DeserializeOwned,
    {
        if !is_known
            && let Written::Done(object) = self.writer.create(kind, namespace, object).await?
        {
            return Ok(object);
        }
        self.writer.apply(kind, namespace, object).await
    }

    async fn release(&self, namespace: &str, name: &str, uid: &str) -> Result<bool, Error> {
        let written = self.writer.release_pod(namespace, name, uid).await;
        self.patched(namespace, name, written)
    }

    async fn patch_pod(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
        labels: &BTreeMap<String, String>,
        annotations: &BTreeMap<String, Option<String>>,
    ) -> Result<bool, Error> {
        let metadata: Value = json!({ "uid": uid, "labels": labels, "annotations": annotations });
        let written = self.writer.patch_pod(namespace, name, metadata).await;
        self.patched(namespace, name, written)
    }

    /// Keeps a pod as a patch left it; whether it was changed.
    fn patched(
        &self,
        namespace: &str,
        name: &str,
        written: Result<Written<Pod>, Error>,
    ) -> Result<bool, Error> {
        match written {
            Ok(Written::Done(pod)) => {
                self.world.wrote_pod(pod);
                Ok(true)
            }
            Ok(Written::Already) => Ok(false),
            Err(error) => {
                self.doubt(namespace, name, None, &error);
                Err(error)
            }
        }
    }

    async fn adopt(
        &self,
        namespace: &str,
        kind: Kind,
        name: &str,
        uid: &str,
        owner: &OwnerReference,
    ) -> Result<bool, Error> {
        let (writer, world) = (&self.writer, &self.world);
        let word = kind.as_str();
        let is_written = match kind {
            Kind::ConfigMap => {
                let written = writer.adopt(word, namespace, name, uid, owner).await?;
                done(written).map(|map| world.wrote_config_map(map))
            }
            Kind::ResourceClaimTemplate => {
                let written = writer.adopt(word, namespace, name, uid, owner).await?;
                done(written).map(|template| world.wrote_claim_template(template))
            }
            // Of the others none is adopted: they are applied.
            _ => {
                let written = writer.adopt(word, namespace, name, uid, owner).await;
                return self.patched(namespace, name, written);
            }
        };
        Ok(is_written.is_some())
    }

    async fn delete(
        &self,
        namespace: &str,
        kind: Kind,
        name: &str,
        uid: &str,
    ) -> Result<bool, Error> {
        let writer = &self.writer;
        let word = kind.as_str();
        let written = match kind {
            Kind::Pod => {
                let deleted = writer.delete::<Pod>(word, namespace, name, uid).await;
                deleted.inspect_err(|error| self.doubt(namespace, name, None, error))?
            }
            Kind::ConfigMap => {
                writer
                    .delete::<ConfigMap>(word, namespace, name, uid)
                    .await?
            }
            Kind::Service => writer.delete::<Service>(word, namespace, name, uid).await?,
            Kind::PodDisruptionBudget => {
                writer
                    .delete::<PodDisruptionBudget>(word, namespace, name, uid)
                    .await?
            }
            Kind::NetworkPolicy => {
                writer
                    .delete::<NetworkPolicy>(word, namespace, name, uid)
                    .await?
            }
            Kind::ResourceClaimTemplate => {
                writer
                    .delete::<ResourceClaimTemplate>(word, namespace, name, uid)
                    .await?
            }
        };
        Ok(matches!(written, Written::Done(())))
    }
}

fn done<T>(written: Written<T>) -> Option<T> {
    match written {
        Written::Done(object) => Some(object),
        Written::Already => None,
    }
}

/// How many of the next actions may be under way together: those of one sort that do not build on each other. A delete that
/// supposes something about a node is looked at alone.
fn together(actions: &[Action]) -> usize {
    let sort = |action: &Action| match action {
        Action::Create(_) => 1,
        Action::Apply(Object::Pod(_)) => 0,
        Action::Apply(_) => 2,
        Action::PatchPod { .. } => 3,
        Action::Delete {
            kind: Kind::Pod,
            if_silent: None,
            ..
        } => 4,
        Action::Adopt { .. } => 5,
        Action::Delete { .. } | Action::Release { .. } => 0,
    };
    let first = actions.first().map_or(0, sort);
    let alike = actions.iter().take_while(|action| sort(action) == first);
    if first == 0 { 1 } else { alike.count() }
}

/// The verb of an action, for the metric label.
pub fn action_label(action: &Action) -> &'static str {
    match action {
        Action::Create(_) => "create",
        Action::Apply(_) => "apply",
        Action::PatchPod { .. } => "patch_pod",
        Action::Release { .. } => "release_pod",
        Action::Adopt { .. } => "adopt",
        Action::Delete { .. } => "delete",
    }
}

#[cfg(test)]
mod settling;
#[cfg(test)]
mod tests;
