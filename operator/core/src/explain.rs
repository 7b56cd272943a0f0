//! A plan as people and scripts read it: what is done, where, and for every other node why not.
//!
//! Made from the plan and the snapshot it came from, with the planner's own reasons, so that it
//! can say nothing the operator would not say. Nodes are judged as the next replica would find
//! them, after everything this plan takes.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::decide::chosen;
use crate::fit::{Layout, layout_words, parallelism_words};
use crate::gang::{self, Asked};
use crate::gpu_faults;
use crate::names;
use crate::node_cache;
use crate::objects;
use crate::placement::{self, Room, WhyNot, Wish};
use crate::plan::{Action, Object, Plan, Settings};
use crate::replicas::{State, observe, state};
use crate::resources::Resources;
use crate::snapshot::{PodView, Snapshot};

/// Nodes named in a group; the others are counted.
pub const NODES_NAMED_MAX: usize = 8;
/// Nodes named as places of one pod.
const CHOICES_NAMED_MAX: usize = 4;

/// A plan and its reasons.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Namespace of the ModelDeployment.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Replicas wanted.
    pub wanted: u32,
    /// Whether all of them have a place.
    pub fits: bool,
    /// Conditions as the plan would report them.
    pub conditions: Vec<Judgement>,
    /// How one replica is laid out, once that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layout: Option<LayoutWords>,
    /// Engine pods that exist.
    pub pods: Vec<PodWords>,
    /// Engine pods that the plan creates.
    pub places: Vec<Place>,
    /// Writes, in order.
    pub actions: Vec<String>,
    /// All nodes by what they mean for the next replica; empty while there is no layout.
    pub nodes: Vec<NodeGroup>,
    /// Seconds after which the operator looks again by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub look_again_seconds: Option<u64>,
}

/// A condition without its times.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Judgement {
    /// Type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Status.
    pub status: String,
    /// Reason.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// A layout in words and numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LayoutWords {
    /// Revision that it makes.
    pub revision: String,
    /// Product, or `CPU`.
    pub device: String,
    /// GPUs of one replica.
    pub gpus_per_replica: u32,
    /// Pods of one replica, where it is a group of several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pods_per_replica: Option<u32>,
    /// For example `TP 8, EP 8`.
    pub parallelism: String,
    /// Bytes of one rank.
    pub rank_bytes: u64,
    /// Tokens the KV cache of one replica holds.
    pub kv_tokens: u64,
    /// One line with the parts of the memory plan.
    pub words: String,
}

/// An engine pod that exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodWords {
    /// Name.
    pub name: String,
    /// What it is doing: Ready, Starting, Draining, …
    pub state: &'static str,
    /// Node it is bound to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Revision.
    pub revision: String,
    /// Why, where there is something to say.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// A pod that the plan creates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Place {
    /// Name of the pod.
    pub pod: String,
    /// Nodes it may be bound to, best first, at most four of them.
    pub nodes: Vec<String>,
    /// Further nodes.
    pub more_nodes: usize,
    /// ModelDeployments whose replicas have to leave first, as `namespace/name`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub preempts: Vec<String>,
}

/// What nodes mean for the next replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Standing {
    /// A replica of this ModelDeployment is there or planned there, and no further one fits.
    InUse,
    /// Another replica fits, and the weights are there.
    Holds,
    /// Another replica fits.
    Fits,
    /// No replica fits.
    DoesNotFit,
}

/// Nodes that mean the same for the next replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeGroup {
    /// What they mean.
    pub standing: Standing,
    /// How many there are.
    pub count: usize,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What would make one of them fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Names of the first eight.
    pub nodes: Vec<String>,
}

/// Explains `plan`, which was made from `snapshot`.
pub fn explain(snapshot: &Snapshot, settings: &Settings, plan: &Plan) -> Explanation {
    let snapshot = &*gpu_faults::marked(snapshot);
    let choice = chosen(snapshot, settings).and_then(Result::ok);
    let metadata = &snapshot.deployment.metadata;
    let is_planned = |c: &&k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition| {
        c.type_ == operator_api::ConditionType::Planned.as_str()
    };
    let planned = plan.status.conditions.iter().find(is_planned);
    let nodes = choice.as_ref().map(|(valid, _, layout)| {
        let requests = objects::engine_requests(valid, layout);
        let holders = node_cache::holders(plan.status.node_cache.as_ref(), valid, settings);
        let wish = Wish {
            layout,
            requests,
            placement: &valid.placement,
            own: own_nodes(snapshot, plan),
            avoid: Vec::new(),
            holders: holders.iter().map(String::as_str).collect(),
        };
        node_groups(snapshot, plan, &wish)
    });
    Explanation {
        namespace: metadata.namespace.clone().unwrap_or_default(),
        name: metadata.name.clone().unwrap_or_default(),
        wanted: plan
            .status
            .wanted_replicas
            .and_then(|number| u32::try_from(number).ok())
            .unwrap_or(0),
        fits: planned.is_some_and(|condition| condition.status == "True"),
        conditions: judgements(&plan.status.conditions),
        layout: choice
            .as_ref()
            .map(|(_, revision, layout)| layout_of(revision.as_str(), layout)),
        pods: pods(snapshot),
        places: places(plan),
        actions: plan.actions.iter().map(ToString::to_string).collect(),
        nodes: nodes.unwrap_or_default(),
        look_again_seconds: plan.wake_after.map(|after| after.as_secs()),
    }
}

