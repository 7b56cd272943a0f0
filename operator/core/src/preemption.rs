//! Whose place a replica takes when it fits nowhere: whole replicas of lower priority, groups on several nodes too.
//!
//! The least harm is chosen, in this order: nobody who would stay anyway, the lowest priority, the
//! fewest below what their ModelDeployment promises, the fewest, the least room left over.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::placement::{self, Rank, Room, Wish};
use crate::priority::{Contest, Owner, Rival};
use crate::resources::Resources;
use crate::snapshot::NodeView;

/// A place, and who has to leave it first.
#[derive(Clone, Debug, PartialEq)]
pub struct Taking {
    /// The node.
    pub node: String,
    /// Replicas that give way.
    pub victims: Vec<Rival>,
}

/// What a place is looked for with.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// What one replica needs.
    pub wish: &'a Wish<'a>,
    /// What is free while those who would give way are still there.
    pub room: &'a Room<'a>,
    /// Who else wants the nodes.
    pub contest: &'a Contest,
    /// Uids of pods that give way already, to a replica that may not be disturbed.
    pub spoken_for: &'a BTreeSet<String>,
    /// Whether spot nodes are out of the question.
    pub on_demand_only: bool,
}

/// How much a choice harms; less is better.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Harm {
    /// The highest priority among those who would have stayed; none when there are none.
    priority: Option<i32>,
    /// Replicas that their ModelDeployments promise to keep.
    promised: usize,
    /// Pods that would have stayed.
    count: usize,
    gpus_left: u64,
    rank: Rank,
}

impl Harm {
    /// Of two choices together.
    fn and(self, other: Self) -> Self {
        Self {
            priority: self.priority.max(other.priority),
            promised: self.promised + other.promised,
            count: self.count + other.count,
            gpus_left: self.gpus_left + other.gpus_left,
            rank: self.rank.max(other.rank),
        }
    }
}

/// A rival on a node, and what its leaving means.
struct Candidate<'a> {
    rival: &'a Rival,
    would_stay: bool,
    is_promised: bool,
}

/// Places for all ranks of a group, and who has to leave them first.
#[derive(Clone, Debug, PartialEq)]
pub struct Places {
    /// A node for each rank.
    pub nodes: Vec<String>,
    /// Replicas that give way.
    pub victims: Vec<Rival>,
}

/// The place that costs others least; none when no node would fit even without all that is of lower
/// priority.
pub fn choose(ask: Ask<'_>) -> Option<Taking> {
    let rivals: Vec<&Rival> = ask.contest.rivals.iter().collect();
    let (_, taking) = cheapest(&ask, ask.room.nodes(), &rivals)?;
    Some(taking)
}

/// Places for all ranks of a group, within the narrowest domain of those it is to stay in where that can
/// be; none when not all ranks would fit even without all that is of lower priority.
pub fn choose_for_group(ask: Ask<'_>, ranks: usize) -> Option<Places> {
    for key in &ask.wish.placement.keep_within {
        let mut domains: BTreeMap<&str, Vec<&NodeView>> = BTreeMap::new();
        for node in ask.room.nodes() {
            domains.entry(node.label(key)).or_default().push(node);
        }
        domains.remove("");
        let found = domains
            .values()
            .filter_map(|nodes| within(&ask, nodes, ranks));
        if let Some((_, places)) = found.min_by(|(left, _), (right, _)| left.cmp(right)) {
            return Some(places);
        }
    }
    let all: Vec<&NodeView> = ask.room.nodes().collect();
    within(&ask, &all, ranks).map(|(_, places)| places)
}

/// Places for all ranks on some of `nodes`: what is free first, then what costs others least, one
/// after the other. Who leaves for one rank leaves all places that it holds.
fn within(ask: &Ask<'_>, nodes: &[&NodeView], ranks: usize) -> Option<(Harm, Places)> {
    let (mut room, mut nodes) = (ask.room.clone(), nodes.to_vec());
    let mut rivals: Vec<&Rival> = ask.contest.rivals.iter().collect();
    let mut places = Places {
        nodes: Vec::new(),
        victims: Vec::new(),
    };
    let mut harm = Harm::default();
    while places.nodes.len() < ranks {
        let is_free = |node: &&&NodeView| {
            let is_out = ask.on_demand_only && crate::spot::is_spot(node);
            !is_out && placement::why_not(node, ask.wish, &room).is_none()
        };
        let free = nodes.iter().filter(is_free);
        let best = free.min_by_key(|node| (placement::rank(node, ask.wish, &room), &node.name));
        let name = match best {
            Some(node) => node.name.clone(),
            None => {
                let ask = Ask {
                    room: &room,
                    ..*ask
                };
                let (more, taking) = cheapest(&ask, nodes.iter().copied(), &rivals)?;
                harm = harm.and(more);
                rivals.retain(|rival| !taking.victims.contains(rival));
                for pod in taking.victims.iter().flat_map(Rival::pods) {
                    if let Some(node) = pod.place() {
                        room.give_back(node, pod.requests);
                    }
                }
                places.victims.extend(taking.victims);
                taking.node
            }
        };
        room.take(&name, ask.wish.requests);
        // Ranks on GPUs fill their nodes, each one of its own.
        if ask.wish.layout.gpus() > 0 {
            nodes.retain(|node| node.name != name);
        }
        places.nodes.push(name);
    }
    // Without anybody to wait for it is not for us: an ordinary look finds such places.
    (!places.victims.is_empty()).then_some((harm, places))
}

