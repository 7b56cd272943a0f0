//! Carries out the actions of a plan, in order, and tells the world what the API server answered.
//!
//! Creates that follow each other run concurrently with a slow start: one, two, four … up to [`CONCURRENCY_MAX`]. A
//! quota or an admission rule that refuses the first pod is then met once and not a thousand times. The first failure
//! ends the pass; whatever was done before it is harmless to repeat.
//!
//! A write to a pod whose answer was lost may have taken effect. Until the pod was read back nobody may plan for its
//! ModelDeployment: a plan that does not know of a create gives its index away twice, one that does not know of a drain
//! takes another replica away. [`Applier::settle`] reads back, and a pass begins with it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use operator_api::{ModelDeployment, ModelDeploymentStatus};
use operator_core::{Action, Kind, Object};
use serde_json::{Value, json};

use crate::error::{Category, Error};
use crate::watch::Key;
use crate::world::World;
use crate::write::{Writer, Written};

/// Creates under way at once for one ModelDeployment.
const CONCURRENCY_MAX: usize = 64;

/// How one action ended, for metrics and logs.
#[derive(Debug)]
pub struct Applied<'a> {
    /// The action.
    pub action: &'a Action,
    /// True: written now; false: an earlier pass had done it.
    pub result: Result<bool, Error>,
}

/// Applies plans.
#[derive(Clone)]
pub struct Applier {
    writer: Writer,
    world: Arc<World>,
    unsure: Arc<Unsure>,
}

/// Pods that may or may not be as a write wanted them.
#[derive(Debug, Default)]
struct Unsure(Mutex<BTreeSet<Key>>);

impl Unsure {
    fn add(&self, namespace: &str, pod: &str) {
        let mut pods = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pods.insert(Key::new(namespace, pod));
    }

    fn remove(&self, pod: &Key) {
        let mut pods = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pods.remove(pod);
    }

    /// Those that may be of `owner`: its pods are named `<its name>-…`, and so are those of longer names.
    fn of(&self, owner: &Key) -> Vec<Key> {
        let prefix = format!("{}-", owner.name);
        let pods = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pods.iter()
            .filter(|pod| pod.namespace == owner.namespace && pod.name.starts_with(&prefix))
            .cloned()
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
        }
    }

    /// Reads back the pods of `owner` whose last write has no known outcome.
    ///
    /// # Errors
    /// One of them cannot be read: nobody may plan yet.
    pub async fn settle(&self, owner: &Key) -> Result<(), Error> {
        for pod in self.unsure.of(owner) {
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

    /// Remembers a pod whose write failed in a way that does not say whether it took effect.
    fn doubt(&self, namespace: &str, pod: &str, error: &Error) {
        if matches!(
            error.category(),
            Category::Timeout | Category::Transport | Category::Server | Category::Malformed
        ) {
            self.unsure.add(namespace, pod);
        }
    }

    /// Carries out `actions` in `namespace`; `told` hears of each. Returns how many were written.
    ///
    /// # Errors
    /// The first call that failed; the actions after it were not tried.
    pub async fn apply(
        &self,
        namespace: &str,
        actions: &[Action],
        told: &(dyn Fn(&Applied<'_>) + Sync),
    ) -> Result<usize, Error> {
        let mut written = 0;
        let mut rest = actions;
        let mut width = 1;
        while !rest.is_empty() {
            let creates = rest
                .iter()
                .take_while(|action| matches!(action, Action::Create(_)))
                .count();
            let batch = creates.min(width).max(1);
            let (now, later) = rest.split_at(batch);
            let calls: Vec<_> = now
                .iter()
                .map(|action| self.one(namespace, action))
                .collect();
            let results = futures::future::join_all(calls).await;
            let mut failed = None;
            for applied in results {
                told(&applied);
                match applied.result {
                    Ok(true) => written += 1,
                    Ok(false) => {}
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
            if let Some(error) = failed {
                self.give_up(namespace, later);
                return Err(error);
            }
            width = if batch > 1 || creates > 0 {
                (width * 2).min(CONCURRENCY_MAX)
            } else {
                1
            };
            rest = later;
        }
        Ok(written)
    }

    /// Counts what the pods to be created will take, before any of them exists.
    pub fn assume(&self, namespace: &str, actions: &[Action]) {
        for action in actions {
            if let Action::Create(Object::Pod(pod)) = action {
                self.world.assume(namespace, pod);
            }
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

    /// Stores the status.
    ///
    /// # Errors
    /// The lease is lost, the object is gone, or the API server refuses or does not answer.
    pub async fn report(&self, key: &Key, status: &ModelDeploymentStatus) -> Result<(), Error> {
        let status = serde_json::to_value(status).unwrap_or_default();
        let stored: ModelDeployment = self
            .writer
            .apply_status("ModelDeployment", &key.namespace, &key.name, &status)
            .await?;
        self.world.wrote_deployment(stored);
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
            Action::Delete { kind, name, uid } => self.delete(namespace, *kind, name, uid).await,
        };
        Applied { action, result }
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
                self.unsure.add(namespace, object.name());
                Ok(false)
            }
            Err(error) => {
                self.world.unassume(namespace, object.name());
                self.doubt(namespace, object.name(), &error);
                Err(error)
            }
        }
    }

    async fn put(&self, namespace: &str, object: &Object) -> Result<bool, Error> {
        match object {
            Object::Pod(pod) => self
                .world
                .wrote_pod(self.writer.apply::<Pod>("Pod", namespace, pod).await?),
            Object::ConfigMap(map) => {
                let map = self
                    .writer
                    .apply::<ConfigMap>("ConfigMap", namespace, map)
                    .await?;
                self.world.wrote_config_map(map);
            }
            Object::Service(service) => {
                let service = self
                    .writer
                    .apply::<Service>("Service", namespace, service)
                    .await?;
                self.world.wrote_service(service);
            }
            Object::PodDisruptionBudget(budget) => {
                let budget = self
                    .writer
                    .apply::<PodDisruptionBudget>("PodDisruptionBudget", namespace, budget)
                    .await?;
                self.world.wrote_budget(budget);
            }
        }
        Ok(true)
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
        match self.writer.patch_pod(namespace, name, metadata).await {
            Ok(Written::Done(pod)) => {
                self.world.wrote_pod(pod);
                Ok(true)
            }
            Ok(Written::Already) => Ok(false),
            Err(error) => {
                self.doubt(namespace, name, &error);
                Err(error)
            }
        }
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
                deleted.inspect_err(|error| self.doubt(namespace, name, error))?
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
        };
        Ok(matches!(written, Written::Done(())))
    }
}

/// The verb of an action, for the metric label.
pub fn action_label(action: &Action) -> &'static str {
    match action {
        Action::Create(_) => "create",
        Action::Apply(_) => "apply",
        Action::PatchPod { .. } => "patch_pod",
        Action::Delete { .. } => "delete",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_in_doubt_are_found_by_their_owner() {
        let unsure = Unsure::default();
        for (namespace, pod) in [
            ("d", "m-0-abc-0"),
            ("d", "other-0-abc-0"),
            ("e", "m-0-abc-0"),
        ] {
            unsure.add(namespace, pod);
        }
        let owner = Key::new("d", "m");
        assert_eq!(unsure.of(&owner), [Key::new("d", "m-0-abc-0")]);
        unsure.remove(&Key::new("d", "m-0-abc-0"));
        assert!(unsure.of(&owner).is_empty());
    }
}
