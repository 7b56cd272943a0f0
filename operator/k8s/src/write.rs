//! Writes to the cluster: each safe to repeat, guarded by the lease, told apart by what they met.
//!
//! - **create** (pods): POST with a deterministic name. A 409 means that an earlier pass, or an earlier life of this
//!   operator, already did it. Server-side apply would silently change a pod that is there.
//! - **apply** (config maps, services, disruption budgets): server-side apply with force, as the only manager of the
//!   fields we name; nothing else is touched.
//! - **report** (the status): a merge patch of all of it, since nobody else writes there. Server-side apply of a status
//!   cost the API server several times as much, and a status is written more often than anything else.
//! - **adopt** (children that nothing controls): a strategic merge patch with the uid, which adds an owner to those there are.
//! - **delete**: with the uid as a precondition, so that a successor of the same name is never hit. 404 and a uid that
//!   does not match mean it is already gone.

use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, Resource};
use operator_core::names;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::FIELD_MANAGER;
use crate::error::{Call, Category, Error};
use crate::lease::Leadership;
use crate::retry::RetryPolicy;

/// What a write met.
#[derive(Clone, Debug, PartialEq)]
pub enum Written<T> {
    /// It was carried out; the API server's answer.
    Done(T),
    /// It had been carried out before.
    Already,
}

/// Carries out writes while the lease is held.
#[derive(Clone)]
pub struct Writer {
    client: Client,
    leadership: Leadership,
}

impl Writer {
    /// A writer that stops when `leadership` ends.
    pub fn new(client: Client, leadership: Leadership) -> Self {
        Writer { client, leadership }
    }

    /// Whether writes are allowed now.
    pub fn may_write(&self) -> bool {
        self.leadership.is_held()
    }

    fn guard(&self, call: &Call) -> Result<(), Error> {
        if self.leadership.is_held() {
            Ok(())
        } else {
            Err(Error::NotLeader { call: call.clone() })
        }
    }