/// The node among `nodes` that costs `rivals` least.
fn cheapest<'a>(
    ask: &Ask<'_>,
    nodes: impl Iterator<Item = &'a NodeView>,
    rivals: &[&Rival],
) -> Option<(Harm, Taking)> {
    let mut by_node: BTreeMap<&str, Vec<&Rival>> = BTreeMap::new();
    let mut serving: BTreeMap<Owner, u32> = BTreeMap::new();
    for rival in rivals {
        for node in rival.nodes() {
            by_node.entry(node).or_default().push(rival);
        }
        if rival.is_serving() && !rival.is_among(ask.spoken_for) {
            *serving.entry(rival.owner()).or_default() += 1;
        }
    }
    let takings = nodes.filter_map(|node| {
        let rivals = by_node.get(node.name.as_str())?;
        let is_out = ask.on_demand_only && crate::spot::is_spot(node);
        if is_out || placement::standing(node, ask.wish).is_some() {
            return None;
        }
        let candidates = candidates(ask, &serving, rivals.clone());
        least(ask, node, candidates)
    });
    takings.min_by(|(left, _), (right, _)| left.cmp(right))
}

/// Rivals on a node, those that should stay most first.
fn candidates<'a>(
    ask: &Ask<'_>,
    serving: &BTreeMap<Owner, u32>,
    mut rivals: Vec<&'a Rival>,
) -> Vec<Candidate<'a>> {
    // The youngest is the first that can be spared.
    rivals.sort_by_key(|rival| (Reverse(rival.pod.created), &rival.pod.name));
    let mut spare: BTreeMap<Owner, u32> = BTreeMap::new();
    let mut candidates: Vec<Candidate<'a>> = rivals
        .into_iter()
        .map(|rival| {
            let owner = rival.owner();
            let would_stay = !rival.is_leaving() && !rival.is_among(ask.spoken_for);
            let spare = spare.entry(owner.clone()).or_insert_with(|| {
                let least = ask.contest.floors.get(&owner).copied().unwrap_or(0);
                serving
                    .get(&owner)
                    .copied()
                    .unwrap_or(0)
                    .saturating_sub(least)
            });
            let counts = would_stay && rival.is_serving();
            let is_promised = counts && *spare == 0;
            if counts {
                *spare = spare.saturating_sub(1);
            }
            Candidate {
                rival,
                would_stay,
                is_promised,
            }
        })
        .collect();
    // Of those that are alike a group stays rather than a pod by itself, and a small one rather than a
    // large one: fewer have to leave.
    candidates.sort_by_key(|candidate| {
        let pod = &candidate.rival.pod;
        (
            Reverse(candidate.would_stay),
            Reverse(pod.priority),
            Reverse(candidate.is_promised),
            Reverse(candidate.rival.is_serving()),
            Reverse(candidate.rival.pods().count()),
            (pod.requests.gpus, pod.requests.memory_bytes),
            (pod.created, pod.name.clone()),
        )
    });
    candidates
}

/// The fewest that have to leave a node so that a replica fits; none when it does not fit even
/// without all of them.
fn least(ask: &Ask<'_>, node: &NodeView, candidates: Vec<Candidate<'_>>) -> Option<(Harm, Taking)> {
    let sum = |left: Resources, candidate: &Candidate<'_>| left + candidate.rival.on(&node.name);
    let mut given_up = candidates.iter().fold(Resources::default(), sum);
    let fits = |given_up: Resources| {
        let free = ask.room.free_with(node, given_up);
        placement::shortage(ask.wish, node, free).is_none()
    };
    if !fits(given_up) {
        return None;
    }
    let mut victims = Vec::new();
    for candidate in candidates {
        let kept = given_up.minus(candidate.rival.on(&node.name));
        if fits(kept) {
            given_up = kept;
        } else {
            victims.push(candidate);
        }
    }
    let harmed = || victims.iter().filter(|candidate| candidate.would_stay);
    let free = ask.room.free_with(node, given_up);
    let harm = Harm {
        priority: harmed().map(|candidate| candidate.rival.pod.priority).max(),
        promised: harmed().filter(|candidate| candidate.is_promised).count(),
        count: harmed()
            .map(|candidate| candidate.rival.pods().count())
            .sum(),
        gpus_left: free.minus(ask.wish.requests).gpus,
        rank: placement::rank(node, ask.wish, ask.room),
    };
    let victims: Vec<Rival> = victims
        .into_iter()
        .map(|candidate| candidate.rival.clone())
        .collect();
    // Without anybody to wait for it is not for us: an ordinary look finds such a node.
    (!victims.is_empty()).then(|| {
        let node = node.name.clone();
        (harm, Taking { node, victims })
    })
}
