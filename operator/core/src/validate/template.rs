//! The pod template: everything Kubernetes would refuse in a pod is refused here first.

use std::collections::{BTreeMap, BTreeSet};

use operator_api::{EnvVar, PodTemplate, Quantity, Resources, Volume};

use super::{Rules, is_object_name};

const FIELD: &str = "spec.podTemplate";
const OWN_VOLUMES: &[&str] = &["tmp", "cache", "config", "models", "shm", "group-secret"];
const OWN_PATHS: &[&str] = &[
    "/tmp",
    "/cache",
    "/etc/cachalot",
    "/etc/cachalot-group",
    "/models/pvc",
    "/dev",
    "/proc",
    "/sys",
];
const KNOWN_RESOURCES: &[&str] = &["cpu", "memory", "ephemeral-storage"];

pub(super) fn check(rules: &mut Rules, template: &PodTemplate) {
    let PodTemplate {
        labels,
        annotations,
        env,
        resources,
        volumes,
        image_pull_secrets,
        service_account_name,
        image,
    } = template;
    check_labels(rules, &format!("{FIELD}.labels"), labels);
    for key in labels.keys() {
        rules.require(
            !key.starts_with("cachalot.dev/") && !key.starts_with("app.kubernetes.io/"),
            &format!("{FIELD}.labels"),
            key,
            "labels under cachalot.dev/ and app.kubernetes.io/ belong to the operator; use another prefix",
        );
    }
    check_annotations(rules, annotations);
    check_env(rules, env);
    if let Some(resources) = resources {
        check_resources(rules, resources);
    }
    check_volumes(rules, volumes);
    let names = image_pull_secrets
        .iter()
        .map(|reference| ("imagePullSecrets[].name", reference.name.as_str()))
        .chain(
            service_account_name
                .iter()
                .map(|name| ("serviceAccountName", name.as_str())),
        );
    for (field, name) in names {
        rules.require(
            is_object_name(name),
            &format!("{FIELD}.{field}"),
            name,
            "must be a Kubernetes object name",
        );
    }
    if let Some(image) = image {
        rules.require(
            !image.is_empty() && image.len() <= 512 && image.chars().all(|c| c.is_ascii_graphic()),
            &format!("{FIELD}.image"),
            format_args!("\"{image}\""),
            "must be an image reference such as registry.example/cachalot-engine:1.0",
        );
    }
}

/// A map of labels as Kubernetes accepts it.
pub(super) fn check_labels(rules: &mut Rules, field: &str, labels: &BTreeMap<String, String>) {
    rules.require(
        labels.len() <= 32,
        field,
        format_args!("{} entries", labels.len()),
        "at most 32 entries",
    );
    for (key, value) in labels {
        rules.require(is_label_key(key), field, key, "must be a label key: [prefix/]name, name of at most 63 letters, digits, '-', '_' and '.'");
        rules.require(
            is_label_value(value),
            &format!("{field}[{key}]"),
            format_args!("\"{value}\""),
            "must be a label value: at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit",
        );
    }
}

fn check_annotations(rules: &mut Rules, annotations: &BTreeMap<String, String>) {
    let field = format!("{FIELD}.annotations");
    rules.require(
        annotations.len() <= 32,
        &field,
        format_args!("{} entries", annotations.len()),
        "at most 32 entries",
    );
    for key in annotations.keys() {
        rules.require(
            is_label_key(&key.to_ascii_lowercase()),
            &field,
            key,
            "must be an annotation key: [prefix/]name",
        );
        rules.require(
            !key.starts_with("cachalot.dev/"),
            &field,
            key,
            "annotations under cachalot.dev/ belong to the operator; use another prefix",
        );
    }
}

fn check_env(rules: &mut Rules, env: &[EnvVar]) {
    let field = format!("{FIELD}.env");
    let mut seen = BTreeSet::new();
    rules.require(
        env.len() <= 64,
        &field,
        format_args!("{} entries", env.len()),
        "at most 64 entries",
    );
    for EnvVar {
        name,
        value,
        value_from,
    } in env
    {
        let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        rules.require(
            starts_well
                && name.len() <= 128
                && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'),
            &format!("{field}[].name"),
            name,
            "must be letters, digits and '_', not starting with a digit",
        );
        rules.require(
            seen.insert(name.as_str()),
            &format!("{field}[].name"),
            name,
            "is given twice; remove one",
        );
        rules.require(
            !(value.is_some() && value_from.is_some()),
            &format!("{field}[{name}]"),
            "",
            "takes value or valueFrom, not both; remove one",
        );
        if let Some(source) = value_from {
            let references = [&source.secret_key_ref, &source.config_map_key_ref];
            rules.require(
                references.iter().filter(|r| r.is_some()).count() == 1,
                &format!("{field}[{name}].valueFrom"),
                "",
                "takes exactly one of secretKeyRef and configMapKeyRef",
            );
            for reference in references.into_iter().flatten() {
                rules.require(
                    is_object_name(&reference.name) && !reference.key.is_empty(),
                    &format!("{field}[{name}].valueFrom"),
                    format_args!("{}/{}", reference.name, reference.key),
                    "must name an object and a key of it",
                );
            }
        }
    }
}

