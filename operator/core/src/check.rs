//! A linter for plans: the rules that every plan keeps, whatever the snapshot.
//!
//! It shares no code with the planner's choices, so that a mistake there is found here. Every plan
//! is checked before it leaves the core, and every test and simulation runs it again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::gpu_faults;
use crate::names;
use crate::objects;
use crate::ownership::Controller;
use crate::plan::{Action, Kind, Object, Plan, Settings};
use crate::priority::{Priority, Rival, Victim};
use crate::replicas::{GroupKey, Replica, State, observe};
use crate::resources::Resources;
use crate::snapshot::{PodView, Snapshot};
use crate::validate::validate;

/// A rule that a plan breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Two actions write the same object.
    WrittenTwice(String),
    /// A delete or patch of a pod that was not observed with that uid.
    Unobserved(String),
    /// A write of a pod that something else controls.
    Foreign(String),
    /// A replica index would have two pods of one rank that may run.
    IndexTwice(u32),
    /// A replica of several pods would be made or removed in part, or mixed with another.
    PartGroup(u32),
    /// More pods than wanted plus surge.
    TooMany {
        /// Pods after the plan.
        pods: u32,
        /// Pods allowed.
        allowed: u32,
    },
    /// Fewer answering replicas than promised, by our own doing.
    TooFew {
        /// Answering replicas after the plan.
        ready: u32,
        /// Answering replicas promised.
        promised: u32,
    },
    /// First choices of new pods take more of a node than it has.
    Overbooked(String),
    /// A new pod of GPUs could come to a node with a GPU that is remembered as at fault.
    SickGpu(String),
    /// A new pod would take the place of a replica that is worth as much, or is not known.
    Outranks(String),
    /// New pods ask for more devices than a quota of the namespace leaves.
    OverQuota(String),
    /// A pod whose resource claim has no template.
    NoTemplate(String),
    /// A created object without owner, label or valid name.
    Malformed(String),
    /// A pod that the restricted pod security standard would refuse.
    Unrestricted(String),
    /// A condition twice, or one that is not in the closed set.
    Condition(String),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WrittenTwice(name) => write!(f, "{name} is written twice"),
            Self::Unobserved(name) => write!(f, "{name} was not observed"),
            Self::Foreign(name) => write!(f, "{name} is controlled by something else"),
            Self::IndexTwice(index) => write!(f, "replica {index} would have two pods"),
            Self::PartGroup(index) => {
                write!(f, "the group of replica {index} would not be whole")
            }
            Self::TooMany { pods, allowed } => write!(f, "{pods} pods, {allowed} are allowed"),
            Self::TooFew { ready, promised } => {
                write!(f, "{ready} replicas would answer, {promised} are promised")
            }
            Self::Overbooked(node) => write!(f, "node {node} is overbooked"),
            Self::SickGpu(name) => {
                write!(f, "pod {name} could come to a node with a GPU at fault")
            }
            Self::Outranks(name) => {
                write!(
                    f,
                    "pod {name} takes the place of one that is not of lower priority"
                )
            }
            Self::OverQuota(name) => write!(f, "quota {name} leaves too few devices"),
            Self::NoTemplate(name) => write!(f, "the claim of pod {name} has no template"),
            Self::Malformed(name) => write!(f, "{name} is malformed"),
            Self::Unrestricted(name) => write!(f, "pod {name} is not restricted"),
            Self::Condition(kind) => write!(f, "condition {kind} is wrong"),
        }
    }
}

/// All rules a plan breaks.
pub fn check(plan: &Plan, snapshot: &Snapshot, settings: &Settings) -> Vec<Flaw> {
    let mut flaws = Vec::new();
    check_writes(plan, snapshot, &mut flaws);
    check_objects(plan, snapshot, settings, &mut flaws);
    check_replicas(plan, snapshot, &mut flaws);
    check_room(plan, snapshot, &mut flaws);
    check_gpu_faults(plan, snapshot, &mut flaws);
    check_claims(plan, snapshot, &mut flaws);
    let mut kinds = BTreeSet::new();
    for condition in &plan.status.conditions {
        let is_known = operator_api::ConditionType::parse(&condition.type_).is_some()
            && operator_api::Reason::parse(&condition.reason).is_some();
        if !is_known || !kinds.insert(&condition.type_) {
            flaws.push(Flaw::Condition(condition.type_.clone()));
        }
    }
    flaws
}

