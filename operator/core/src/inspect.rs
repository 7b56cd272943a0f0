//! How the operator learns a model's facts: from the config map the user gives, from the one an
//! earlier inspection left, or from an inspection pod.
//!
//! The operator itself never reads weights or secrets. A failed inspection is repeated after a
//! pause that grows, and at once when anything it depends on changes.

use std::time::Duration;

use engine_spec::{InspectReport, ModelConfig, ModelFacts, ModelFault};
use operator_api::Reason;

use crate::names;
use crate::objects;
use crate::plan::{Action, Kind, Object, Settings};
use crate::snapshot::{PodPhase, PodView, Snapshot};
use crate::validate::ValidDeployment;

/// First pause before a fault that may pass is tried again; doubles up to the longest.
const RETRY_SECONDS: u64 = 15;
/// Pause before a fault that someone has to mend is tried again, and the longest pause.
const RETRY_SECONDS_MAX: u64 = 600;

/// What is known of the model.
#[derive(Clone, Debug, PartialEq)]
pub enum Facts {
    /// All of it.
    Known(Box<ModelFacts>),
    /// A pod is finding out.
    Inspecting {
        /// What it does or waits for.
        message: String,
    },
    /// It cannot be found out without a change or a wait.
    Failed {
        /// Reason of the condition ModelInspected.
        reason: Reason,
        /// For people.
        message: String,
    },
}

/// What is known and what is done about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Inspection {
    /// What is known.
    pub facts: Facts,
    /// Writes.
    pub actions: Vec<Action>,
    /// When to look again.
    pub wake_after: Option<Duration>,
}

impl Inspection {
    fn settled(facts: Facts) -> Self {
        Self {
            facts,
            actions: Vec::new(),
            wake_after: None,
        }
    }
}

/// Hash that names the inspection of a source and revision.
pub fn source_hash(valid: &ValidDeployment) -> String {
    let revision = valid.model_revision.as_deref().unwrap_or("");
    names::short_hash(&format!("{}@{revision}", valid.source))
}

/// Takes the next step towards knowing the model.
pub fn inspect(valid: &ValidDeployment, snapshot: &Snapshot, settings: &Settings) -> Inspection {
    let hash = source_hash(valid);
    let mut inspection = match &valid.config_map {
        Some(name) => Inspection::settled(from_config_map(name, snapshot)),
        None => from_inspection(valid, snapshot, settings, &hash),
    };
    if let (Facts::Known(facts), Some(wanted)) = (&inspection.facts, &valid.digest)
        && facts.digest != *wanted
    {
        inspection.facts = Facts::Failed {
            reason: Reason::DigestMismatch,
            message: format!(
                "spec.model.digest = {wanted}: {} has the digest {}; pin that one or mend the source",
                valid.source, facts.digest
            ),
        };
    }
    let keep = if valid.config_map.is_none() {
        hash.as_str()
    } else {
        ""
    };
    inspection.actions.extend(left_over(valid, snapshot, keep));
    inspection
}

fn from_config_map(name: &str, snapshot: &Snapshot) -> Facts {
    let missing = |what: &str| Facts::Failed {
        reason: Reason::ConfigMapNotFound,
        message: format!(
            "spec.model.configMapRef.name = {name}: {what}; create it with the model's published config under the key {}",
            names::CONFIG_JSON
        ),
    };
    let Some(config_map) = &snapshot.model_config else {
        return missing("there is no such config map in this namespace");
    };
    let Some(text) = config_map.data.get(names::CONFIG_JSON) else {
        return missing("the config map has no such key");
    };
    match facts_of_config(text) {
        Ok(facts) => Facts::Known(Box::new(facts)),
        Err(error) => Facts::Failed {
            reason: Reason::ModelConfigInvalid,
            message: format!("config map {name}, key {}: {error}", names::CONFIG_JSON),
        },
    }
}

