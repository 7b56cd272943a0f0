//! Whose replica comes first: priority classes, and the other ModelDeployments that want the same nodes.
//!
//! Invariant: a replica gives way only to one of strictly higher priority, and both priorities are
//! those that the API server wrote into the pods. The surprise: a place that others still hold is
//! reserved by a pod that nobody may bind yet. It names those who give way, and they are drained by
//! the plan of their own ModelDeployment; nobody writes to another's pods.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::scheduling::v1::PriorityClass;
use operator_api::ModelDeploymentSpec;

use crate::names;
use crate::resources::Resources;
use crate::snapshot::PodView;

/// Scheduling gate of a pod that waits until others have given way.
pub const GATE: &str = "cachalot.dev/preemption";

/// A priority class.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PriorityClassView {
    /// Name.
    pub name: String,
    /// Value; higher comes first.
    pub value: i32,
    /// Whether its pods may take the place of others (`preemptionPolicy` is not `Never`).
    pub preempts: bool,
    /// Whether it is the class of pods that name none.
    pub is_default: bool,
}

impl PriorityClassView {
    /// The view of a priority class.
    pub fn of(class: &PriorityClass) -> Self {
        Self {
            name: class.metadata.name.clone().unwrap_or_default(),
            value: class.value,
            preempts: class.preemption_policy.as_deref() != Some("Never"),
            is_default: class.global_default == Some(true),
        }
    }
}

/// What a ModelDeployment's pods are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Priority {
    /// Value; higher comes first.
    pub value: i32,
    /// Whether they may take the place of others.
    pub preempts: bool,
}

impl Priority {
    /// As the API server will decide for pods that name `class`. A class that is not there gives no
    /// right to anything: the API server refuses its pods.
    pub fn of(class: Option<&str>, classes: &[Arc<PriorityClassView>]) -> Self {
        let mut all = classes.iter();
        let (found, preempts) = match class {
            Some(name) => (all.find(|class| class.name == name), false),
            None => (all.find(|class| class.is_default), true),
        };
        found.map_or(Self { value: 0, preempts }, |class| Self {
            value: class.value,
            preempts: class.preempts,
        })
    }
}

/// Namespace and name of a ModelDeployment.
pub type Owner = (Arc<str>, String);
/// Index, revision and attempt of a replica.
type Group = (String, String, u32);

/// A replica of another ModelDeployment.
#[derive(Clone, Debug, PartialEq)]
pub struct Rival {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its pod; of a group the one of the least rank.
    pub pod: Arc<PodView>,
    /// The other pods of its group, which leaves whole or not at all.
    pub mates: Vec<Arc<PodView>>,
}

impl Rival {
    /// A pod by itself.
    pub fn of(namespace: Arc<str>, pod: Arc<PodView>) -> Self {
        Self {
            namespace,
            pod,
            mates: Vec::new(),
        }
    }

    /// All its pods.
    pub fn pods(&self) -> impl Iterator<Item = &PodView> {
        std::iter::once(&self.pod)
            .chain(&self.mates)
            .map(|pod| &**pod)
    }

    /// What it takes on a node.
    pub fn on(&self, node: &str) -> Resources {
        let here = self.pods().filter(|pod| pod.place() == Some(node));
        here.fold(Resources::default(), |sum, pod| sum + pod.requests)
    }

    /// The nodes of its pods, or those that they are planned for.
    pub fn nodes(&self) -> BTreeSet<&str> {
        self.pods().filter_map(PodView::place).collect()
    }

    /// Whether one of these uids is a pod of it.
    pub fn is_among(&self, uids: &BTreeSet<String>) -> bool {
        self.pods().any(|pod| uids.contains(&pod.uid))
    }

    /// Takes in another pod of its group.
    fn join(&mut self, mut pod: Arc<PodView>) {
        if pod.rank() < self.pod.rank() {
            std::mem::swap(&mut self.pod, &mut pod);
        }
        self.mates.push(pod);
    }

