//! An object as it arrives: understood or not, and without the parts that are only bulk.
//!
//! One object that does not parse must not make a whole list unreadable, so each is read as plain JSON first and made a
//! typed object from that. What nothing here keeps is skipped while it is read: managed fields, the images of a node (most of
//! it), and of a pod how it is placed and its containers are run, most of what managed fields leave. The surprise: a field that
//! is skipped is also not checked.

use std::borrow::Cow;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use kube::Resource;
use serde::de::{
    Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess,
    SeqAccess, Visitor,
};
use serde_json::{Map, Value};

/// What is skipped of an object.
#[derive(Debug)]
struct Bulk {
    field: &'static str,
    /// What is skipped of the field, or of each item where it is a list; nothing: all of it is.
    below: &'static [Bulk],
}

const fn all(field: &'static str) -> Bulk {
    Bulk { field, below: &[] }
}

const fn of(field: &'static str, below: &'static [Bulk]) -> Bulk {
    Bulk { field, below }
}

const METADATA: Bulk = of("metadata", &[all("managedFields")]);
const OBJECT: &[Bulk] = &[METADATA];
const NODE: &[Bulk] = &[METADATA, of("status", &[all("images")])];
const CONTAINER: &[Bulk] = &[
    all("args"),
    all("command"),
    all("env"),
    all("envFrom"),
    all("image"),
    all("imagePullPolicy"),
    all("lifecycle"),
    all("livenessProbe"),
    all("ports"),
    all("readinessProbe"),
    all("securityContext"),
    all("startupProbe"),
    all("terminationMessagePath"),
    all("terminationMessagePolicy"),
    all("volumeMounts"),
];
const CONTAINER_STATUS: &[Bulk] = &[
    all("allocatedResources"),
    all("containerID"),
    all("image"),
    all("imageID"),
    all("resources"),
    all("user"),
    all("volumeMounts"),
];
const POD: &[Bulk] = &[
    METADATA,
    of(
        "spec",
        &[
            all("affinity"),
            all("automountServiceAccountToken"),
            all("dnsPolicy"),
            all("enableServiceLinks"),
            all("imagePullSecrets"),
            all("nodeSelector"),
            all("preemptionPolicy"),
            all("priorityClassName"),
            all("restartPolicy"),
            all("schedulerName"),
            all("securityContext"),
            all("serviceAccount"),
            all("serviceAccountName"),
            all("terminationGracePeriodSeconds"),
            all("tolerations"),
            all("topologySpreadConstraints"),
            all("volumes"),
            of("containers", CONTAINER),
            of("initContainers", CONTAINER),
        ],
    ),
    of(
        "status",
        &[
            all("hostIP"),
            all("hostIPs"),
            all("initContainerStatuses"),
            all("podIPs"),
            all("qosClass"),
            all("startTime"),
            of("containerStatuses", CONTAINER_STATUS),
        ],
    ),
];

fn bulk_of(kind: &str) -> &'static [Bulk] {
    match kind {
        "Node" => NODE,
        "Pod" => POD,
        _ => OBJECT,
    }
}

/// An object, or why it is none.
#[derive(Clone, Debug)]
pub struct Guarded<K>(pub Result<K, Box<Misread>>);

/// An object that is not understood.
#[derive(Clone, Debug)]
pub struct Misread {
    /// The field, and what is wrong with it.
    pub error: String,
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// The conditions in its status, as far as they are conditions.
    pub conditions: Vec<Condition>,
}

impl<'de, K: Resource<DynamicType = ()> + DeserializeOwned> Deserialize<'de> for Guarded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Lean(bulk_of(&K::kind(&()))).deserialize(deserializer)?;
        let failed = match K::deserialize(&value) {
            Ok(object) => return Ok(Guarded(Ok(object))),
            Err(error) => with_field::<K>(&value, &error),
        };
        let metadata = match value.get("metadata") {
            None => ObjectMeta::default(),
            Some(metadata) => ObjectMeta::deserialize(metadata).map_err(D::Error::custom)?,
        };
        let conditions = value.pointer("/status/conditions");
        let conditions = conditions.and_then(Value::as_array).into_iter().flatten();
        Ok(Guarded(Err(Box::new(Misread {
            error: failed,
            metadata,
            conditions: conditions
                .filter_map(|condition| Condition::deserialize(condition).ok())
                .collect(),
        }))))
    }
}

/// An error with the field that it is about: the object is read once more for it.
fn with_field<K: DeserializeOwned>(value: &Value, error: &serde_json::Error) -> String {
    match serde_path_to_error::deserialize::<_, K>(value) {
        Err(found) if found.path().iter().len() > 0 => found.to_string(),
        _ => error.to_string(),
    }
}