fn check_gpu_faults(plan: &Plan, snapshot: &Snapshot, flaws: &mut Vec<Flaw>) {
    let own = snapshot.deployment.status.iter();
    let own = own.flat_map(|status| &status.gpu_faults);
    let faults = own.chain(&plan.status.gpu_faults);
    let sick: BTreeSet<&str> = faults
        .chain(&snapshot.gpu_faults)
        .filter(|fault| gpu_faults::counts(fault, snapshot))
        .map(|fault| fault.node.as_str())
        .collect();
    if sick.is_empty() {
        return;
    }
    for action in &plan.actions {
        if let Action::Create(Object::Pod(pod)) = action
            && let Some(spec) = &pod.spec
            && Resources::of_pod(spec).devices() > 0
            && objects::offered_nodes(pod).any(|node| sick.contains(node))
        {
            let name = pod.metadata.name.clone().unwrap_or_default();
            flaws.push(Flaw::SickGpu(name));
        }
    }
}

fn check_writes(plan: &Plan, snapshot: &Snapshot, flaws: &mut Vec<Flaw>) {
    let mut written = BTreeSet::new();
    for action in &plan.actions {
        let (kind, name) = action.target();
        if !written.insert((kind, name)) {
            flaws.push(Flaw::WrittenTwice(format!("{} {name}", kind.as_str())));
        }
        let is_observed = match action {
            Action::PatchPod { uid, .. } | Action::Release { uid, .. } => snapshot
                .pods
                .iter()
                .any(|p| p.name == name && p.uid == *uid),
            Action::Delete {
                kind: Kind::Pod,
                uid,
                ..
            } => snapshot
                .pods
                .iter()
                .any(|p| p.name == name && p.uid == *uid),
            Action::Delete {
                kind: Kind::ConfigMap,
                uid,
                ..
            } => snapshot
                .config_maps
                .iter()
                .any(|m| m.name == name && m.uid == *uid),
            Action::Delete {
                kind: Kind::ResourceClaimTemplate,
                uid,
                ..
            } => snapshot
                .claim_templates
                .iter()
                .any(|t| t.name == name && t.uid == *uid),
            Action::Delete {
                kind: Kind::Service,
                uid,
                ..
            } => {
                let found = snapshot.ranks_service.as_ref();
                found.is_some_and(|it| is_that(&it.metadata, name, uid))
            }
            Action::Delete {
                kind: Kind::NetworkPolicy,
                uid,
                ..
            } => {
                let found = snapshot.ranks_policy.as_ref();
                found.is_some_and(|it| is_that(&it.metadata, name, uid))
            }
            Action::Delete {
                kind: Kind::PodDisruptionBudget,
                ..
            } => false,
            Action::Adopt { kind, uid, .. } => is_left(snapshot, *kind, name, uid),
            Action::Create(_) | Action::Apply(_) => true,
        };
        if !is_observed {
            flaws.push(Flaw::Unobserved(format!("{} {name}", kind.as_str())));
        }
        let mut pods = snapshot.pods.iter();
        if kind == Kind::Pod && pods.any(|pod| pod.name == name && snapshot.is_foreign(pod)) {
            flaws.push(Flaw::Foreign(name.to_owned()));
        }
    }
}

/// Whether an object of that uid was observed with nothing that controls it.
fn is_left(snapshot: &Snapshot, kind: Kind, name: &str, uid: &str) -> bool {
    let is_it = |found: (&String, &String, Controller)| {
        found.0 == name && found.1 == uid && found.2.is_nothing()
    };
    match kind {
        Kind::Pod => {
            let mut all = snapshot.pods.iter();
            all.any(|pod| is_it((&pod.name, &pod.uid, pod.controller)))
        }
        Kind::ConfigMap => {
            let mut all = snapshot.config_maps.iter();
            all.any(|map| is_it((&map.name, &map.uid, map.controller)))
        }
        Kind::ResourceClaimTemplate => {
            let mut all = snapshot.claim_templates.iter();
            all.any(|one| is_it((&one.name, &one.uid, one.controller)))
        }
        Kind::Service | Kind::PodDisruptionBudget | Kind::NetworkPolicy => false,
    }
}

fn is_that(metadata: &ObjectMeta, name: &str, uid: &str) -> bool {
    metadata.name.as_deref() == Some(name) && metadata.uid.as_deref() == Some(uid)
}