    /// Whose it is.
    pub fn owner(&self) -> Owner {
        let name = self.pod.label(names::MODEL_DEPLOYMENT).to_owned();
        (Arc::clone(&self.namespace), name)
    }

    /// Whether it serves.
    pub fn is_serving(&self) -> bool {
        self.pods().all(|pod| pod.ready) && !self.is_leaving()
    }

    /// Whether it leaves by itself.
    pub fn is_leaving(&self) -> bool {
        self.pods().any(|pod| pod.deleting) || self.pod.label(names::SERVING) == "false"
    }
}

/// A pod that gives way, as the pod that takes its place names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its ModelDeployment.
    pub deployment: &'a str,
    /// Its uid.
    pub uid: &'a str,
}

impl<'a> Victim<'a> {
    /// Those that a pod which is to be made names.
    pub(crate) fn of(pod: &'a Pod) -> impl Iterator<Item = Self> {
        let annotations = pod.metadata.annotations.as_ref();
        let text = annotations.and_then(|annotations| annotations.get(names::PREEMPTS));
        Self::all(text.map(String::as_str))
    }

    fn all(text: Option<&'a str>) -> impl Iterator<Item = Self> {
        text.unwrap_or_default().split(',').filter_map(Self::parse)
    }

    /// Reads `namespace/deployment/uid`.
    fn parse(text: &'a str) -> Option<Self> {
        let (namespace, rest) = text.split_once('/')?;
        let (deployment, uid) = rest.split_once('/')?;
        Some(Self {
            namespace,
            deployment,
            uid,
        })
    }

    /// What [`Victim::parse`] reads, for each pod of a replica.
    pub fn words(rival: &Rival) -> impl Iterator<Item = String> {
        let (namespace, deployment) = rival.owner();
        let pods = rival.pods();
        pods.map(move |pod| format!("{namespace}/{deployment}/{}", pod.uid))
    }
}

impl PodView {
    /// Pods whose place this one takes once they have left.
    pub fn victims(&self) -> impl Iterator<Item = Victim<'_>> {
        Victim::all(self.annotations.get(names::PREEMPTS))
    }

    /// Whether it holds a place that others have not left yet.
    pub fn is_reserving(&self) -> bool {
        self.node.is_none()
            && !self.deleting
            && !self.is_finished()
            && self.victims().next().is_some()
    }

    fn names(&self, uid: &str) -> bool {
        self.victims().any(|victim| victim.uid == uid)
    }
}

/// Who else wants the nodes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contest {
    /// All priority classes.
    pub classes: Vec<Arc<PriorityClassView>>,
    /// Replicas of other ModelDeployments that are of lower priority; none where preemption is not
    /// allowed.
    pub rivals: Vec<Rival>,
    /// Replicas that the ModelDeployments of those promise to keep.
    pub floors: BTreeMap<Owner, u32>,
    /// Pods of other ModelDeployments that hold places which others have not left yet.
    pub reservations: Vec<Rival>,
}

impl Contest {
    /// What matters to the ModelDeployment `own` whose pods name `class`, among `pods` of everyone;
    /// `floor` is [`floor`] of a ModelDeployment.
    pub fn of(
        own: (&str, &str),
        class: Option<&str>,
        classes: Vec<Arc<PriorityClassView>>,
        pods: impl IntoIterator<Item = Rival>,
        floor: impl Fn(&Owner) -> u32,
    ) -> Self {
        let priority = Priority::of(class, &classes);
        let mut contest = Self {
            classes,
            ..Self::default()
        };
        let mut groups: BTreeMap<(Owner, Group), usize> = BTreeMap::new();
        for rival in pods {
            let pod = &rival.pod;
            let is_own = *rival.namespace == *own.0 && pod.label(names::MODEL_DEPLOYMENT) == own.1;
            if is_own || pod.is_finished() || pod.label(names::COMPONENT) != names::ENGINE {
                continue;
            }
            if pod.is_reserving() {
                contest.reservations.push(rival.clone());
            }
            if !priority.preempts || pod.priority >= priority.value || pod.place().is_none() {
                continue;
            }
            if pod.ranks() > 1 {
                let (index, revision, attempt) = pod.group();
                let group = (index.to_owned(), revision.to_owned(), attempt);
                let next = contest.rivals.len();
                let at = *groups.entry((rival.owner(), group)).or_insert(next);
                if at < next {
                    contest.rivals[at].join(rival.pod);
                    continue;
                }
            }
            contest.rivals.push(rival);
        }
        for rival in &contest.rivals {
            let owner = rival.owner();
            let least = || floor(&owner);
            contest.floors.entry(owner.clone()).or_insert_with(least);
        }
        contest
    }

