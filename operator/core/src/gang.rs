//! Replicas of several pods: over how many nodes one is laid out, and places for all of its ranks
//! together, or none.
//!
//! Invariant: what is returned is whole and fits as a whole; a place for some ranks is no place. Ranks
//! talk in every layer of every step, so they are kept within one domain of fast links where one has room.

use std::collections::{BTreeMap, BTreeSet};

use crate::placement::{self, Rank, Room, WhyNot, Wish};
use crate::snapshot::NodeView;

/// How many pods share `devices`, when one node has at most `devices_per_node`: as few as divide them
/// evenly.
pub fn pods(devices: u32, devices_per_node: u32) -> u32 {
    let least = devices.div_ceil(devices_per_node.max(1)).max(1);
    (least..=devices)
        .find(|pods| devices.is_multiple_of(*pods))
        .unwrap_or(devices.max(1))
}

/// What a group asks for beside the wish of one rank.
#[derive(Clone, Debug, Default)]
pub struct Asked<'a> {
    /// Ranks to place.
    pub ranks: u32,
    /// Nodes of ranks that are there already.
    pub beside: Vec<&'a str>,
    /// Nodes to take last: their kubelet refused such a pod before.
    pub refused: &'a [String],
    /// Where no spot node may be used: so many replicas belong elsewhere.
    pub on_demand_min: Option<u32>,
}

/// A node that can take a rank. Those of one domain are compared in this order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate<'a> {
    is_refused: bool,
    /// Replicas on nodes with its value of the label that they are spread over.
    spread: usize,
    rank: Rank,
    name: &'a str,
}

/// A node for each rank, all of them different where ranks are on GPUs.
///
/// # Errors
/// When there is no room for all: why not, for each node.
pub fn place(
    wish: &Wish<'_>,
    room: &Room<'_>,
    asked: &Asked<'_>,
) -> Result<Vec<String>, Vec<WhyNot>> {
    let mut reasons = Vec::new();
    let mut fitting: Vec<&NodeView> = Vec::new();
    for node in room.nodes() {
        match placement::why_not(node, wish, room) {
            Some(reason) => reasons.push(reason),
            None => match asked.on_demand_min {
                Some(least) if crate::spot::is_spot(node) => reasons.push(WhyNot::Spot(least)),
                _ => fitting.push(node),
            },
        }
    }
    let counts = spread_counts(wish, room);
    let mut most = 0;
    for key in &wish.placement.keep_within {
        let mut domains: BTreeMap<&str, Vec<&NodeView>> = BTreeMap::new();
        for node in &fitting {
            domains.entry(node.label(key)).or_default().push(node);
        }
        domains.remove("");
        if let Some(beside) = asked.beside.first().and_then(|name| room.node(name)) {
            domains.retain(|value, _| *value == beside.label(key));
        }
        // The smallest that suffices, so that larger ones stay free; among equals by spread, then name.
        let mut all: Vec<_> = domains.into_iter().collect();
        all.sort_by_key(|(value, nodes)| {
            let spread = nodes
                .iter()
                .map(|node| spread_of(node, wish, &counts))
                .min();
            (spread, nodes.len(), *value)
        });
        for (_, nodes) in all {
            match within(&nodes, wish, room, asked, &counts) {
                Ok(chosen) => return Ok(chosen),
                Err(placed) => most = placed.max(most),
            }
        }
    }
    let placed = match within(&fitting, wish, room, asked, &counts) {
        Ok(chosen) => return Ok(chosen),
        Err(placed) => placed.max(most),
    };
    let few = WhyNot::FewRanks {
        needs: asked.ranks,
        has: placed,
    };
    reasons.extend(fitting.iter().map(|_| few.clone()));
    Err(reasons)
}

/// How far apart nodes are: which of the domains to stay within, the narrowest first, is the first to hold all of them.
pub fn width<'a>(
    names: impl IntoIterator<Item = &'a str>,
    wish: &Wish<'_>,
    room: &Room<'_>,
) -> usize {
    let nodes: Vec<&NodeView> = names
        .into_iter()
        .filter_map(|name| room.node(name))
        .collect();
    let holds_all = |key: &String| {
        let mut values = nodes.iter().map(|node| node.label(key));
        let first = values.next().unwrap_or_default();
        !first.is_empty() && values.all(|value| value == first)
    };
    let keys = &wish.placement.keep_within;
    keys.iter().position(holds_all).unwrap_or(keys.len())
}

/// Places all ranks on some of `nodes`.
///
/// # Errors
/// How many could be placed.
fn within<'a>(
    nodes: &[&'a NodeView],
    wish: &Wish<'_>,
    room: &Room<'_>,
    asked: &Asked<'_>,
    counts: &BTreeMap<String, usize>,
) -> Result<Vec<String>, u32> {
    let (mut wish, mut room) = (wish.clone(), room.clone());
    let candidate = |node: &'a NodeView, wish: &Wish<'_>, room: &Room<'_>| Candidate {
        is_refused: asked.refused.contains(&node.name),
        spread: spread_of(node, wish, counts),
        rank: placement::rank(node, wish, room),
        name: &node.name,
    };
    let is_beside = |node: &&&NodeView| asked.beside.contains(&node.name.as_str());
    let apart = wish.layout.gpus() > 0;
    let mut candidates: BTreeSet<Candidate<'a>> = nodes
        .iter()
        .filter(|node| !(apart && is_beside(node)))
        .map(|node| candidate(node, &wish, &room))
        .collect();
    let mut chosen = Vec::new();
    for placed in 0..asked.ranks {
        let best = candidates.pop_first().ok_or(placed)?;
        chosen.push(best.name.to_owned());
        if apart {
            continue;
        }
        room.take(best.name, wish.requests);
        *wish.own.entry(best.name.to_owned()).or_insert(0) += 1;
        let again = room
            .node(best.name)
            .filter(|node| placement::why_not(node, &wish, &room).is_none());
        if again.is_some()
            && let Some(node) = nodes.iter().find(|node| node.name == best.name)
        {
            candidates.insert(candidate(node, &wish, &room));
        }
    }
    Ok(chosen)
}

/// Pods of this deployment by value of the label that replicas are spread over.
fn spread_counts(wish: &Wish<'_>, room: &Room<'_>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    if let Some(key) = &wish.placement.spread_by {
        for (name, own) in &wish.own {
            let value = room.node(name).map_or("", |node| node.label(key));
            *counts.entry(value.to_owned()).or_insert(0) += own;
        }
    }
    counts
}

fn spread_of(node: &NodeView, wish: &Wish<'_>, counts: &BTreeMap<String, usize>) -> usize {
    let key = wish.placement.spread_by.as_deref();
    let count = key.and_then(|key| counts.get(node.label(key)));
    count.copied().unwrap_or(0)
}