fn check_resources(rules: &mut Rules, resources: &Resources) {
    let Resources { requests, limits } = resources;
    for (part, list) in [("requests", requests), ("limits", limits)] {
        for (key, quantity) in list {
            rules.require(
                KNOWN_RESOURCES.contains(&key.as_str()),
                &format!("{FIELD}.resources.{part}"),
                key,
                "only cpu, memory and ephemeral-storage can be given here; accelerators are planned from spec.accelerator and spec.parallelism",
            );
            rules.require(
                quantity.millis().is_some(),
                &format!("{FIELD}.resources.{part}.{key}"),
                quantity,
                "must be a quantity such as 500m or 80Gi",
            );
        }
    }
    for (key, request) in requests {
        let above = limits
            .get(key)
            .and_then(Quantity::millis)
            .zip(request.millis())
            .is_some_and(|(limit, request)| request > limit);
        rules.require(
            !above,
            &format!("{FIELD}.resources.requests.{key}"),
            request,
            "must not be above the limit of the same resource",
        );
    }
}

fn check_volumes(rules: &mut Rules, volumes: &[Volume]) {
    let field = format!("{FIELD}.volumes");
    let (mut names, mut paths) = (BTreeSet::new(), BTreeSet::new());
    rules.require(
        volumes.len() <= 16,
        &field,
        format_args!("{} entries", volumes.len()),
        "at most 16 entries",
    );
    for volume in volumes {
        let Volume {
            name,
            mount_path,
            writable: _,
            persistent_volume_claim,
            config_map,
            secret,
            empty_dir,
        } = volume;
        rules.require(
            is_object_name(name) && name.len() <= 63 && !name.contains('.'),
            &format!("{field}[].name"),
            name,
            "must be at most 63 lower case letters, digits and '-'",
        );
        rules.require(
            !OWN_VOLUMES.contains(&name.as_str()),
            &format!("{field}[].name"),
            name,
            "the volume names tmp, cache, config, models, shm and group-secret belong to the operator; choose another",
        );
        rules.require(
            names.insert(name),
            &format!("{field}[].name"),
            name,
            "is given twice; remove one",
        );
        let field = format!("{field}[{name}]");
        check_mount_path(rules, &field, mount_path);
        rules.require(
            paths.insert(mount_path.trim_end_matches('/')),
            &format!("{field}.mountPath"),
            mount_path,
            "is mounted twice; choose another path",
        );
        let sources = [
            persistent_volume_claim.is_some(),
            config_map.is_some(),
            secret.is_some(),
            empty_dir.is_some(),
        ];
        rules.require(
            sources.iter().filter(|given| **given).count() == 1,
            &field,
            "",
            "takes exactly one of persistentVolumeClaim, configMap, secret and emptyDir",
        );
        let objects = [
            persistent_volume_claim.as_ref().map(|v| &v.claim_name),
            config_map.as_ref().map(|v| &v.name),
            secret.as_ref().map(|v| &v.secret_name),
        ];
        for object in objects.into_iter().flatten() {
            rules.require(
                is_object_name(object),
                &field,
                object,
                "must be a Kubernetes object name",
            );
        }
        if let Some(limit) = empty_dir.as_ref().and_then(|v| v.size_limit.as_ref()) {
            rules.require(
                limit.value().is_some(),
                &format!("{field}.emptyDir.sizeLimit"),
                limit,
                "must be a quantity such as 10Gi",
            );
        }
    }
}

fn check_mount_path(rules: &mut Rules, field: &str, path: &str) {
    let field = format!("{field}.mountPath");
    rules.require(
        path.starts_with('/') && path.len() > 1 && !path.contains("..") && !path.contains(':'),
        &field,
        path,
        "must be an absolute path without '..' and ':'",
    );
    let is_own = OWN_PATHS
        .iter()
        .any(|own| path == *own || path.starts_with(&format!("{own}/")));
    rules.require(
        !is_own,
        &field,
        path,
        "lies below /tmp, /cache, /etc/cachalot or a system path, which belong to the operator; mount it elsewhere",
    );
}

/// `[prefix/]name` as Kubernetes defines it.
pub(super) fn is_label_key(key: &str) -> bool {
    let name = match key.split_once('/') {
        Some((prefix, name)) if is_object_name(prefix) => name,
        Some(_) => return false,
        None => key,
    };
    !name.is_empty() && is_label_value(name)
}

fn is_label_value(value: &str) -> bool {
    let is_end = |c: char| c.is_ascii_alphanumeric();
    value.is_empty()
        || value.len() <= 63
            && value.starts_with(is_end)
            && value.ends_with(is_end)
            && value
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}
