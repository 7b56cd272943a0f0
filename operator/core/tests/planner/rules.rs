//! The rules of the CRD and the rules in Rust, on the same table of good and bad objects.
//!
//! The API server's side is the schema (checked by a small reading of it below) and the CEL rules
//! (evaluated as an API server would); ours is `validate`. A row says who refuses: both, or only
//! Rust, which knows more than a schema can say.

mod template;

use crate::common::merge;
use crate::common::schema::refused_by_api_server;
use operator_api::ModelDeployment;
use operator_core::validate;
use serde_json::{Value, json};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Refused {
    Never,
    /// By the API server and by us.
    Everywhere,
    /// By us alone.
    InRust,
}
use Refused::{Everywhere, InRust, Never};
use template::template_rows;

/// A whole object: the quick start's, changed by `patch` at the root.
fn object(patch: Value) -> Value {
    let mut object = json!({
        "apiVersion": "cachalot.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": "m", "namespace": "default"},
        "spec": {
            "model": {"source": "file:///models/tiny-r1"},
            "accelerator": {"type": "cpu"},
            "replicas": 1,
        },
    });
    merge(&mut object, patch);
    object
}

fn spec(patch: Value) -> Value {
    object(json!({"spec": patch}))
}

fn model(patch: Value) -> Value {
    spec(json!({"model": patch}))
}

fn gpu(patch: Value) -> Value {
    let mut whole = json!({"accelerator": {"type": "nvidia"}});
    merge(&mut whole, patch);
    spec(whole)
}

fn range(patch: Value) -> Value {
    let mut whole = json!({"minReplicas": 1, "maxReplicas": 3});
    merge(&mut whole, patch);
    spec(json!({"replicas": null, "autoscaling": whole}))
}

fn volume(patch: Value) -> Value {
    let mut whole = json!({"name": "extra", "mountPath": "/extra", "emptyDir": {}});
    merge(&mut whole, patch);
    spec(json!({"podTemplate": {"volumes": [whole]}}))
}

