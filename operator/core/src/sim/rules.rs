//! The rules that hold in every story, whatever goes wrong:
//!
//! - one pod at most that may run for each rank of each replica index of a ModelDeployment, and all of
//!   an index from one group;
//! - no plan that breaks the rules of [`crate::check`];
//! - never more pods than wanted plus surge by a create of ours;
//! - never fewer answering replicas than promised by a drain or delete of ours: what others ended
//!   meanwhile, unseen by us, is not our doing, what we ended is, heard of or not;
//! - nobody takes the place of a replica that is worth as much;
//! - no new pod of GPUs for a node while a GPU of it is remembered as at fault, and nothing of that forgotten before it is
//!   repaired;
//! - after the last fault: every child controlled by its ModelDeployment, no write repeated for ever, nothing left over, and
//!   every ModelDeployment
//!   complete, or told that no node fits while indeed none does, even without all that is worth less.

use std::collections::{BTreeMap, BTreeSet};

use super::Broken;
use super::world::{Key, World};
use crate::explain::{Standing, explain};
use crate::gang::{self, Asked};
use crate::gpu_faults::{FORGET_SECONDS, marked};
use crate::names;
use crate::objects::preferred_nodes;
use crate::ownership::Controller;
use crate::placement::{Room, Wish};
use crate::plan::{Action, Kind, Object, Plan, Settings};
use crate::priority::{Priority, Rival};
use crate::replicas::{GroupKey, Replica, State, observe};
use crate::snapshot::{PodView, Snapshot};
use crate::time::seconds_between;
use crate::validate::validate;
use operator_api::ModelDeploymentStatus;

/// Times that one write may be repeated after the last fault. Where groups of the highest priority crash until their
/// revision takes nobody's place any more, lower ones come and go each time: 9 times in the worst of 10,000 stories.
const REPEATS_MAX: usize = 10;

/// Pods of one replica.
type Members<'a> = Vec<(&'a Key, &'a PodView)>;

/// Counts writes after the last fault.
#[derive(Debug, Default)]
pub(super) struct Repeats(BTreeMap<String, usize>);

impl Repeats {
    pub(super) fn count(&mut self, world: &World, action: &str) -> Result<(), Box<Broken>> {
        let count = self.0.entry(action.to_owned()).or_default();
        *count += 1;
        if *count > REPEATS_MAX {
            return Err(world.broken(format!("repeated for ever: {action}")));
        }
        Ok(())
    }
}

/// What a plan may not be, apart from what [`crate::check`] refuses.
pub(super) fn plan(world: &World, plan: &Plan) -> Result<(), Box<Broken>> {
    let rejected = plan
        .status
        .conditions
        .iter()
        .find(|condition| condition.reason == operator_api::Reason::PlanRejected.as_str());
    if let Some(condition) = rejected {
        return Err(world.broken(condition.message.clone()));
    }
    for action in &plan.actions {
        let is_foreign = match action {
            Action::Delete { kind, name, .. } => match kind {
                Kind::Pod | Kind::ConfigMap | Kind::ResourceClaimTemplate => false,
                // What groups shared goes when there are none.
                Kind::Service | Kind::NetworkPolicy => names::owner_of_ranks(name).is_none(),
                Kind::PodDisruptionBudget => true,
            },
            Action::Create(object) => !matches!(object, Object::Pod(_)),
            _ => false,
        };
        if is_foreign {
            return Err(world.broken(format!("an action of a form that is never used: {action}")));
        }
    }
    Ok(())
}

fn is_serving(pod: &PodView) -> bool {
    let is_in_service = pod.rank() > 0 || pod.label(names::SERVING) == "true";
    pod.ready && !pod.deleting && !pod.is_finished() && is_in_service
}

/// Whether a pod does serve, whatever is seen of it: one on a silent node answers nobody.
fn does_serve(world: &World, pod: &PodView) -> bool {
    let node = pod.node.as_ref();
    is_serving(pod) && node.is_some_and(|node| world.is_node_ready(node))
}