/// What a model's published config says about it, without a look at its weights.
///
/// # Errors
/// In words, naming the field.
pub fn facts_of_config(text: &str) -> Result<ModelFacts, String> {
    let config = ModelConfig::from_hf_json(text).map_err(|error| error.to_string())?;
    let digest = format!("sha256:{}", names::long_hash(text));
    Ok(ModelFacts::from_config(config, digest))
}

/// What an inspection that found these facts leaves in its termination message.
pub fn report_of(facts: ModelFacts) -> String {
    InspectReport::Facts(Box::new(facts)).to_message()
}

fn from_inspection(
    valid: &ValidDeployment,
    snapshot: &Snapshot,
    settings: &Settings,
    hash: &str,
) -> Inspection {
    let stored = names::facts_config_map(&valid.name, hash);
    let facts = snapshot
        .config_maps
        .iter()
        .find(|config_map| config_map.name == stored)
        .and_then(|config_map| config_map.data.get(names::FACTS_JSON))
        // Facts that another version wrote are found out again.
        .and_then(|text| serde_json::from_str::<ModelFacts>(text).ok());
    if let Some(facts) = facts {
        let mut inspection = Inspection::settled(Facts::Known(Box::new(facts)));
        inspection.actions = pods(snapshot, &valid.name, hash)
            .filter(|pod| !leaves(pod, snapshot))
            .map(delete)
            .collect();
        return inspection;
    }
    let start = |attempt: u32, message: &str| Inspection {
        facts: Facts::Inspecting {
            message: message.to_owned(),
        },
        actions: vec![Action::Create(Object::Pod(Box::new(objects::inspect_pod(
            valid, settings, hash, attempt,
        ))))],
        wake_after: None,
    };
    let Some(pod) = pods(snapshot, &valid.name, hash).max_by_key(|pod| pod.number(names::ATTEMPT))
    else {
        return start(0, "an inspection pod is being created");
    };
    let attempt = pod.number(names::ATTEMPT);
    let is_current = pod.annotations.get(names::INSPECT_INPUTS)
        == Some(objects::inspect_inputs(valid, settings).as_str());
    let leaves = leaves(pod, snapshot);
    if leaves || !is_current {
        let mut next = start(attempt.saturating_add(1), "the inspection is started again");
        next.actions.extend((!leaves).then(|| delete(pod)));
        return next;
    }
    match pod.phase {
        PodPhase::Succeeded | PodPhase::Failed => ended(valid, snapshot, settings, hash, pod),
        _ => Inspection::settled(Facts::Inspecting {
            message: running_words(pod),
        }),
    }
}

fn running_words(pod: &PodView) -> String {
    if let Some((reason, message)) = pod.container.waiting.as_deref()
        && !matches!(
            reason.as_str(),
            "" | "ContainerCreating" | "PodInitializing"
        )
    {
        return format!("pod {} waits: {reason}: {message}", pod.name);
    }
    match &pod.scheduled {
        crate::snapshot::Scheduled::Refused { message, .. } => {
            format!("pod {} has no node: {message}", pod.name)
        }
        _ => format!("pod {} reads the model's config and headers", pod.name),
    }
}

fn ended(
    valid: &ValidDeployment,
    snapshot: &Snapshot,
    settings: &Settings,
    hash: &str,
    pod: &PodView,
) -> Inspection {
    let terminated = pod.container.terminated.clone().unwrap_or_default();
    let (reason, message, is_transient) = match InspectReport::from_message(&terminated.message) {
        Ok(InspectReport::Facts(facts)) => {
            let config_map = objects::facts_config_map(valid, hash, &facts);
            return Inspection {
                facts: Facts::Known(facts),
                actions: vec![Action::Apply(Object::ConfigMap(Box::new(config_map)))],
                // Nothing else need happen before the pod that is done with is removed.
                wake_after: Some(Duration::from_secs(1)),
            };
        }
        Ok(InspectReport::Error(error)) => (
            reason_of(error.reason),
            format!("{}: {}", valid.source, error.message),
            error.reason.is_transient(),
        ),
        Err(_) => (Reason::InspectionFailed, unreported(pod), true),
    };
    let attempt = pod.number(names::ATTEMPT);
    let pause = if is_transient {
        (RETRY_SECONDS << attempt.min(10)).min(RETRY_SECONDS_MAX)
    } else {
        RETRY_SECONDS_MAX
    };
    let since = terminated.finished.or(pod.created).unwrap_or(snapshot.now);
    let elapsed = crate::time::seconds_between(since, snapshot.now);
    if elapsed < pause {
        return Inspection {
            facts: Facts::Failed { reason, message },
            actions: Vec::new(),
            wake_after: Some(Duration::from_secs(pause - elapsed)),
        };
    }
    let next = objects::inspect_pod(valid, settings, hash, attempt.saturating_add(1));
    Inspection {
        // The old verdict stands until there is a new one.
        facts: Facts::Failed { reason, message },
        actions: vec![Action::Create(Object::Pod(Box::new(next))), delete(pod)],
        wake_after: None,
    }
}