impl<K: Resource> Resource for Guarded<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dynamic: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(dynamic)
    }

    fn group(dynamic: &Self::DynamicType) -> Cow<'_, str> {
        K::group(dynamic)
    }

    fn version(dynamic: &Self::DynamicType) -> Cow<'_, str> {
        K::version(dynamic)
    }

    fn plural(dynamic: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(dynamic)
    }

    fn meta(&self) -> &ObjectMeta {
        match &self.0 {
            Ok(object) => object.meta(),
            Err(misread) => &misread.metadata,
        }
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match &mut self.0 {
            Ok(object) => object.meta_mut(),
            Err(misread) => &mut misread.metadata,
        }
    }
}

/// Reads JSON without some fields.
#[derive(Clone, Copy)]
struct Lean(&'static [Bulk]);

impl<'de> DeserializeSeed<'de> for Lean {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        if self.0.is_empty() {
            return Value::deserialize(deserializer);
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Lean {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let below = match self.0.iter().find(|bulk| bulk.field == key) {
                None => &[],
                Some(Bulk { below: [], .. }) => {
                    access.next_value::<IgnoredAny>()?;
                    continue;
                }
                Some(bulk) => bulk.below,
            };
            let value = access.next_value_seed(Lean(below))?;
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }

    // What is no map has nothing to skip.

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{Node, Pod};
    use kube::core::{ObjectList, WatchEvent};
    use operator_api::ModelDeployment;

    #[test]
    fn an_object_that_is_not_understood_keeps_its_metadata_and_spoils_no_other() {
        let text = r#"{"apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "7"}, "items": [
            {"metadata": {"name": "a", "namespace": "d", "managedFields": [{"manager": "m"}]}, "spec": {"containers": []}},
            {"metadata": {"name": "b", "namespace": "d", "uid": "u"}, "spec": {"containers": "none"}},
            {"metadata": {"name": "c", "namespace": "d"}, "status": "odd", "spec": null}]}"#;
        let list: ObjectList<Guarded<Pod>> = serde_json::from_str(text).expect("a list");
        let names: Vec<_> = list
            .items
            .iter()
            .map(|item| item.meta().name.as_deref())
            .collect();
        assert_eq!(names, [Some("a"), Some("b"), Some("c")]);
        let good = list.items[0].0.as_ref().expect("a pod");
        assert!(good.spec.is_some() && good.metadata.managed_fields.is_none());
        let broken = list.items[1].0.as_ref().expect_err("no pod");
        assert_eq!(broken.metadata.uid.as_deref(), Some("u"));
        assert!(
            broken.error.starts_with("spec.containers: "),
            "{}",
            broken.error
        );
        assert!(broken.error.contains("sequence"), "{}", broken.error);
        assert!(list.items[2].0.is_err());
    }

    #[test]
    fn the_field_that_is_not_understood_is_named_with_what_the_status_says() {
        let read = |spec: Value| {
            let status = serde_json::json!({"conditions": ["odd", {"type": "Ready", "status": "True", "reason": "Ok",
                "message": "", "lastTransitionTime": "2026-11-24T00:00:00Z"}]});
            let object =
                serde_json::json!({"metadata": {"name": "m"}, "spec": spec, "status": status});
            let read: Guarded<ModelDeployment> = serde_json::from_value(object).expect("JSON");
            read.0.expect_err("it is not understood")
        };
        for (spec, words) in [
            (
                serde_json::json!({"model": {"source": [1]}, "replicas": 1}),
                "spec.model.source: invalid type",
            ),
            (
                serde_json::json!({"model": {"source": "hf://a/b"}, "replicas": "two"}),
                "spec.replicas: invalid type",
            ),
            (
                serde_json::json!({"model": {}}),
                "spec.model: missing field `source`",
            ),
            (
                serde_json::json!({"model": {"source": "hf://a/b"}, "podTemplate": {"env": [{"name": "A", "value": "b"}, {"name": 3}]}}),
                "spec.podTemplate.env[1].name: invalid type",
            ),
        ] {
            let misread = read(spec);
            assert!(misread.error.starts_with(words), "{}", misread.error);
            let kinds: Vec<_> = misread.conditions.iter().map(|it| &*it.type_).collect();
            assert!(kinds.is_empty() || kinds == ["Ready"]);
        }
        let misread = read(serde_json::json!({"model": {"source": 7}}));
        assert_eq!(
            misread.conditions.len(),
            1,
            "what is no condition is left out"
        );
    }

    /// What is left of an object.
    fn lean(bulk: &'static [Bulk], object: &Value) -> Value {
        Lean(bulk).deserialize(object).expect("JSON")
    }

    #[test]
    fn what_lies_deeper_and_is_named_like_bulk_is_kept() {
        let deeper = serde_json::json!({"status": {"images": [1]}, "metadata": {"managedFields": [2]}, "env": 3});
        let kept = serde_json::json!({"spec": deeper, "status": deeper, "env": [deeper]});
        let mut full = kept.clone();
        full["metadata"] = serde_json::json!({"managedFields": [3]});
        full["status"]["images"] = serde_json::json!([4]);
        let mut wanted = kept;
        wanted["metadata"] = serde_json::json!({});
        assert_eq!(lean(NODE, &full), wanted);
        // Of other kinds only the managed fields go.
        wanted["status"]["images"] = serde_json::json!([4]);
        assert_eq!(lean(OBJECT, &full), wanted);
    }

    #[test]
    fn what_is_kept_of_a_pod_is_made_of_what_is_left_of_it() {
        let container = |name: &str, gpus: &str| {
            serde_json::json!({"name": name, "image": "i", "env": [{"name": "A", "value": "b"}], "command": ["c"],
                "args": ["--a"], "ports": [{"containerPort": 8000}], "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                "readinessProbe": {"httpGet": {"port": 8000}}, "restartPolicy": "Always", "imagePullPolicy": "Always",
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                "resources": {"limits": {"nvidia.com/gpu": gpus}, "requests": {"cpu": "2"}, "claims": [{"name": "g"}]}})
        };
        let full = serde_json::json!({
            "metadata": {"name": "p", "namespace": "d", "uid": "u", "annotations": {"cachalot.dev/rank": "1"},
                "labels": {"cachalot.dev/model-deployment": "m"}, "managedFields": [{"manager": "x"}]},
            "spec": {"nodeName": "n", "priority": 7, "overhead": {"cpu": "1"}, "schedulingGates": [{"name": "g"}],
                "resourceClaims": [{"name": "cachalot-gpus-2", "resourceClaimTemplateName": "t"}],
                "volumes": [{"name": "v", "emptyDir": {}}], "tolerations": [{"operator": "Exists"}],
                "affinity": {"nodeAffinity": {}}, "topologySpreadConstraints": [], "dnsPolicy": "ClusterFirst",
                "automountServiceAccountToken": false, "enableServiceLinks": false, "imagePullSecrets": [{"name": "s"}],
                "nodeSelector": {"a": "b"}, "preemptionPolicy": "Never", "priorityClassName": "high",
                "restartPolicy": "Always", "schedulerName": "default-scheduler", "securityContext": {"runAsUser": 1},
                "serviceAccount": "default", "serviceAccountName": "default", "terminationGracePeriodSeconds": 30,
                "containers": [container("a", "2")], "initContainers": [container("b", "1")]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}], "hostIP": "10.0.1.1",
                "hostIPs": [{"ip": "10.0.1.1"}], "qosClass": "Burstable", "startTime": "2026-11-24T00:00:00Z",
                "reason": "r", "message": "m", "conditions": [{"type": "Ready", "status": "True",
                    "lastTransitionTime": "2026-11-24T00:00:00Z"}, {"type": "PodScheduled", "status": "False",
                    "reason": "Unschedulable", "message": "0/3 nodes", "lastTransitionTime": "2026-11-24T00:00:00Z"}],
                "initContainerStatuses": [{"name": "b", "image": "i", "imageID": "", "ready": true, "restartCount": 1}],
                "containerStatuses": [{"name": "a", "image": "i", "imageID": "", "containerID": "x", "ready": true,
                    "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "m"}},
                    "lastState": {"terminated": {"exitCode": 1}}, "allocatedResources": {"cpu": "1"},
                    "resources": {"requests": {"cpu": "1"}}, "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]},
        });
        let left = lean(POD, &full);
        assert!(left.to_string().len() < full.to_string().len() / 2);
        let views = [full, left].map(|pod| {
            let pod: Pod = serde_json::from_value(pod).expect("a pod");
            (
                operator_core::PodView::of(&pod),
                operator_core::Claim::of(&pod),
            )
        });
        assert_eq!(views[0], views[1]);
        assert!(views[0].0.requests.gpus == 3 && views[0].0.requests.claimed == 2);
    }

    #[test]
    fn bulk_is_skipped_and_nothing_else() {
        let node = serde_json::json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "n", "labels": {"managedFields": "x", "images": "y"}, "generation": 3},
            "status": {"allocatable": {"cpu": "1"}, "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
                       "conditions": [{"type": "Ready", "status": "True"}]},
        });
        let mut full = node.clone();
        full["metadata"]["managedFields"] =
            serde_json::json!([{"manager": "kubelet", "fieldsV1": {"f:a": {}}}]);
        full["status"]["images"] = serde_json::json!([{"names": ["a", "b"], "sizeBytes": 5}]);
        let event = format!(r#"{{"type": "ADDED", "object": {full}}}"#);
        let event: WatchEvent<Guarded<Node>> = serde_json::from_str(&event).expect("an event");
        let WatchEvent::Added(Guarded(Ok(read))) = event else {
            panic!("{event:?}");
        };
        let wanted: Node = serde_json::from_value(node).expect("a node");
        assert_eq!(read, wanted);
    }
}