fn engines<'a>(world: &'a World, key: &'a Key) -> impl Iterator<Item = (&'a Key, &'a PodView)> {
    let (namespace, name) = key;
    world
        .pods
        .iter()
        .map(|(key, pod)| (key, &*pod.view))
        .filter(move |((space, _), pod)| {
            space == namespace
                && pod.label(names::MODEL_DEPLOYMENT) == name
                && pod.label(names::COMPONENT) == names::ENGINE
        })
}

/// Those of them that a ModelDeployment of that name which is gone does not still control.
fn own_engines<'a>(world: &'a World, key: &'a Key) -> impl Iterator<Item = (&'a Key, &'a PodView)> {
    engines(world, key).filter(|(_, pod)| is_own(world, key, pod))
}

fn is_own(world: &World, key: &Key, pod: &PodView) -> bool {
    let wish = world.wishes.get(key);
    let uid = wish.and_then(|wish| wish.deployment.metadata.uid.as_deref());
    pod.controller.is_nothing() || pod.controller == Controller::with_uid(uid.unwrap_or_default())
}

/// Replicas of a wish as its pods are, by what the pods of one have in common.
fn groups<'a>(
    pods: impl Iterator<Item = (&'a Key, &'a PodView)>,
) -> BTreeMap<GroupKey<'a>, Members<'a>> {
    let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (key, pod) in pods {
        groups.entry(pod.group()).or_default().push((key, pod));
    }
    groups
}

/// Whether a replica answers by its pods: every rank does, and the first is in the Service.
fn answers(pods: &[(&Key, &PodView)], does: impl Fn(&PodView) -> bool) -> bool {
    let is_whole = pods
        .first()
        .is_some_and(|(_, pod)| u32::try_from(pods.len()).is_ok_and(|count| count == pod.ranks()));
    is_whole && pods.iter().all(|(_, pod)| does(pod))
}

/// What the operator sees of a wish's engine pods.
fn seen_engines<'a>(
    world: &'a World,
    key: &'a Key,
) -> impl Iterator<Item = (&'a Key, &'a PodView)> {
    let seen = world.view.pods.iter().map(|(key, pod)| (key, &*pod.view));
    seen.filter(move |((space, _), pod)| {
        *space == key.0
            && pod.label(names::MODEL_DEPLOYMENT) == key.1
            && pod.label(names::COMPONENT) == names::ENGINE
            && is_own(world, key, pod)
    })
}

/// Whether a write takes a replica away that the operator sees answering.
pub(super) fn serving(world: &World, key: &Key, action: &Action) -> bool {
    let name = match action {
        Action::Delete {
            kind: Kind::Pod,
            name,
            ..
        } => name,
        Action::PatchPod { name, labels, .. }
            if labels.get(names::SERVING).map(String::as_str) == Some("false") =>
        {
            name
        }
        _ => return false,
    };
    // One that gives way to a higher priority is not promised any more.
    let gives_way = |pod: &PodView| {
        let contest = world
            .wishes
            .get(key)
            .map(|wish| world.view.contest(world, &wish.deployment));
        contest.is_some_and(|contest| contest.claimant(pod).is_some())
    };
    let has_it = |pods: &&Vec<(&Key, &PodView)>| pods.iter().any(|(key, _)| key.1 == *name);
    let seen = groups(seen_engines(world, key));
    let is_seen = seen.values().find(has_it);
    let truth = groups(own_engines(world, key));
    let is_true = truth.values().find(has_it);
    is_seen.is_some_and(|pods| answers(pods, |pod| is_serving(pod) && !gives_way(pod)))
        && is_true.is_some_and(|pods| answers(pods, |pod| does_serve(world, pod)))
}