fn check_objects(plan: &Plan, snapshot: &Snapshot, settings: &Settings, flaws: &mut Vec<Flaw>) {
    let owner = snapshot
        .deployment
        .metadata
        .uid
        .as_deref()
        .unwrap_or_default();
    for action in &plan.actions {
        let (Action::Create(object) | Action::Apply(object)) = action else {
            continue;
        };
        let metadata = match object {
            Object::Pod(object) => &object.metadata,
            Object::ConfigMap(object) => &object.metadata,
            Object::Service(object) => &object.metadata,
            Object::PodDisruptionBudget(object) => &object.metadata,
            Object::ResourceClaimTemplate(object) => &object.metadata,
            Object::NetworkPolicy(object) => &object.metadata,
        };
        let labels = metadata.labels.clone().unwrap_or_default();
        let owners = metadata.owner_references.as_deref().unwrap_or_default();
        let is_formed = owners.len() == 1
            && owners[0].uid == owner
            && owners[0].controller == Some(true)
            && metadata.namespace == snapshot.deployment.metadata.namespace
            && labels.get(names::MODEL_DEPLOYMENT) == snapshot.deployment.metadata.name.as_ref()
            && labels.contains_key(names::COMPONENT)
            && (1..=63).contains(&object.name().len());
        if !is_formed {
            flaws.push(Flaw::Malformed(object.name().to_owned()));
        }
        if let Object::Pod(pod) = object
            && !is_restricted(pod, settings)
        {
            flaws.push(Flaw::Unrestricted(object.name().to_owned()));
        }
    }
}

/// The restricted pod security standard, as far as our pods could break it, but for the one directory of nodes that the
/// operator's administrator chose.
fn is_restricted(pod: &Pod, settings: &Settings) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let Some(security) = &spec.security_context else {
        return false;
    };
    let seccomp = security.seccomp_profile.as_ref().map(|p| p.type_.as_str());
    let pod_is = security.run_as_non_root == Some(true)
        && seccomp == Some("RuntimeDefault")
        && spec.host_network != Some(true)
        && spec.automount_service_account_token == Some(false);
    let volumes_are = spec
        .volumes
        .iter()
        .flatten()
        .filter_map(|volume| volume.host_path.as_ref())
        .all(|host| {
            let chosen = settings.node_cache.as_ref();
            chosen.is_some_and(|chosen| chosen.path == host.path)
        });
    let containers_are = spec.containers.iter().all(|container| {
        container.security_context.as_ref().is_some_and(|security| {
            let drops = security.capabilities.as_ref().and_then(|c| c.drop.as_ref());
            security.allow_privilege_escalation == Some(false)
                && security.read_only_root_filesystem == Some(true)
                && drops.is_some_and(|drops| drops.iter().any(|drop| drop == "ALL"))
        })
    });
    pod_is && volumes_are && containers_are
}

fn check_replicas(plan: &Plan, snapshot: &Snapshot, flaws: &mut Vec<Flaw>) {
    let Ok(valid) = validate(&snapshot.deployment) else {
        return;
    };
    let replicas = observe(snapshot);
    let mut removed = BTreeSet::new();
    let mut drained = BTreeSet::new();
    let mut taken_back = BTreeSet::new();
    let mut created: Vec<&Pod> = Vec::new();
    for action in &plan.actions {
        match action {
            Action::Create(Object::Pod(pod)) if label(pod, names::COMPONENT) == names::ENGINE => {
                created.push(pod);
            }
            Action::Delete {
                kind: Kind::Pod,
                name,
                ..
            } => {
                removed.insert(name.as_str());
            }
            Action::PatchPod { name, labels, .. } => {
                let serving = labels.get(names::SERVING).map(String::as_str);
                if serving == Some("false") {
                    &mut drained
                } else {
                    &mut taken_back
                }
                .insert(name.as_str());
            }
            _ => {}
        }
    }
    let stays = |replica: &&Replica<'_>| {
        !replica
            .pods()
            .any(|pod| removed.contains(pod.name.as_str()))
    };
    let created: Vec<PodView> = created.into_iter().map(PodView::of).collect();
    check_indices(&replicas, &created, flaws);
    check_groups(&replicas, &created, &removed, flaws);
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let wanted = plan
        .status
        .wanted_replicas
        .and_then(|n| u32::try_from(n).ok())
        .unwrap_or(0);
    let live_before = count(replicas.iter().filter(|r| r.is_live()).count());
    // Pods that complete a group make no further replica.
    let new: BTreeSet<_> = created.iter().map(PodView::group).collect();
    let is_known = |group: &&GroupKey<'_>| replicas.iter().any(|r| r.pod.group() == **group);
    let kept = replicas.iter().filter(|r| r.is_live()).filter(stays);
    let live_after = count(kept.count() + new.iter().filter(|new| !is_known(new)).count());
    let allowed = wanted
        .saturating_add(valid.rollout.surge_max)
        .max(live_before);
    if !created.is_empty() && live_after > allowed {
        flaws.push(Flaw::TooMany {
            pods: live_after,
            allowed,
        });
    }
    // Those that give way to a higher priority leave without our doing; nobody else leaves for it.
    let stands = |r: &Replica<'_>| r.is_ready() && snapshot.contest.claimant_of(r.pods()).is_none();
    let ready_before = count(replicas.iter().filter(|r| stands(r)).count());
    let is_taken_away =
        |r: &&Replica<'_>| stands(r) && (!stays(r) || drained.contains(r.pod.name.as_str()));
    let taken_away = count(replicas.iter().filter(is_taken_away).count());
    let ready = ready_before - taken_away;
    let promised = wanted.saturating_sub(valid.rollout.unavailable_max);
    if taken_away > 0 && ready < promised {
        flaws.push(Flaw::TooFew { ready, promised });
    }
}