/// (what it is, who refuses it, a part of our message, the object)
fn table() -> Vec<(&'static str, Refused, &'static str, Value)> {
    let digest = format!("sha256:{}", "0".repeat(64));
    let mut rows = vec![
        ("the quick start", Never, "", object(json!({}))),
        ("zero replicas", Never, "", spec(json!({"replicas": 0}))),
        (
            "a long name",
            Everywhere,
            "metadata.name",
            object(json!({"metadata": {"name": "m".repeat(41)}})),
        ),
        (
            "the longest name",
            Never,
            "",
            object(json!({"metadata": {"name": "m".repeat(40)}})),
        ),
        (
            "a name that begins with a digit",
            Everywhere,
            "metadata.name",
            object(json!({"metadata": {"name": "7b"}})),
        ),
        (
            "a name with a dot",
            Everywhere,
            "metadata.name",
            object(json!({"metadata": {"name": "a.b"}})),
        ),
        (
            "neither replicas nor range",
            Everywhere,
            "exactly one of",
            spec(json!({"replicas": null})),
        ),
        (
            "both replicas and range",
            Everywhere,
            "exactly one of",
            spec(json!({"autoscaling": {"minReplicas": 1, "maxReplicas": 2}})),
        ),
        (
            "negative replicas",
            Everywhere,
            "spec.replicas = -1",
            spec(json!({"replicas": -1})),
        ),
        (
            "too many replicas",
            Everywhere,
            "spec.replicas = 10001",
            spec(json!({"replicas": 10001})),
        ),
        (
            "an unknown precision",
            Everywhere,
            "",
            spec(json!({"precision": "fp8"})),
        ),
        ("float32", Never, "", spec(json!({"precision": "float32"}))),
        (
            "integers on the processors",
            Never,
            "",
            spec(json!({"quantization": "int8", "accelerator": {"type": "cpu"}})),
        ),
        (
            "integers beside float32",
            Everywhere,
            "quantization",
            spec(
                json!({"quantization": "int4", "precision": "float32", "accelerator": {"type": "cpu"}}),
            ),
        ),
        (
            "integers on a GPU",
            Everywhere,
            "quantization",
            spec(json!({"quantization": "int8", "accelerator": {"type": "nvidia"}})),
        ),
        (
            "a cache in eight bits on GPUs",
            Never,
            "",
            spec(json!({"context": {"kvCacheDtype": "fp8"}, "accelerator": {"type": "nvidia"}})),
        ),
        (
            "a cache in eight bits on processors",
            Everywhere,
            "kvCacheDtype",
            spec(json!({"context": {"kvCacheDtype": "fp8"}, "accelerator": {"type": "cpu"}})),
        ),
        (
            "more drafts than are served",
            Everywhere,
            "draftTokens = 9: must be between 0 and 8",
            spec(json!({"speculation": {"draftTokens": 9}})),
        ),
        (
            "drafts",
            Never,
            "",
            spec(json!({"speculation": {"draftTokens": 1}})),
        ),
        (
            "an unknown quantization",
            Everywhere,
            "",
            spec(json!({"quantization": "int2"})),
        ),
        (
            "an unknown accelerator",
            Everywhere,
            "",
            spec(json!({"accelerator": {"type": "tpu"}})),
        ),
        (
            "context of one",
            Everywhere,
            "spec.context.maxTokens = 1",
            spec(json!({"context": {"maxTokens": 1}})),
        ),
        (
            "no sequences",
            Everywhere,
            "maxConcurrentSequences = 0",
            spec(json!({"context": {"maxConcurrentSequences": 0}})),
        ),
        (
            "a stuck rollout",
            Everywhere,
            "maxSurge = 0",
            spec(json!({"rollout": {"maxSurge": 0}})),
        ),
        (
            "a rollout in place",
            Never,
            "",
            spec(json!({"rollout": {"maxSurge": 0, "maxUnavailable": 1}})),
        ),
        (
            "a negative surge",
            Everywhere,
            "maxSurge = -1",
            spec(json!({"rollout": {"maxSurge": -1, "maxUnavailable": 1}})),
        ),
        (
            "no time to drain",
            Everywhere,
            "drainTimeoutSeconds = 0",
            spec(json!({"rollout": {"drainTimeoutSeconds": 0}})),
        ),
        (
            "a rollout in steps",
            Never,
            "",
            spec(
                json!({"rollout": {"steps": [{"percent": 10}, {"percent": 50, "holdSeconds": 0}],
                "analysis": {}, "onFailure": "Halt", "attempt": 3}}),
            ),
        ),
        (
            "steps and a partition",
            Everywhere,
            "partition = 1",
            spec(json!({"rollout": {"partition": 1, "steps": [{"percent": 10}]}})),
        ),
        (
            "steps that do not rise",
            InRust,
            "steps[1].percent = 10",
            spec(json!({"rollout": {"steps": [{"percent": 10}, {"percent": 10}]}})),
        ),
        (
            "a step of nothing",
            Everywhere,
            "steps[0].percent = 0",
            spec(json!({"rollout": {"steps": [{"percent": 0}]}})),
        ),
        (
            "no budget of restarts",
            Everywhere,
            "restartBudget = 0",
            spec(json!({"rollout": {"restartBudget": 0}})),
        ),
        (
            "a deadline that nothing meets",
            Everywhere,
            "progressDeadlineSeconds = 1",
            spec(json!({"rollout": {"progressDeadlineSeconds": 1}})),
        ),
        (
            "errors beyond all requests",
            Everywhere,
            "maxErrorIncreasePercent = 101",
            spec(json!({"rollout": {"analysis": {"maxErrorIncreasePercent": 101}}})),
        ),
        (
            "no spot nodes at all",
            Everywhere,
            "onDemandMin = -1",
            spec(json!({"placement": {"spot": {"onDemandMin": -1}}})),
        ),
        (
            "spot nodes beyond two replicas",
            Never,
            "",
            spec(json!({"placement": {"spot": {"onDemandMin": 2}}})),
        ),
        // Sources.
        (
            "a hub",
            Never,
            "",
            model(json!({"source": "hf://org/name", "revision": "main"})),
        ),
        (
            "a hub without a name",
            Everywhere,
            "hf://org/name",
            model(json!({"source": "hf://org"})),
        ),
        (
            "a hub with a path",
            Everywhere,
            "hf://org/name",
            model(json!({"source": "hf://org/name/sub"})),
        ),
        (
            "a bucket",
            Never,
            "",
            model(json!({"source": "s3://bucket/prefix", "secretRef": {"name": "keys"}})),
        ),
        (
            "a bucket in capitals",
            InRust,
            "s3://bucket/prefix",
            model(json!({"source": "s3://BUCKET/x"})),
        ),
        (
            "a claim",
            Never,
            "",
            model(json!({"source": "pvc://claim/sub/path"})),
        ),
        (
            "a claim in capitals",
            InRust,
            "pvc://claim/path",
            model(json!({"source": "pvc://Claim/x"})),
        ),
        (
            "an image",
            Everywhere,
            "oci:// is not served yet",
            model(json!({"source": "oci://registry/image"})),
        ),
        (
            "another scheme",
            Everywhere,
            "must begin with hf://",
            model(json!({"source": "ftp://host/x"})),
        ),
        (
            "no scheme",
            Everywhere,
            "must begin with hf://",
            model(json!({"source": "/models/x"})),
        ),
        (
            "an empty source",
            Everywhere,
            "",
            model(json!({"source": ""})),
        ),
        (
            "a relative file",
            Everywhere,
            "absolute path",
            model(json!({"source": "file://models/x"})),
        ),
        (
            "a way out of the folder",
            Everywhere,
            "'..'",
            model(json!({"source": "file:///models/../etc"})),
        ),
        (
            "dots in a name",
            Never,
            "",
            model(json!({"source": "hf://org/v1..2"})),
        ),
        (
            "a revision of a file",
            Everywhere,
            "spec.model.revision = main",
            model(json!({"revision": "main"})),
        ),
        (
            "a secret of a file",
            Everywhere,
            "spec.model.secretRef",
            model(json!({"secretRef": {"name": "x"}})),
        ),
        ("a digest", Never, "", model(json!({"digest": digest}))),
        (
            "a short digest",
            Everywhere,
            "spec.model.digest = sha256:0",
            model(json!({"digest": "sha256:0"})),
        ),
        (
            "a digest without inspection",
            Everywhere,
            "configMapRef skips",
            model(json!({"digest": digest, "configMapRef": {"name": "c"}})),
        ),
        (
            "a name with a space",
            Everywhere,
            "servedName",
            model(json!({"servedName": "a b"})),
        ),
        // Accelerator and parallelism.
        ("a GPU", Never, "", gpu(json!({}))),
        (
            "preferred products",
            Never,
            "",
            gpu(json!({"accelerator": {"products": ["NVIDIA-H200"], "minMemory": "80Gi"}})),
        ),
        (
            "parts of GPUs",
            Never,
            "",
            gpu(
                json!({"accelerator": {"mig": "allowed", "migProfiles": ["3g.71gb", "1g.10gb.me"]}}),
            ),
        ),
        (
            "parts of GPUs on the CPU",
            Everywhere,
            "is about parts of GPUs",
            spec(json!({"accelerator": {"mig": "never"}})),
        ),
        (
            "profiles without parts",
            Everywhere,
            "needs spec.accelerator.mig allowed or only",
            gpu(json!({"accelerator": {"migProfiles": ["3g.71gb"]}})),
        ),
        (
            "a profile as a person would say it",
            Everywhere,
            "spec.accelerator.migProfiles = \"3g.71GB\": must be a MIG profile",
            gpu(json!({"accelerator": {"mig": "only", "migProfiles": ["3g.71GB"]}})),
        ),
        (
            "a profile as nvidia-smi writes it",
            Everywhere,
            "1g.10gb.me",
            gpu(json!({"accelerator": {"mig": "only", "migProfiles": ["1g.10gb+me"]}})),
        ),
        (
            "GPUs by claims",
            Never,
            "",
            gpu(json!({"accelerator": {"claim": {"deviceClassName": "gpu.nvidia.com"}}})),
        ),
        (
            "claims on the CPU",
            Everywhere,
            "is about GPUs",
            spec(json!({"accelerator": {"claim": {}}})),
        ),
        (
            "parts by claims",
            Everywhere,
            "gives out whole GPUs",
            gpu(json!({"accelerator": {"claim": {}, "mig": "allowed"}})),
        ),
        (
            "claims that nobody allocates",
            Everywhere,
            "kube-scheduler allocates resource claims",
            gpu(json!({"accelerator": {"claim": {}}, "placement": {"binding": "direct"}})),
        ),
        (
            "a device class with a space",
            InRust,
            "deviceClassName",
            gpu(json!({"accelerator": {"claim": {"deviceClassName": "a b"}}})),
        ),
        (
            "two parts for a replica",
            Everywhere,
            "nothing connects MIG devices",
            gpu(json!({"accelerator": {"mig": "only"}, "parallelism": {"tensor": 2}})),
        ),
        (
            "GPU products on the CPU",
            Everywhere,
            "names GPUs",
            spec(json!({"accelerator": {"products": ["NVIDIA-H200"]}})),
        ),
        (
            "GPU memory on the CPU",
            Everywhere,
            "memory of one GPU",
            spec(json!({"accelerator": {"minMemory": "80Gi"}})),
        ),
        (
            "no quantity",
            Everywhere,
            "minMemory = lots",
            gpu(json!({"accelerator": {"minMemory": "lots"}})),
        ),
        (
            "a product with a space",
            Everywhere,
            "products",
            gpu(json!({"accelerator": {"products": ["NVIDIA H200"]}})),
        ),
        (
            "parallelism",
            Never,
            "",
            gpu(json!({"parallelism": {"tensor": 8, "expert": 8}})),
        ),
        (
            "automatic parallelism",
            Never,
            "",
            gpu(json!({"parallelism": {}})),
        ),
        (
            "parallelism on the CPU",
            Never,
            "",
            spec(json!({"parallelism": {"tensor": 2}})),
        ),
        (
            "one rank on the CPU",
            Never,
            "",
            spec(json!({"parallelism": {"tensor": 1}})),
        ),
        (
            "a pipeline",
            Everywhere,
            "not served above 1",
            gpu(json!({"parallelism": {"pipeline": 2}})),
        ),
        (
            "experts beside tensors",
            InRust,
            "equal to spec.parallelism.tensor",
            gpu(json!({"parallelism": {"tensor": 4, "expert": 8}})),
        ),
        (
            "no tensor",
            Everywhere,
            "tensor = 0",
            gpu(json!({"parallelism": {"tensor": 0}})),
        ),
        // Autoscaling.
        ("a range", Never, "", range(json!({}))),
        (
            "a range upside down",
            Everywhere,
            "must not be above",
            range(json!({"minReplicas": 4})),
        ),
        (
            "to zero",
            Everywhere,
            "scaling to zero is not served yet",
            range(json!({"minReplicas": 0})),
        ),
        (
            "a queue target",
            Never,
            "",
            range(json!({"targets": {"queuedRequestsPerReplica": 5}})),
        ),
        (
            "a share above all",
            Everywhere,
            "kvCacheUtilizationPercent = 101",
            range(json!({"targets": {"kvCacheUtilizationPercent": 101}})),
        ),
        (
            "a negative window",
            Everywhere,
            "scaleDownSeconds = -1",
            range(json!({"stabilization": {"scaleDownSeconds": -1}})),
        ),
    ];
    rows.extend(template_rows());
    rows
}