/// What must hold after a write; `took_away` is [`serving`] before it.
pub(super) fn write(
    world: &World,
    key: &Key,
    action: &Action,
    wanted: u32,
    took_away: bool,
) -> Result<(), Box<Broken>> {
    one_pod_per_index(world, key)?;
    let Some(valid) = world
        .wishes
        .get(key)
        .and_then(|wish| validate(&wish.deployment).ok())
    else {
        return Ok(());
    };
    if let Action::Create(Object::Pod(pod)) = action {
        let annotations = pod.metadata.annotations.as_ref();
        let failures = annotations.and_then(|all| all.get(names::FAILURES)?.parse::<u32>().ok());
        let refused = annotations.is_some_and(|all| all.contains_key(names::REFUSED_NODES));
        let budget = valid.rollout.restart_budget;
        if !refused && failures.is_some_and(|failures| failures > budget) {
            return Err(world.broken(format!(
                "{action} after {failures:?} failures, {budget} are allowed"
            )));
        }
    }
    if let Action::Create(Object::Pod(pod)) = action {
        of_lower_priority(world, pod)?;
        away_from_sick_gpus(world, key, pod)?;
    }
    if matches!(action, Action::Create(Object::Pod(pod)) if is_engine(pod)) {
        let is_counted = |pod: &PodView| {
            let answers = pod
                .node
                .as_ref()
                .is_none_or(|node| world.is_node_ready(node));
            !pod.deleting && !pod.is_finished() && answers
        };
        // A group whose first rank is being ended, or gone, leaves: the others stay until its requests are finished, and
        // until that was seen. The first rank of a group is made first.
        let is_first = |pod: &PodView| pod.rank() == 0 && !pod.deleting;
        let is_leaving = |pods: &[(&Key, &PodView)]| !pods.iter().any(|(_, pod)| is_first(pod));
        let pods = groups(own_engines(world, key))
            .into_values()
            .filter(|pods| pods.iter().any(|(_, pod)| is_counted(pod)) && !is_leaving(pods))
            .count();
        let allowed = wanted.saturating_add(valid.rollout.surge_max);
        if u32::try_from(pods).unwrap_or(u32::MAX) > allowed {
            return Err(world.broken(format!("{pods} pods of {}, {allowed} are allowed", key.1)));
        }
    }
    if took_away {
        let truth = groups(own_engines(world, key));
        let does = |pods: &&Vec<_>| answers(pods, |pod| does_serve(world, pod));
        let left = truth.values().filter(does).count();
        let seen = groups(seen_engines(world, key));
        let unseen = seen.iter().filter(|(group, pods)| {
            let is_lost = pods.iter().any(|(key, _)| world.lost.contains(*key));
            let is_back = truth.get(*group).is_some_and(|pods| does(&pods));
            is_lost && answers(pods, is_serving) && !is_back
        });
        let answering = u32::try_from(left + unseen.count()).unwrap_or(u32::MAX);
        let promised = wanted.saturating_sub(valid.rollout.unavailable_max);
        if answering < promised {
            return Err(world.broken(format!(
                "{answering} replicas of {} answer by our doing, {promised} are promised",
                key.1
            )));
        }
    }
    Ok(())
}

/// GPUs that a wish remembers as at fault and that are not repaired, by node.
fn sick_gpus(world: &World, key: &Key) -> BTreeSet<(String, String)> {
    let status = world
        .wishes
        .get(key)
        .and_then(|wish| wish.deployment.status.as_ref());
    let faults = status.iter().flat_map(|status| &status.gpu_faults);
    let is_unrepaired = |fault: &&operator_api::GpuFaultStatus| {
        let node = world.nodes.get(&fault.node);
        node.is_some_and(|node| {
            node.view.uid == fault.node_uid && node.view.boot_id == fault.boot_id
        }) && seconds_between(fault.since.0, world.now) < FORGET_SECONDS
    };
    faults
        .filter(is_unrepaired)
        .map(|fault| (fault.node.clone(), fault.uuid.clone()))
        .collect()
}

fn away_from_sick_gpus(
    world: &World,
    key: &Key,
    pod: &k8s_openapi::api::core::v1::Pod,
) -> Result<(), Box<Broken>> {
    let view = PodView::of(pod);
    let nodes = preferred_nodes(pod);
    let sick = sick_gpus(world, key);
    let found = sick.iter().find(|(node, _)| nodes.contains(node));
    match found.filter(|_| view.requests.devices() > 0) {
        Some((node, uuid)) => Err(world.broken(format!(
            "{} is made for {node} in spite of {uuid}",
            view.name
        ))),
        None => Ok(()),
    }
}