    /// Creates an object of a deterministic name.
    ///
    /// # Errors
    /// The lease is lost, or the API server refuses or does not answer.
    pub async fn create<K>(
        &self,
        kind: &'static str,
        namespace: &str,
        object: &K,
    ) -> Result<Written<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + Serialize
            + DeserializeOwned,
    {
        let name = object.meta().name.clone().unwrap_or_default();
        let call = Call::on("create", kind, namespace, &name);
        self.guard(&call)?;
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let parameters = PostParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PostParams::default()
        };
        match RetryPolicy::CALL
            .run(&call, || api.create(&parameters, object))
            .await
        {
            Ok(created) => Ok(Written::Done(created)),
            Err(error) if error.category() == Category::AlreadyExists => Ok(Written::Already),
            Err(error) => Err(error),
        }
    }

    /// The object as it is now; none when there is none. For a write whose outcome is not known.
    ///
    /// # Errors
    /// The API server refuses or does not answer.
    pub async fn read_back<K>(
        &self,
        kind: &'static str,
        namespace: &str,
        name: &str,
    ) -> Result<Option<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + DeserializeOwned,
    {
        // A list of one, which the right to list and watch allows; the newest, not a cached one.
        let call = Call::on("list", kind, namespace, name);
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let parameters = ListParams::default().fields(&format!("metadata.name={name}"));
        let found = RetryPolicy::CALL
            .run(&call, || api.list(&parameters))
            .await?;
        Ok(found.items.into_iter().next())
    }

    /// A node as it is now; none when there is none.
    ///
    /// # Errors
    /// The API server refuses or does not answer.
    pub async fn read_node(&self, name: &str) -> Result<Option<Node>, Error> {
        let call = Call::on("get", "Node", "", name);
        let api: Api<Node> = Api::all(self.client.clone());
        let parameters = ListParams::default().fields(&format!("metadata.name={name}"));
        let found = RetryPolicy::CALL
            .run(&call, || api.list(&parameters))
            .await?;
        Ok(found.items.into_iter().next())
    }

    /// Makes the object's fields what is given, creating it when it is not there.
    ///
    /// # Errors
    /// The lease is lost, or the API server refuses or does not answer.
    pub async fn apply<K>(
        &self,
        kind: &'static str,
        namespace: &str,
        object: &K,
    ) -> Result<K, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + Serialize
            + DeserializeOwned,
    {
        let name = object.meta().name.clone().unwrap_or_default();
        let patch = typed::<K, _>(object);
        self.patch(
            Call::on("apply", kind, namespace, &name),
            namespace,
            &name,
            &patch,
        )
        .await
    }

    /// Merges metadata into a pod that exists, and nothing else of it.
    ///
    /// `metadata` carries the uid: the API server refuses a uid that is not the pod's, so a successor of the same name is
    /// never touched. (Server-side apply would create what is not there, and a label must not bring a pod back.)
    ///
    /// # Errors
    /// The lease is lost, or the API server refuses or does not answer.
    pub async fn patch_pod(
        &self,
        namespace: &str,
        name: &str,
        metadata: Value,
    ) -> Result<Written<Pod>, Error> {
        let patch = serde_json::json!({ "metadata": metadata });
        self.merge_pod(namespace, name, patch).await
    }

    /// Takes the scheduling gates off a pod of that uid, with what it said of those whose place it takes.
    ///
    /// # Errors
    /// The lease is lost, or the API server refuses or does not answer.
    pub async fn release_pod(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
    ) -> Result<Written<Pod>, Error> {
        let patch = serde_json::json!({
            "metadata": { "uid": uid, "annotations": { names::PREEMPTS: null } },
            "spec": { "schedulingGates": null },
        });
        self.merge_pod(namespace, name, patch).await
    }

    /// Makes `owner` the controller of an object of that uid; other owners that it has stay. Where something else controls it
    /// by now, the API server refuses.
    ///
    /// # Errors
    /// The lease is lost, or the API server refuses or does not answer.
    pub async fn adopt<K>(
        &self,
        kind: &'static str,
        namespace: &str,
        name: &str,
        uid: &str,
        owner: &OwnerReference,
    ) -> Result<Written<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + DeserializeOwned,
    {
        let metadata = serde_json::json!({ "uid": uid, "ownerReferences": [owner] });
        // Merges lists by key, here by the uid of the owner.
        let patch = Patch::Strategic(serde_json::json!({ "metadata": metadata }));
        let call = Call::on("adopt", kind, namespace, name);
        self.merge(call, namespace, name, patch).await
    }

    async fn merge_pod(
        &self,
        namespace: &str,
        name: &str,
        patch: Value,
    ) -> Result<Written<Pod>, Error> {
        let call = Call::on("patch", "Pod", namespace, name);
        self.merge(call, namespace, name, Patch::Merge(patch)).await
    }

    /// Merges a patch that carries the uid into an object that exists.
    async fn merge<K>(
        &self,
        call: Call,
        namespace: &str,
        name: &str,
        patch: Patch<Value>,
    ) -> Result<Written<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + DeserializeOwned,
    {
        self.guard(&call)?;
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let parameters = PatchParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PatchParams::default()
        };
        match RetryPolicy::CALL
            .run(&call, || api.patch(name, &parameters, &patch))
            .await
        {
            Ok(object) => Ok(Written::Done(object)),
            // Gone, or a successor with another uid.
            Err(error) if matches!(error.category(), Category::NotFound | Category::Conflict) => {
                Ok(Written::Already)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the status of an object `wanted`; what `stored`, as last seen, has beyond it is removed.
    ///
    /// # Errors
    /// The lease is lost, the object is gone, or the API server refuses or does not answer.
    pub async fn merge_status<K>(
        &self,
        kind: &'static str,
        namespace: &str,
        name: &str,
        stored: &Value,
        mut wanted: Value,
    ) -> Result<K, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + DeserializeOwned,
    {
        let call = Call::on("report", kind, namespace, name);
        self.guard(&call)?;
        remove_others(stored, &mut wanted);
        let patch = Patch::Merge(serde_json::json!({ "status": wanted }));
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let parameters = PatchParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PatchParams::default()
        };
        RetryPolicy::CALL
            .run(&call, || api.patch_status(name, &parameters, &patch))
            .await
    }

    async fn patch<K>(
        &self,
        call: Call,
        namespace: &str,
        name: &str,
        patch: &Value,
    ) -> Result<K, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + DeserializeOwned,
    {
        self.guard(&call)?;
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let patch = Patch::Apply(patch);
        // Force: we are the only writer of these fields by design, and a conflict would stop the pass for ever.
        let parameters = PatchParams {
            field_manager: Some(FIELD_MANAGER.into()),
            force: true,
            ..PatchParams::default()
        };
        RetryPolicy::CALL
            .run(&call, || api.patch(name, &parameters, &patch))
            .await
    }

    /// Removes exactly the object of this uid.
    ///
    /// # Errors
    /// The lease is lost, or the API server refuses or does not answer.
    pub async fn delete<K>(
        &self,
        kind: &'static str,
        namespace: &str,
        name: &str,
        uid: &str,
    ) -> Result<Written<()>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + DeserializeOwned,
    {
        let call = Call::on("delete", kind, namespace, name);
        self.guard(&call)?;
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let preconditions = (!uid.is_empty()).then(|| Preconditions {
            uid: Some(uid.to_string()),
            resource_version: None,
        });
        let parameters = DeleteParams {
            preconditions,
            ..DeleteParams::background()
        };
        match RetryPolicy::CALL
            .run(&call, || api.delete(name, &parameters))
            .await
        {
            Ok(_) => Ok(Written::Done(())),
            Err(error) if matches!(error.category(), Category::NotFound | Category::Conflict) => {
                Ok(Written::Already)
            }
            Err(error) => Err(error),
        }
    }
}