/// Conditions without their times.
pub fn judgements(
    conditions: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition],
) -> Vec<Judgement> {
    conditions
        .iter()
        .map(|condition| Judgement {
            kind: condition.type_.clone(),
            status: condition.status.clone(),
            reason: condition.reason.clone(),
            message: condition.message.clone(),
        })
        .collect()
}

/// Engine pods that exist, and what they are doing.
pub fn pods(snapshot: &Snapshot) -> Vec<PodWords> {
    let replicas = observe(snapshot);
    let mut pods: Vec<&PodView> = replicas.iter().flat_map(|replica| replica.pods()).collect();
    pods.sort_by(|left, right| left.name.cmp(&right.name));
    pods.into_iter()
        .map(|pod| {
            let (state, mut message) = words_of(&state(pod, snapshot));
            if snapshot.is_foreign(pod) {
                message = "something else controls it".into();
            }
            PodWords {
                name: pod.name.clone(),
                state,
                node: pod.node.clone(),
                revision: pod.label(names::REVISION).to_owned(),
                message: with_rank(pod, message),
            }
        })
        .collect()
}

/// What is said of a pod, with its place in its group.
fn with_rank(pod: &PodView, message: String) -> String {
    match (pod.ranks(), message.is_empty()) {
        (1, _) => message,
        (ranks, true) => format!("rank {} of {ranks}", pod.rank()),
        (ranks, false) => format!("rank {} of {ranks}: {message}", pod.rank()),
    }
}

fn words_of(state: &State) -> (&'static str, String) {
    match state {
        State::Refused { message } => ("Refused", message.clone()),
        State::Waiting => ("Waiting", "until others have left its place".into()),
        State::Starting => ("Starting", String::new()),
        State::Failing { message } => ("Failing", message.clone()),
        State::Ready => ("Ready", String::new()),
        State::Draining { since } => ("Draining", format!("since {since}")),
        State::Leaving => ("Leaving", String::new()),
        State::Failed { message, .. } => ("Failed", message.clone()),
        State::Lost { node } => ("Lost", format!("node {node} does not answer")),
    }
}

fn layout_of(revision: &str, layout: &Layout) -> LayoutWords {
    LayoutWords {
        revision: revision.to_owned(),
        device: layout.kind.to_string(),
        gpus_per_replica: layout.gpus(),
        pods_per_replica: (layout.pods > 1).then_some(layout.pods),
        parallelism: parallelism_words(layout),
        rank_bytes: layout.memory.total_bytes(),
        kv_tokens: layout.memory.kv_tokens,
        words: layout_words(layout),
    }
}

/// Pods that the plan creates, with the nodes they may be bound to.
fn created(plan: &Plan) -> impl Iterator<Item = (&k8s_openapi::api::core::v1::Pod, Vec<String>)> {
    plan.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => {
            let nodes = objects::preferred_nodes(pod);
            (!nodes.is_empty()).then_some((&**pod, nodes))
        }
        _ => None,
    })
}

fn places(plan: &Plan) -> Vec<Place> {
    created(plan)
        .map(|(pod, mut nodes)| {
            let more_nodes = nodes.len().saturating_sub(CHOICES_NAMED_MAX);
            nodes.truncate(CHOICES_NAMED_MAX);
            Place {
                pod: pod.metadata.name.clone().unwrap_or_default(),
                nodes,
                more_nodes,
                preempts: owners(&PodView::of(pod)),
            }
        })
        .collect()
}

/// ModelDeployments whose replicas have to leave before a pod can be bound.
pub(crate) fn owners(pod: &PodView) -> Vec<String> {
    let mut owners: Vec<String> = pod
        .victims()
        .map(|victim| format!("{}/{}", victim.namespace, victim.deployment))
        .collect();
    owners.sort();
    owners.dedup();
    owners
}