/// What must be in a status that is about to be stored.
pub(super) fn status(
    world: &World,
    key: &Key,
    status: &ModelDeploymentStatus,
) -> Result<(), Box<Broken>> {
    let is_kept = |(node, uuid): &&(String, String)| {
        let mut faults = status.gpu_faults.iter();
        faults.any(|fault| fault.node == *node && fault.uuid == *uuid)
    };
    match sick_gpus(world, key).iter().find(|gpu| !is_kept(gpu)) {
        Some((node, uuid)) => Err(world.broken(format!(
            "{} forgets {uuid} of {node}, which is not repaired",
            key.1
        ))),
        None => Ok(()),
    }
}

/// Whether all whose place a pod takes are worth less than it, as the API server has it.
fn of_lower_priority(
    world: &World,
    pod: &k8s_openapi::api::core::v1::Pod,
) -> Result<(), Box<Broken>> {
    let class = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.priority_class_name.as_deref());
    let own = Priority::of(class, &world.classes);
    let view = PodView::of(pod);
    for victim in view.victims() {
        let mut all = world.pods.values();
        // One that is gone meanwhile is in nobody's way.
        let found = all.find(|other| other.view.uid == victim.uid);
        if found.is_some_and(|other| !own.preempts || other.view.priority >= own.value) {
            return Err(world.broken(format!(
                "{} of priority {} takes the place of {}",
                view.name, own.value, victim.uid
            )));
        }
    }
    Ok(())
}

fn is_engine(pod: &k8s_openapi::api::core::v1::Pod) -> bool {
    let labels = pod.metadata.labels.as_ref();
    labels.and_then(|labels| labels.get(names::COMPONENT).map(String::as_str))
        == Some(names::ENGINE)
}

fn one_pod_per_index(world: &World, key: &Key) -> Result<(), Box<Broken>> {
    let mut seen = BTreeMap::new();
    for (_, pod) in engines(world, key) {
        if pod.is_finished() {
            continue;
        }
        let index = pod.label(names::REPLICA);
        if let Some(other) = seen.insert((index, pod.rank()), pod) {
            return Err(world.broken(format!(
                "replica {index} has two pods: {} and {}",
                other.name, pod.name
            )));
        }
    }
    let mut indices: BTreeMap<&str, &PodView> = BTreeMap::new();
    for ((index, _), pod) in seen {
        let other = indices.entry(index).or_insert(pod);
        if other.group() != pod.group() {
            return Err(world.broken(format!(
                "replica {index} is of two groups: {} and {}",
                other.name, pod.name
            )));
        }
    }
    Ok(())
}

fn reason(status: &ModelDeploymentStatus, kind: &str) -> String {
    let mut all = status.conditions.iter();
    let found = all.find(|condition| condition.type_ == kind);
    found.map_or(String::new(), |condition| condition.reason.clone())
}