    /// The least priority that any pod can have, so that nobody looks for pods below it.
    pub fn lowest(classes: &[Arc<PriorityClassView>]) -> i32 {
        let values = classes.iter().map(|class| class.value);
        values.min().unwrap_or(0).min(0)
    }

    /// Who takes the place of one of a replica's pods; none when nobody may.
    pub fn claimant_of<'a>(
        &self,
        pods: impl IntoIterator<Item = &'a PodView>,
    ) -> Option<(&Rival, &'a PodView)> {
        let mut pods = pods.into_iter();
        pods.find_map(|pod| Some((self.claimant(pod)?, pod)))
    }

    /// Who takes the place of a pod; none when nobody may.
    pub fn claimant(&self, pod: &PodView) -> Option<&Rival> {
        let mut all = self.reservations.iter();
        all.find(|claimant| claimant.pod.priority > pod.priority && claimant.pod.names(&pod.uid))
    }

    /// Why a replica gives way, in words; none when it need not.
    pub fn claimed<'a>(&self, pods: impl IntoIterator<Item = &'a PodView>) -> Option<String> {
        let (claimant, pod) = self.claimant_of(pods)?;
        let (namespace, deployment) = claimant.owner();
        Some(format!(
            "it gives way to {namespace}/{deployment}, whose priority is {} and not {}",
            claimant.pod.priority, pod.priority
        ))
    }
}

/// Replicas that a ModelDeployment promises to keep: below it, another one's replica is disturbed
/// first.
pub fn floor(spec: &ModelDeploymentSpec) -> u32 {
    let least = match &spec.autoscaling {
        Some(range) => range.min_replicas,
        None => {
            let missing = spec.rollout.max_unavailable.unwrap_or(0).max(0);
            spec.replicas.unwrap_or(0).saturating_sub(missing)
        }
    };
    u32::try_from(least).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn class(value: serde_json::Value) -> Arc<PriorityClassView> {
        let class: PriorityClass = serde_json::from_value(value).expect("a priority class");
        Arc::new(PriorityClassView::of(&class))
    }

    #[test]
    fn a_priority_is_what_the_api_server_makes_of_the_class() {
        let high = class(json!({"metadata": {"name": "high"}, "value": 1000}));
        let meek = class(
            json!({"metadata": {"name": "meek"}, "value": 2000, "preemptionPolicy": "Never"}),
        );
        let usual =
            class(json!({"metadata": {"name": "usual"}, "value": 5, "globalDefault": true}));
        let all = [high, meek, usual];
        let of = |name, classes: &[_]| {
            let Priority { value, preempts } = Priority::of(name, classes);
            (value, preempts)
        };
        assert_eq!(of(Some("high"), &all), (1000, true));
        assert_eq!(of(Some("meek"), &all), (2000, false));
        assert_eq!(of(None, &all), (5, true));
        assert_eq!(of(None, &all[..2]), (0, true));
        // Its pods would be refused; nobody gives way to a pod that cannot be.
        assert_eq!(of(Some("gone"), &all), (0, false));
    }
}