/// Replicas of this deployment by node, those to be created included.
fn own_nodes(snapshot: &Snapshot, plan: &Plan) -> BTreeMap<String, usize> {
    let mut own = BTreeMap::new();
    for replica in observe(snapshot) {
        if !replica.is_live() && !matches!(replica.state, State::Draining { .. }) {
            continue;
        }
        for node in replica.pods().filter_map(PodView::place) {
            *own.entry(node.to_owned()).or_insert(0) += 1;
        }
    }
    for (_, nodes) in created(plan) {
        if let Some(node) = nodes.into_iter().next() {
            *own.entry(node).or_insert(0) += 1;
        }
    }
    own
}

fn node_groups(snapshot: &Snapshot, plan: &Plan, wish: &Wish<'_>) -> Vec<NodeGroup> {
    let mut room = Room::new(&snapshot.cluster);
    for (pod, nodes) in created(plan) {
        if let (Some(node), Some(spec)) = (nodes.first(), &pod.spec) {
            room.take(node, Resources::of_pod(spec));
        }
    }
    let mut in_use = Vec::new();
    let mut fitting = Vec::new();
    let mut reasons: Vec<(&str, WhyNot)> = Vec::new();
    let held_back = spot_held_back(snapshot, plan, wish);
    let few = few_ranks(wish, &room, held_back.as_ref());
    for node in room.nodes() {
        match placement::why_not(node, wish, &room) {
            None if crate::spot::is_spot(node) && held_back.is_some() => {
                reasons.extend(held_back.clone().map(|why| (node.name.as_str(), why)));
            }
            None if few.is_some() => {
                reasons.extend(few.clone().map(|why| (node.name.as_str(), why)));
            }
            None => fitting.push(node.name.clone()),
            Some(_) if wish.own.contains_key(&node.name) => in_use.push(node.name.clone()),
            Some(reason) => reasons.push((&node.name, reason)),
        }
    }
    let (holding, fitting): (Vec<String>, Vec<String>) = fitting
        .into_iter()
        .partition(|name| wish.holders.contains(name.as_str()));
    let simple = |standing, nodes: Vec<String>| NodeGroup {
        standing,
        count: nodes.len(),
        why: None,
        remedy: None,
        nodes: first(nodes),
    };
    let mut groups = vec![
        simple(Standing::InUse, in_use),
        simple(Standing::Holds, holding),
        simple(Standing::Fits, fitting),
    ];
    groups.retain(|group| group.count > 0);
    groups.extend(
        placement::groups(reasons)
            .into_iter()
            .map(|group| NodeGroup {
                standing: Standing::DoesNotFit,
                count: group.count,
                remedy: Some(group.why_not.remedy()),
                why: Some(group.why_not.to_string()),
                nodes: first(group.nodes),
            }),
    );
    groups
}

/// Why nodes that could take a rank are not for the next replica: not all of its ranks have a place.
fn few_ranks(wish: &Wish<'_>, room: &Room<'_>, held_back: Option<&WhyNot>) -> Option<WhyNot> {
    let asked = Asked {
        ranks: wish.layout.pods,
        on_demand_min: match held_back {
            Some(WhyNot::Spot(least)) => Some(*least),
            _ => None,
        },
        ..Asked::default()
    };
    if asked.ranks == 1 {
        return None;
    }
    let reasons = gang::place(wish, room, &asked).err()?;
    let mut few = reasons.into_iter();
    few.find(|reason| matches!(reason, WhyNot::FewRanks { .. }))
}

/// Why spot nodes are not for the next replica; none when they are.
fn spot_held_back(snapshot: &Snapshot, plan: &Plan, wish: &Wish<'_>) -> Option<WhyNot> {
    let wanted = plan
        .status
        .wanted_replicas
        .and_then(|number| u32::try_from(number).ok());
    let least = wish.placement.on_demand_min?.min(wanted.unwrap_or(0));
    let is_on_demand = |node: &str| {
        let node = snapshot.cluster.nodes.get(node);
        node.is_some_and(|node| !crate::spot::is_spot(node))
    };
    let revision = plan.status.revision.as_deref();
    let standing = observe(snapshot).into_iter().filter(|replica| {
        let stands = |pod: &PodView| pod.place().is_some_and(is_on_demand);
        replica.is_live() && Some(replica.revision()) == revision && replica.pods().all(stands)
    });
    // The first rank stands for its group.
    let new = created(plan).filter(|(pod, nodes)| {
        PodView::of(pod).rank() == 0 && nodes.first().is_some_and(|node| is_on_demand(node))
    });
    let there = standing.count() + new.count();
    (u32::try_from(there).unwrap_or(u32::MAX) < least).then_some(WhyNot::Spot(least))
}

fn first(mut nodes: Vec<String>) -> Vec<String> {
    nodes.truncate(NODES_NAMED_MAX);
    nodes
}