#[test]
fn the_crd_and_the_operator_refuse_the_same_objects() {
    let crd = serde_json::to_value(operator_api::crd()).unwrap();
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let mut wrong = Vec::new();
    for (what, refused, part, object) in table() {
        let by_api_server = refused_by_api_server(schema, &object);
        let by_us = match serde_json::from_value::<ModelDeployment>(object.clone()) {
            Err(error) => Some(error.to_string()),
            Ok(deployment) => validate(&deployment)
                .err()
                .map(|violations| violations.to_string()),
        };
        if by_api_server.is_empty() == (refused == Everywhere) {
            wrong.push(format!("{what}: the API server says {by_api_server:?}"));
        }
        match &by_us {
            None if refused != Never => wrong.push(format!("{what}: we take it")),
            Some(message) if refused == Never || !message.contains(part) => {
                wrong.push(format!("{what}: we say {message:?}"));
            }
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_violation_names_a_field_and_a_way_out() {
    for (what, refused, _, object) in table() {
        let Ok(deployment) = serde_json::from_value::<ModelDeployment>(object) else {
            continue;
        };
        if refused == Never {
            continue;
        }
        for violation in validate(&deployment).expect_err(what).0 {
            let field = &violation.field;
            assert!(
                field.starts_with("spec.") || field == "metadata.name",
                "{what}: {violation}"
            );
            assert!(violation.way_out.len() > 10, "{what}: {violation}");
        }
    }
}

#[test]
fn all_violations_are_told_at_once() {
    let object =
        spec(json!({"replicas": -1, "model": {"source": "ftp://x"}, "rollout": {"maxSurge": 0}}));
    let violations = validate(&serde_json::from_value(object).unwrap()).unwrap_err();
    assert_eq!(violations.0.len(), 3, "{violations}");
}

#[test]
fn rules_compile_as_an_api_server_compiles_them() {
    let crd = serde_json::to_value(operator_api::crd()).unwrap();
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let compiled = kube::core::cel::compile_schema(schema);
    let errors = compiled.compilation_errors();
    assert!(errors.is_empty(), "{errors:?}");
}