/// Whether all wanted replicas answer, with the revisions that the rollout allows.
fn is_complete(
    world: &World,
    snapshot: &Snapshot,
    replicas: &[Replica<'_>],
    wanted: usize,
) -> bool {
    let status = snapshot.deployment.status.clone().unwrap_or_default();
    let ready = replicas.iter().filter(|replica| replica.is_ready()).count();
    if ready != wanted || replicas.len() != wanted {
        return false;
    }
    let target = status.rollout.and_then(|rollout| rollout.target_revision);
    let target = target.unwrap_or_default();
    let old = replicas
        .iter()
        .filter(|replica| replica.revision() != target)
        .count();
    let partition = snapshot.deployment.spec.rollout.partition.unwrap_or(0);
    let partition = usize::try_from(partition).unwrap_or(0);
    let status = snapshot.deployment.status.clone().unwrap_or_default();
    match reason(&status, "Ready").as_str() {
        "ScaledToZero" => wanted == 0,
        "AllReplicasReady" => old == 0,
        "PartitionReached" => old == partition.min(wanted),
        // The way back is taken, and for a reason.
        "RolledBack" => old == wanted && world.is_suspect(&target, snapshot),
        _ => false,
    }
}

/// Whether a revision that never answers was given up where there is no way back.
fn gave_up(world: &World, snapshot: &Snapshot, replicas: &[Replica<'_>]) -> bool {
    let status = snapshot.deployment.status.clone().unwrap_or_default();
    let rollout = status.rollout.clone().unwrap_or_default();
    let target = rollout.target_revision.unwrap_or_default();
    let halts = snapshot.deployment.spec.rollout.on_failure == Some(operator_api::OnFailure::Halt);
    let is_stuck = replicas.iter().any(|replica| {
        replica.revision() == target
            && matches!(replica.state, State::Failed { .. } | State::Failing { .. })
    });
    // Evictions use the budget up as well; that it is not exceeded is a rule of every create.
    if is_stuck && reason(&status, "Degraded") == "RestartBudgetExhausted" {
        return true;
    }
    let told = matches!(
        reason(&status, "Degraded").as_str(),
        "RestartBudgetExhausted" | "ReplicasFailing" | "RolloutHalted"
    );
    // Someone may have removed what made the revision before.
    let has_record = rollout.stable_revision.as_ref().is_some_and(|stable| {
        let name = format!("-{stable}");
        let mut maps = snapshot.config_maps.iter();
        maps.any(|map| map.name.ends_with(&name))
    });
    let no_way_back = halts
        || !has_record
        || rollout.stable_revision.is_none()
        || rollout.stable_revision == Some(target.clone());
    told && (no_way_back && is_stuck || halts && rollout.failure.is_some())
        && world.is_suspect(&target, snapshot)
}

/// Whether the world is as its users want it.
pub(super) fn settled(world: &World, settings: &Settings) -> Result<(), String> {
    for key in world.keys() {
        wish_settled(world, settings, &key)
            .map_err(|why| format!("{} does not settle: {why}", key.1))?;
    }
    let is_left_over = |(namespace, _): &Key, owner: &str| {
        !owner.is_empty()
            && !world
                .wishes
                .contains_key(&(namespace.clone(), owner.to_owned()))
    };
    for (key, pod) in &world.pods {
        if is_left_over(key, pod.view.label(names::MODEL_DEPLOYMENT)) {
            return Err(format!("pod {} is left over", key.1));
        }
    }
    for (key, (owner, _)) in &world.config_maps {
        if is_left_over(key, owner) {
            return Err(format!("config map {} is left over", key.1));
        }
    }
    Ok(())
}

fn wish_settled(world: &World, settings: &Settings, key: &Key) -> Result<(), String> {
    let truth = world.truth(key).ok_or("it is gone")?;
    let snapshot = marked(&truth).into_owned();
    let plan = crate::plan(&snapshot, settings);
    let actions: Vec<String> = plan.actions.iter().map(ToString::to_string).collect();
    if !actions.is_empty() {
        return Err(format!("there is still something to do: {actions:?}"));
    }
    all_are_owned(&snapshot)?;
    let spec = &snapshot.deployment.spec;
    let least = spec.autoscaling.as_ref().map(|range| range.min_replicas);
    let wanted = spec.replicas.or(least).unwrap_or(0);
    let wanted = usize::try_from(wanted).unwrap_or(0);
    let replicas = observe(&snapshot);
    let revisions: BTreeSet<&str> = replicas.iter().map(Replica::revision).collect();
    // One for the facts, one for each revision that runs; that of the spec and the last that all ran have one too.
    if snapshot.config_maps.len() > 3 + revisions.len() {
        return Err(format!(
            "{} config maps are left over",
            snapshot.config_maps.len()
        ));
    }
    let status = snapshot.deployment.status.clone().unwrap_or_default();
    if is_complete(world, &snapshot, &replicas, wanted) {
        return Ok(());
    }
    if gave_up(world, &snapshot, &replicas) {
        return Ok(());
    }
    let states: Vec<String> = replicas
        .iter()
        .map(|replica| {
            format!(
                "{} ({}): {:?}",
                replica.pod.name,
                replica.revision(),
                replica.state
            )
        })
        .collect();
    let words = format!(
        "{wanted} replicas are wanted: {states:?}, Ready is {}",
        reason(&status, "Ready")
    );
    if !matches!(
        reason(&status, "Planned").as_str(),
        "NoNodeFits" | "MemoryDoesNotFit" | "NotServedYet" | "GpuQuotaExceeded" | "Preempted"
    ) {
        return Err(format!(
            "{words}, Planned is {}",
            reason(&status, "Planned")
        ));
    }
    if reason(&status, "Planned") == "GpuQuotaExceeded" {
        let needs = status.plan.as_ref().map_or(0, |plan| plan.gpus_per_replica);
        let needs = u64::try_from(needs).unwrap_or(0);
        let is_so = snapshot.quotas.iter().any(|quota| {
            let mut limits = quota.limits.values();
            limits.any(|limit| limit.used + needs > limit.most)
        });
        return if is_so {
            Ok(())
        } else {
            Err(format!(
                "{words}, though {:?} allow {needs} GPUs more",
                snapshot.quotas
            ))
        };
    }
    let explanation = explain(&snapshot, settings, &plan);
    let fits = explanation
        .nodes
        .iter()
        .find(|group| matches!(group.standing, Standing::Fits | Standing::Holds));
    match fits {
        Some(group) => Err(format!("{words}, though {:?} would fit", group.nodes)),
        None => nobody_else_can_leave(&snapshot, settings, &replicas, wanted)
            .map_err(|why| format!("{words}, though {why}")),
    }
}

/// Whether everything that a ModelDeployment has goes with it.
fn all_are_owned(snapshot: &Snapshot) -> Result<(), String> {
    let uid = snapshot.deployment.metadata.uid.as_deref();
    let own = Controller::with_uid(uid.unwrap_or_default());
    let pods = snapshot.pods.iter().map(|pod| (&pod.name, pod.controller));
    let maps = snapshot.config_maps.iter();
    let maps = maps.map(|map| (&map.name, map.controller));
    let templates = snapshot.claim_templates.iter();
    let templates = templates.map(|one| (&one.name, one.controller));
    let mut all = pods.chain(maps).chain(templates);
    if let Some((name, _)) = all.find(|(_, controller)| *controller != own) {
        return Err(format!("{name} is not its own"));
    }
    let services = [&snapshot.service, &snapshot.ranks_service];
    let services = services.into_iter().flatten().map(|it| &it.metadata);
    let budget = snapshot.disruption_budget.iter().map(|it| &it.metadata);
    let policy = snapshot.ranks_policy.iter().map(|it| &it.metadata);
    let mut all = services.chain(budget).chain(policy);
    match all.find(|metadata| Controller::of(metadata) != own) {
        Some(metadata) => Err(format!("{:?} is not its own", metadata.name)),
        None => Ok(()),
    }
}

/// Whether a ModelDeployment that misses a replica is in nobody's debt: no node would fit even
/// without all that is worth less.
fn nobody_else_can_leave(
    snapshot: &Snapshot,
    settings: &Settings,
    replicas: &[Replica<'_>],
    wanted: usize,
) -> Result<(), String> {
    let failed = replicas
        .iter()
        .any(|replica| matches!(replica.state, State::Failed { .. }));
    let live = replicas.iter().filter(|replica| replica.is_live()).count();
    let Some(Ok((valid, _, layout))) = crate::decide::chosen(snapshot, settings) else {
        return Ok(());
    };
    // One that failed before takes nobody's place, and neither does what a rollout adds. Where a number is
    // kept off spot nodes, the place may not be one for the next replica.
    if failed || live >= wanted || valid.placement.on_demand_min.is_some() {
        return Ok(());
    }
    let wish = Wish {
        layout: &layout,
        requests: crate::objects::engine_requests(&valid, &layout),
        placement: &valid.placement,
        own: BTreeMap::new(),
        avoid: Vec::new(),
        holders: Default::default(),
    };
    let mut room = Room::new(&snapshot.cluster);
    for pod in snapshot.contest.rivals.iter().flat_map(Rival::pods) {
        if let Some(node) = pod.place() {
            room.give_back(node, pod.requests);
        }
    }
    if layout.pods > 1 {
        let asked = Asked {
            ranks: layout.pods,
            ..Asked::default()
        };
        return match gang::place(&wish, &room, &asked) {
            Ok(nodes) => Err(format!("{nodes:?} are held by replicas of lower priority")),
            Err(_) => Ok(()),
        };
    }
    let mut nodes = room.nodes();
    match nodes.find(|node| crate::placement::why_not(node, &wish, &room).is_none()) {
        Some(node) => Err(format!(
            "{} is held by replicas of lower priority",
            node.name
        )),
        None => Ok(()),
    }
}
