//! A story told by a person instead of by chance: given happenings, the sequence of plans.
//!
//! Pods start and go at a fixed pace, no requests come, and nothing fails that was not told.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::nature::later;
use super::world::{Key, World};
use super::{Faults, Pace, RESYNC_SECONDS};
use crate::explain::{Judgement, judgements};
use crate::inventory::Inventory;
use crate::plan::Settings;
use crate::time::seconds_between;

/// Seconds without a write, after the last happening, that end the story.
const QUIET_SECONDS: u64 = 60;
/// Seconds after the last happening that end it in any case.
const STORY_SECONDS_MAX: u64 = 6 * 3600;
/// Plans told of at most.
const PLANS_MAX: usize = 10_000;
/// Happenings taken at most.
const HAPPENINGS_MAX: usize = 1000;
/// Nodes that may join at once.
const JOIN_MAX: u32 = 10_000;

/// Something that happens, some time after what happened before.
#[derive(Clone, Debug, PartialEq)]
pub struct Happening {
    /// Seconds after the happening before.
    pub after_seconds: u64,
    /// What happens.
    pub what: What,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum What {
    /// A node's kubelet stops answering.
    NodeSilent(String),
    /// It answers again.
    NodeBack(String),
    /// A node takes no new pods.
    NodeCordoned(String),
    /// It takes new pods again.
    NodeOpened(String),
    /// A node's GPUs are reported at fault.
    NodeSick(String),
    /// They are healthy again.
    NodeHealthy(String),
    /// A node leaves for good.
    NodeGone(String),
    /// Nodes like another join.
    NodesJoin {
        /// The node they are like.
        like: String,
        /// How many.
        #[serde(default = "one")]
        count: u32,
    },
    /// The user asks for another number of replicas.
    Scale {
        /// Name of the ModelDeployment.
        name: String,
        /// Its namespace; may be left out when the name is known in one namespace only.
        namespace: Option<String>,
        /// Replicas.
        replicas: i32,
    },
    /// The user changes a spec: a JSON merge patch.
    Patch {
        /// Name of the ModelDeployment.
        name: String,
        /// Its namespace; may be left out when the name is known in one namespace only.
        namespace: Option<String>,
        /// The patch.
        spec: Value,
    },
    /// The user deletes a ModelDeployment.
    Delete {
        /// Name of the ModelDeployment.
        name: String,
        /// Its namespace; may be left out when the name is known in one namespace only.
        namespace: Option<String>,
    },
    /// The pod of a replica ends for good.
    ReplicaFails {
        /// Name of the ModelDeployment.
        name: String,
        /// Its namespace; may be left out when the name is known in one namespace only.
        namespace: Option<String>,
        /// Index of the replica.
        replica: u32,
    },
    /// Nothing: time passes.
    Wait {},
}

fn one() -> u32 {
    1
}

impl Happening {
    /// Reads one entry of a list of happenings: `{afterSeconds: 30, nodeSilent: gpu-1}`.
    ///
    /// # Errors
    /// In words, with the field.
    pub fn parse(value: Value) -> Result<Self, String> {
        let Value::Object(mut fields) = value else {
            return Err("must be an object such as {afterSeconds: 30, nodeSilent: NODE}".into());
        };
        let after_seconds = match fields.remove("afterSeconds") {
            None => 0,
            Some(value) => value
                .as_u64()
                .filter(|seconds| *seconds <= STORY_SECONDS_MAX)
                .ok_or_else(|| {
                    format!(
                        "afterSeconds = {value}: must be a whole number up to {STORY_SECONDS_MAX}"
                    )
                })?,
        };
        if fields.len() != 1 {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            return Err(format!(
                "must name exactly one happening beside afterSeconds, found {names:?}"
            ));
        }
        let what =
            serde_json::from_value(Value::Object(fields)).map_err(|error| error.to_string())?;
        Ok(Self {
            after_seconds,
            what,
        })
    }
}

/// One plan that did or said something new.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Planned {
    /// Seconds since the beginning.
    pub at_seconds: u64,
    /// What happened since the plan before, in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub because: Vec<String>,
    /// `namespace/name` of the ModelDeployment.
    pub deployment: String,
    /// Writes, in order.
    pub actions: Vec<String>,
    /// Conditions whose status or reason is new.
    pub conditions: Vec<Judgement>,
}