/// Says in a merge patch that fields which `stored` has and `wanted` has not are to be removed.
fn remove_others(stored: &Value, wanted: &mut Value) {
    let (Value::Object(stored), Value::Object(wanted)) = (stored, wanted) else {
        return;
    };
    for (name, old) in stored {
        match wanted.get_mut(name) {
            Some(new) => remove_others(old, new),
            None => {
                wanted.insert(name.clone(), Value::Null);
            }
        }
    }
}

/// The object as JSON with apiVersion and kind, which server-side apply asks for, and without what only the API server
/// may say.
fn typed<K: Resource<DynamicType = ()>, T: Serialize>(object: &T) -> Value {
    let mut value = serde_json::to_value(object).unwrap_or_default();
    if let Value::Object(fields) = &mut value {
        fields.insert("apiVersion".into(), K::api_version(&()).into());
        fields.insert("kind".into(), K::kind(&()).into());
        if let Some(Value::Object(metadata)) = fields.get_mut("metadata") {
            for field in [
                "managedFields",
                "resourceVersion",
                "uid",
                "creationTimestamp",
                "generation",
            ] {
                metadata.remove(field);
            }
        }
    }
    value
}

#[cfg(test)]
mod asking;

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    /// RFC 7386, as an API server carries it out.
    fn merge(target: &mut Value, patch: &Value) {
        let Value::Object(patch) = patch else {
            *target = patch.clone();
            return;
        };
        if !target.is_object() {
            *target = serde_json::json!({});
        }
        let Value::Object(target) = target else {
            return;
        };
        for (name, value) in patch {
            if value.is_null() {
                target.remove(name);
            } else {
                merge(target.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
    }

    #[test]
    fn a_merged_status_is_the_wanted_one_whatever_was_there() {
        let statuses = [
            serde_json::json!({}),
            serde_json::json!({"phase": "Ready", "conditions": [{"type": "Ready"}], "plan": {"nodes": ["a"], "tp": 8}}),
            serde_json::json!({"phase": "Pending", "conditions": [], "plan": {"tp": 4}}),
            serde_json::json!({"load": {"pod": "m-0", "eta": 3}, "plan": {}}),
            serde_json::json!({"plan": {"nodes": []}, "rollout": {"step": 1}}),
        ];
        for stored in &statuses {
            for wanted in &statuses {
                let mut patch = wanted.clone();
                remove_others(stored, &mut patch);
                let mut merged = stored.clone();
                merge(&mut merged, &patch);
                assert_eq!(&merged, wanted, "from {stored} by {patch}");
            }
        }
    }

    #[test]
    fn what_is_applied_names_its_kind_and_nothing_of_the_api_server() {
        let object = ConfigMap {
            metadata: ObjectMeta {
                name: Some("m".into()),
                resource_version: Some("7".into()),
                uid: Some("u".into()),
                ..ObjectMeta::default()
            },
            ..ConfigMap::default()
        };
        let expected =
            serde_json::json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}});
        assert_eq!(typed::<ConfigMap, _>(&object), expected);
    }
}