/// A pod that ended without a report: what Kubernetes says about it.
fn unreported(pod: &PodView) -> String {
    let terminated = pod.container.terminated.clone().unwrap_or_default();
    let mut words = format!("inspection pod {} ended without a report", pod.name);
    for part in [
        pod.reason.as_str(),
        pod.message.as_str(),
        terminated.reason.as_str(),
        terminated.message.trim(),
    ] {
        if !part.is_empty() {
            words.push_str(": ");
            words.push_str(part);
        }
    }
    format!("{words} (exit code {}); see its log", terminated.exit_code)
}

fn reason_of(fault: ModelFault) -> Reason {
    match fault {
        ModelFault::ModelNotFound => Reason::ModelNotFound,
        ModelFault::ModelConfigInvalid => Reason::ModelConfigInvalid,
        ModelFault::UnsupportedArchitecture => Reason::UnsupportedArchitecture,
        ModelFault::WeightsMissing => Reason::WeightsMissing,
        ModelFault::WeightsTruncated => Reason::WeightsTruncated,
        ModelFault::WeightsMismatch => Reason::WeightsMismatch,
        ModelFault::SourceUnreachable => Reason::SourceUnreachable,
        ModelFault::AccessDenied => Reason::AccessDenied,
        ModelFault::DiskFull => Reason::DiskFull,
    }
}

fn pods<'a>(
    snapshot: &'a Snapshot,
    deployment: &str,
    hash: &str,
) -> impl Iterator<Item = &'a PodView> {
    let prefix = names::inspect_pod(deployment, hash, 0);
    snapshot.pods.iter().map(AsRef::as_ref).filter(move |pod| {
        pod.label(names::COMPONENT) == names::INSPECT && pod.name.starts_with(&prefix)
    })
}

/// Whether a pod goes without our doing.
fn leaves(pod: &PodView, snapshot: &Snapshot) -> bool {
    pod.deleting || snapshot.is_foreign(pod)
}

fn delete(pod: &PodView) -> Action {
    Action::Delete {
        kind: Kind::Pod,
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        if_silent: None,
    }
}

/// Inspection pods and facts of other sources.
fn left_over(valid: &ValidDeployment, snapshot: &Snapshot, keep: &str) -> Vec<Action> {
    let kept_pod = names::inspect_pod(&valid.name, keep, 0);
    let kept_facts = names::facts_config_map(&valid.name, keep);
    let facts_prefix = names::facts_config_map(&valid.name, "");
    let pods = snapshot
        .pods
        .iter()
        .filter(|pod| pod.label(names::COMPONENT) == names::INSPECT && !leaves(pod, snapshot))
        .filter(|pod| keep.is_empty() || !pod.name.starts_with(&kept_pod))
        .map(|pod| delete(pod));
    let facts = snapshot
        .config_maps
        .iter()
        .filter(|map| map.name.starts_with(&facts_prefix) && map.name != kept_facts)
        .map(|map| Action::Delete {
            kind: Kind::ConfigMap,
            name: map.name.clone(),
            uid: map.uid.clone(),
            if_silent: None,
        });
    pods.chain(facts).collect()
}