/// Tells the story of `happenings` in a cluster; `report` is what inspections find.
///
/// # Errors
/// When a happening names something that is not there, or there are too many of them.
pub fn replay(
    inventory: Inventory,
    report: String,
    settings: &Settings,
    pace: Pace,
    happenings: &[Happening],
) -> Result<Vec<Planned>, String> {
    if happenings.len() > HAPPENINGS_MAX {
        return Err(format!(
            "{} happenings: at most {HAPPENINGS_MAX} are taken",
            happenings.len()
        ));
    }
    let mut world = World::new(0, inventory, report, pace);
    world.is_busy = false;
    let mut told = Teller::new(&world);
    told.run(&mut world, settings, 0);
    for (
        index,
        Happening {
            after_seconds,
            what,
        },
    ) in happenings.iter().enumerate()
    {
        told.run(&mut world, settings, *after_seconds);
        let words = world
            .comes_true(what)
            .map_err(|why| format!("happening {}: {why}", index + 1))?;
        told.because.push(words);
        world.see_everything();
    }
    told.run_out(&mut world, settings);
    Ok(told.plans)
}

struct Teller {
    start: jiff::Timestamp,
    because: Vec<String>,
    plans: Vec<Planned>,
    last_write: jiff::Timestamp,
}

impl Teller {
    fn new(world: &World) -> Self {
        Self {
            start: world.now,
            because: Vec::new(),
            plans: Vec::new(),
            last_write: world.now,
        }
    }

    /// Lets `seconds` pass.
    fn run(&mut self, world: &mut World, settings: &Settings, seconds: u64) {
        let end = later(world.now, seconds);
        self.turn(world, settings);
        while world.now < end {
            self.step(world, settings, seconds_between(world.now, end));
        }
    }

    /// Lets time pass until nothing is written any more.
    fn run_out(&mut self, world: &mut World, settings: &Settings) {
        let begin = world.now;
        self.last_write = begin;
        self.turn(world, settings);
        while seconds_between(self.last_write, world.now) < QUIET_SECONDS
            && seconds_between(begin, world.now) < STORY_SECONDS_MAX
        {
            self.step(world, settings, QUIET_SECONDS);
        }
    }

    fn step(&mut self, world: &mut World, settings: &Settings, seconds_max: u64) {
        let next = world
            .next_event()
            .map_or(RESYNC_SECONDS, |at| seconds_between(world.now, at));
        world.clock(next.clamp(1, seconds_max.max(1)));
        world.see_everything();
        self.turn(world, settings);
    }

    fn turn(&mut self, world: &mut World, settings: &Settings) {
        for key in world.due() {
            let Some(snapshot) = world.snapshot(&key) else {
                continue;
            };
            let plan = crate::plan(&snapshot, settings);
            let before = snapshot.deployment.status.clone().unwrap_or_default();
            let is_news = |judgement: &Judgement| {
                !before.conditions.iter().any(|old| {
                    old.type_ == judgement.kind
                        && old.status == judgement.status
                        && old.reason == judgement.reason
                })
            };
            let mut conditions = judgements(&plan.status.conditions);
            conditions.retain(is_news);
            let actions: Vec<String> = plan.actions.iter().map(ToString::to_string).collect();
            if !actions.is_empty() {
                self.last_write = world.now;
            }
            if (!actions.is_empty() || !conditions.is_empty()) && self.plans.len() < PLANS_MAX {
                self.plans.push(Planned {
                    at_seconds: seconds_between(self.start, world.now),
                    because: std::mem::take(&mut self.because),
                    deployment: format!("{}/{}", key.0, key.1),
                    actions,
                    conditions,
                });
            }
            // Without faults nothing can break a rule that the plan did not break itself, and a
            // plan that breaks one is told of in its conditions.
            let _ = super::pass(world, &key, plan, &Faults::default());
        }
    }
}

