//! Rows about `spec.podTemplate`, its volumes and environment.

use serde_json::{Value, json};

use super::Refused::{self, Everywhere, InRust, Never};
use super::{spec, volume};

pub fn template_rows() -> Vec<(&'static str, Refused, &'static str, Value)> {
    let template = |patch: Value| spec(json!({"podTemplate": patch}));
    let env = |patch: Value| template(json!({"env": [patch]}));
    let tolerations = |patch: Value| spec(json!({"placement": {"tolerations": [patch]}}));
    vec![
        (
            "labels",
            Never,
            "",
            template(json!({"labels": {"team": "a", "example.com/x": ""}})),
        ),
        (
            "our labels",
            Everywhere,
            "belong to the operator",
            template(json!({"labels": {"cachalot.dev/serving": "true"}})),
        ),
        (
            "a label with a space",
            InRust,
            "label value",
            template(json!({"labels": {"team": "a b"}})),
        ),
        (
            "our annotations",
            Everywhere,
            "belong to the operator",
            template(json!({"annotations": {"cachalot.dev/x": ""}})),
        ),
        (
            "environment",
            Never,
            "",
            env(json!({"name": "RUST_LOG", "value": "debug"})),
        ),
        (
            "environment from a secret",
            Never,
            "",
            env(json!({"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}})),
        ),
        (
            "environment twice over",
            Everywhere,
            "not both",
            env(
                json!({"name": "A", "value": "x", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}),
            ),
        ),
        (
            "environment from nowhere",
            Everywhere,
            "exactly one of secretKeyRef",
            env(json!({"name": "A", "valueFrom": {}})),
        ),
        (
            "a variable with a dash",
            Everywhere,
            "must be letters",
            env(json!({"name": "A-B", "value": "x"})),
        ),
        (
            "resources",
            Never,
            "",
            template(json!({"resources": {"requests": {"cpu": 2, "memory": "1Gi"}}})),
        ),
        (
            "GPUs by hand",
            Everywhere,
            "accelerators are planned",
            template(json!({"resources": {"limits": {"nvidia.com/gpu": 1}}})),
        ),
        (
            "a request above its limit",
            InRust,
            "must not be above the limit",
            template(
                json!({"resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}}),
            ),
        ),
        (
            "a bad quantity",
            Everywhere,
            "cpu = two",
            template(json!({"resources": {"requests": {"cpu": "two"}}})),
        ),
        ("a volume", Never, "", volume(json!({}))),
        (
            "a volume of two sources",
            Everywhere,
            "exactly one of persistentVolumeClaim",
            volume(json!({"secret": {"secretName": "s"}})),
        ),
        (
            "a volume of none",
            Everywhere,
            "exactly one of persistentVolumeClaim",
            volume(json!({"emptyDir": null})),
        ),
        (
            "our volume",
            Everywhere,
            "belong to the operator",
            volume(json!({"name": "tmp"})),
        ),
        (
            "the volume of a group's secret",
            Everywhere,
            "belong to the operator",
            volume(json!({"name": "group-secret"})),
        ),
        (
            "a relative mount",
            Everywhere,
            "absolute path",
            volume(json!({"mountPath": "extra"})),
        ),
        (
            "our mount",
            InRust,
            "belong to the operator",
            volume(json!({"mountPath": "/etc/cachalot/x"})),
        ),
        (
            "the mount of a group's secret",
            InRust,
            "belong to the operator",
            volume(json!({"mountPath": "/etc/cachalot-group"})),
        ),
        (
            "a node selector",
            Never,
            "",
            spec(json!({"placement": {"nodeSelector": {"pool": "a"}}})),
        ),
        (
            "a toleration",
            Never,
            "",
            tolerations(json!({"key": "a", "operator": "Exists", "effect": "NoSchedule"})),
        ),
        (
            "a toleration of a strange effect",
            InRust,
            "must be NoSchedule",
            tolerations(json!({"key": "a", "effect": "Sometimes"})),
        ),
        (
            "a spread",
            Never,
            "",
            spec(json!({"placement": {"topology": {"spreadBy": "topology.kubernetes.io/zone"}}})),
        ),
        (
            "a spread over nothing",
            Everywhere,
            "key of a node label",
            spec(json!({"placement": {"topology": {"spreadBy": ""}}})),
        ),
        (
            "pods of a replica kept in a rack",
            Never,
            "",
            spec(
                json!({"placement": {"topology": {"keepWithin": ["example.com/rack", "topology.kubernetes.io/zone"]}}}),
            ),
        ),
        (
            "pods of a replica kept nowhere in particular",
            Never,
            "",
            spec(json!({"placement": {"topology": {"keepWithin": []}}})),
        ),
        (
            "pods of a replica kept within something that is no label",
            InRust,
            "keepWithin[] = a b: must be the key of a node label",
            spec(json!({"placement": {"topology": {"keepWithin": ["a b"]}}})),
        ),
        (
            "a topology that says nothing",
            Everywhere,
            "needs spreadBy or keepWithin",
            spec(json!({"placement": {"topology": {}}})),
        ),
        (
            "a priority class",
            Never,
            "",
            spec(json!({"placement": {"priorityClassName": "high"}})),
        ),
        (
            "pods that the operator binds",
            Never,
            "",
            spec(json!({"placement": {"binding": "direct"}})),
        ),
        (
            "a priority of pods that the operator binds",
            Never,
            "",
            spec(json!({"placement": {"binding": "direct", "priorityClassName": "high"}})),
        ),
        (
            "an empty image",
            Everywhere,
            "image reference",
            template(json!({"image": ""})),
        ),
    ]
}