/// One pod that may run for each rank of each index, and none of them of another group.
fn check_indices(replicas: &[Replica<'_>], created: &[PodView], flaws: &mut Vec<Flaw>) {
    let mut ranks = BTreeSet::new();
    // A pod that is only being deleted may still run: its index is taken as well.
    let existing: Vec<&PodView> = replicas
        .iter()
        .flat_map(Replica::pods)
        .filter(|pod| !pod.is_finished())
        .collect();
    let new = created.iter().map(|pod| (pod, true));
    for (pod, is_new) in existing.iter().map(|pod| (*pod, false)).chain(new) {
        let Ok(index) = pod.label(names::REPLICA).parse::<u32>() else {
            continue;
        };
        if !ranks.insert((index, pod.rank())) && is_new {
            flaws.push(Flaw::IndexTwice(index));
        }
        let is_other = |other: &&&PodView| {
            other.label(names::REPLICA) == pod.label(names::REPLICA) && other.group() != pod.group()
        };
        if is_new && existing.iter().find(is_other).is_some() {
            flaws.push(Flaw::PartGroup(index));
        }
    }
}

/// What is created makes groups whole, and what is removed leaves no part of one that lives.
fn check_groups(
    replicas: &[Replica<'_>],
    created: &[PodView],
    removed: &BTreeSet<&str>,
    flaws: &mut Vec<Flaw>,
) {
    let index = |pod: &PodView| pod.label(names::REPLICA).parse().unwrap_or(u32::MAX);
    for pod in created.iter().filter(|pod| pod.ranks() > 1) {
        let of_it = |other: &&PodView| other.group() == pod.group();
        let there = replicas.iter().flat_map(Replica::pods).filter(of_it);
        let ranks: BTreeSet<u32> = created
            .iter()
            .filter(of_it)
            .chain(there)
            .map(PodView::rank)
            .collect();
        if !ranks.into_iter().eq(0..pod.ranks()) {
            flaws.push(Flaw::PartGroup(index(pod)));
        }
    }
    for replica in replicas {
        let is_draining = matches!(replica.state, State::Draining { .. });
        let leaving = replica
            .pods()
            .filter(|pod| removed.contains(pod.name.as_str()));
        let leaving = leaving.count();
        let is_part = leaving > 0 && leaving < replica.pods().count();
        if is_part && (replica.is_live() || is_draining) {
            flaws.push(Flaw::PartGroup(index(replica.pod)));
        }
    }
}

/// A pod's claim is made from a template that is there before the pod, and stays.
fn check_claims(plan: &Plan, snapshot: &Snapshot, flaws: &mut Vec<Flaw>) {
    let mut templates: BTreeSet<&str> = snapshot
        .claim_templates
        .iter()
        .map(|template| template.name.as_str())
        .collect();
    let gone = plan.actions.iter().filter_map(|action| match action {
        Action::Delete {
            kind: Kind::ResourceClaimTemplate,
            name,
            ..
        } => Some(name.as_str()),
        _ => None,
    });
    let gone: BTreeSet<&str> = gone.collect();
    for action in &plan.actions {
        match action {
            Action::Apply(object @ Object::ResourceClaimTemplate(_)) => {
                templates.insert(object.name());
            }
            Action::Create(Object::Pod(pod)) => {
                let claims = pod.spec.iter().flat_map(|spec| &spec.resource_claims);
                let mut named = claims
                    .flatten()
                    .filter_map(|claim| claim.resource_claim_template_name.as_deref());
                if !named.all(|name| templates.contains(name) && !gone.contains(name)) {
                    let name = pod.metadata.name.clone().unwrap_or_default();
                    flaws.push(Flaw::NoTemplate(name));
                }
            }
            _ => {}
        }
    }
}

fn check_room(plan: &Plan, snapshot: &Snapshot, flaws: &mut Vec<Flaw>) {
    let mut taken: BTreeMap<String, Resources> = BTreeMap::new();
    let returned = returned(plan, snapshot, flaws);
    for action in &plan.actions {
        let Action::Create(Object::Pod(pod)) = action else {
            continue;
        };
        if let (Some(node), Some(spec)) = (objects::offered_nodes(pod).next(), &pod.spec) {
            *taken.entry(node.to_owned()).or_default() += Resources::of_pod(spec);
        }
    }
    let all = taken
        .values()
        .fold(Resources::default(), |sum, amount| sum + *amount)
        .accelerators();
    for quota in &snapshot.quotas {
        if quota.exceeded(&all, &BTreeMap::new()).is_some() {
            flaws.push(Flaw::OverQuota(quota.name.clone()));
        }
    }
    for (name, amount) in taken {
        let fits = snapshot.cluster.nodes.get(&name).is_some_and(|node| {
            let used = snapshot.cluster.used.get(name.as_str()).copied();
            let back = returned.get(&name).copied().unwrap_or_default();
            let used = used.unwrap_or_default().minus(back);
            amount.fit_in(&node.allocatable.minus(used))
        });
        if !fits {
            flaws.push(Flaw::Overbooked(name));
        }
    }
}

/// What nodes get back from pods that give way to ours, and from our pods that are removed before
/// they were there.
fn returned(
    plan: &Plan,
    snapshot: &Snapshot,
    flaws: &mut Vec<Flaw>,
) -> BTreeMap<String, Resources> {
    let contest = &snapshot.contest;
    let class = snapshot
        .deployment
        .spec
        .placement
        .priority_class_name
        .as_deref();
    let own = Priority::of(class, &contest.classes);
    let mut leaving: BTreeSet<String> = BTreeSet::new();
    let mut back: BTreeMap<String, Resources> = BTreeMap::new();
    for pod in snapshot.pods.iter().filter(|pod| pod.is_reserving()) {
        leaving.extend(pod.victims().map(|victim| victim.uid.to_owned()));
        let is_removed = plan.actions.iter().any(|action| {
            matches!(action, Action::Delete { kind: Kind::Pod, uid, .. } if *uid == pod.uid)
        });
        if let (true, Some(node)) = (is_removed, pod.planned_nodes().first()) {
            *back.entry((*node).to_owned()).or_default() += pod.requests;
        }
    }
    for action in &plan.actions {
        let Action::Create(Object::Pod(pod)) = action else {
            continue;
        };
        for victim in Victim::of(pod) {
            let is_lower = contest
                .rivals
                .iter()
                .filter(|rival| rival.pod.priority < own.value)
                .any(|rival| rival.pods().any(|pod| pod.uid == victim.uid));
            if !is_lower || !own.preempts {
                let name = pod.metadata.name.clone().unwrap_or_default();
                flaws.push(Flaw::Outranks(name));
            }
            leaving.insert(victim.uid.to_owned());
        }
    }
    for pod in contest.rivals.iter().flat_map(Rival::pods) {
        if leaving.contains(&pod.uid)
            && let Some(node) = pod.place()
        {
            *back.entry(node.to_owned()).or_default() += pod.requests;
        }
    }
    back
}

fn label<'a>(pod: &'a Pod, key: &str) -> &'a str {
    let labels = pod.metadata.labels.as_ref();
    labels
        .and_then(|labels| labels.get(key))
        .map_or("", String::as_str)
}