impl World {
    /// Makes a happening come true; returns it in words.
    fn comes_true(&mut self, what: &What) -> Result<String, String> {
        let node_is = |is_there: bool, name: &str, words: &str| {
            if is_there {
                Ok(format!("node {name} {words}"))
            } else {
                Err(format!("there is no node {name}"))
            }
        };
        match what {
            What::NodeSilent(name) => node_is(self.set_node(name, false), name, "falls silent"),
            What::NodeBack(name) => node_is(self.set_node(name, true), name, "is back"),
            What::NodeCordoned(name) => node_is(self.set_cordoned(name, true), name, "is cordoned"),
            What::NodeOpened(name) => node_is(self.set_cordoned(name, false), name, "is opened"),
            What::NodeSick(name) => node_is(self.set_sick(name, true), name, "has GPUs at fault"),
            What::NodeHealthy(name) => {
                node_is(self.set_sick(name, false), name, "has healthy GPUs")
            }
            What::NodeGone(name) => {
                node_is(self.nodes.remove(name).is_some(), name, "leaves for good")
            }
            What::NodesJoin { like, count } => self.join_like(like, *count),
            What::Scale {
                name,
                namespace,
                replicas,
            } => {
                let key = self.key(name, namespace.as_deref())?;
                self.edit(&key, |spec| {
                    spec.replicas = Some(*replicas);
                    spec.autoscaling = None;
                });
                Ok(format!("the user asks for {replicas} replicas of {name}"))
            }
            What::Patch {
                name,
                namespace,
                spec,
            } => self.patch(name, namespace.as_deref(), spec),
            What::Delete { name, namespace } => {
                let key = self.key(name, namespace.as_deref())?;
                self.remove_wish(&key);
                Ok(format!("the user deletes {name}"))
            }
            What::ReplicaFails {
                name,
                namespace,
                replica,
            } => self.fail_replica(name, namespace.as_deref(), *replica),
            What::Wait {} => Ok("time passes".into()),
        }
    }

    fn key(&self, name: &str, namespace: Option<&str>) -> Result<Key, String> {
        let found: Vec<Key> = self
            .keys()
            .into_iter()
            .filter(|(space, known)| known == name && namespace.is_none_or(|n| n == space))
            .collect();
        match found.as_slice() {
            [key] => Ok(key.clone()),
            [] => Err(format!("there is no ModelDeployment {name}")),
            _ => Err(format!("{name} is in several namespaces; say which")),
        }
    }

    fn join_like(&mut self, like: &str, count: u32) -> Result<String, String> {
        let model = self
            .nodes
            .get(like)
            .ok_or(format!("there is no node {like}"))?;
        let model = model.node.clone();
        if !(1..=JOIN_MAX).contains(&count) {
            return Err(format!("count = {count}: must be between 1 and {JOIN_MAX}"));
        }
        for _ in 0..count {
            self.joined += 1;
            let mut node = model.clone();
            node.metadata.name = Some(format!("{like}-joined-{}", self.joined));
            self.put_node(node);
        }
        Ok(format!("{count} nodes like {like} join"))
    }

    fn patch(
        &mut self,
        name: &str,
        namespace: Option<&str>,
        patch: &Value,
    ) -> Result<String, String> {
        let key = self.key(name, namespace)?;
        let spec = &self.wishes[&key].deployment.spec;
        let mut changed = serde_json::to_value(spec).map_err(|error| error.to_string())?;
        merge(&mut changed, patch);
        let changed =
            serde_json::from_value(changed).map_err(|error| format!("patch of {name}: {error}"))?;
        self.edit(&key, |spec| *spec = changed);
        Ok(format!("the user changes {name}"))
    }

    fn fail_replica(
        &mut self,
        name: &str,
        namespace: Option<&str>,
        replica: u32,
    ) -> Result<String, String> {
        let key = self.key(name, namespace)?;
        let index = replica.to_string();
        let is_it = |pod: &Key| {
            let view = &self.pods[pod].view;
            view.label(crate::names::REPLICA) == index && !view.is_finished() && !view.deleting
        };
        let pod = self
            .pods_of(&key)
            .into_iter()
            .find(is_it)
            .ok_or(format!("{name} has no replica {replica}"))?;
        self.end_pod(&pod, "Error");
        Ok(format!("{} fails", pod.1))
    }
}

/// JSON merge patch (RFC 7386): null removes a field.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    if let Value::Object(target) = target {
        for (key, value) in patch {
            if value.is_null() {
                target.remove(key);
            } else {
                merge(target.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
    }
}
