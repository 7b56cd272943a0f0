//! Who else wants the nodes: pods of all ModelDeployments by priority, and the places that are reserved.
//!
//! Looked for only where it can matter: a ModelDeployment that can be above nobody is not shown ten thousand pods. The few
//! pods that hold a place are kept apart, because every decision has to know them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use operator_api::ModelDeployment;
use operator_core::priority::Priority;
use operator_core::{Contest, PodView, PriorityClassView, Rival};

use crate::trim::{ChildPod, Wish};
use crate::wakes::lock;
use crate::watch::{Key, Mirror};

/// Pods that hold a place which others have not left yet.
#[derive(Debug, Default)]
pub(crate) struct Reservations(Mutex<BTreeMap<Key, Arc<PodView>>>);

impl Reservations {
    /// A pod is as it is now; none when it is gone. Whose pods it names, now or before: they have to be looked at.
    pub(crate) fn set(&self, key: &Key, pod: Option<&ChildPod>) -> BTreeSet<Key> {
        let mut all = lock(&self.0);
        let after = pod.filter(|pod| pod.reserves).and_then(ChildPod::view);
        let after = after.map(Arc::new);
        let before = match &after {
            Some(after) => all.insert(key.clone(), Arc::clone(after)),
            None => all.remove(key),
        };
        if before == after {
            return BTreeSet::new();
        }
        let both = [before.as_deref(), after.as_deref()];
        let victims = both.into_iter().flatten().flat_map(PodView::victims);
        victims
            .map(|victim| Key::new(victim.namespace, victim.deployment))
            .collect()
    }

    fn rivals(&self) -> Vec<Rival> {
        lock(&self.0)
            .iter()
            .map(|(key, pod)| Rival::of(Arc::clone(&key.namespace), Arc::clone(pod)))
            .collect()
    }
}

/// Who else wants the nodes that `deployment` wants.
pub(crate) fn contest(
    deployment: &ModelDeployment,
    key: &Key,
    classes: Vec<Arc<PriorityClassView>>,
    pods: &Mirror<ChildPod>,
    deployments: &Mirror<Wish>,
    reservations: &Reservations,
) -> Contest {
    let class = deployment.spec.placement.priority_class_name.as_deref();
    let own = Priority::of(class, &classes);
    let rivals = if own.preempts && own.value > Contest::lowest(&classes) {
        let pods = pods.read();
        let seen = pods.iter().filter_map(|(key, entry)| {
            let pod = entry.as_ref().ok()?;
            let matters = pod.priority < own.value || pod.reserves;
            let view = matters.then(|| pod.view())??;
            Some(Rival::of(Arc::clone(&key.namespace), Arc::new(view)))
        });
        seen.collect()
    } else {
        reservations.rivals()
    };
    Contest::of(
        (&*key.namespace, &*key.name),
        class,
        classes,
        rivals,
        |(namespace, name)| {
            let other = deployments.get(&Key::new(Arc::clone(namespace), name.as_str()));
            other.and_then(Result::ok).map_or(0, |other| other.floor)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;

    fn pod(preempts: &str) -> ChildPod {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "big-0", "annotations": {"cachalot.dev/preempts": preempts}},
            "spec": {"containers": []},
        }))
        .expect("a pod");
        ChildPod::of(&PodView::of(&pod)).expect("it has a JSON form")
    }

    #[test]
    fn those_who_have_to_leave_are_woken_when_a_place_is_taken_and_when_it_is_left() {
        let reservations = Reservations::default();
        let key = Key::new("d", "big-0");
        let both = BTreeSet::from([Key::new("d", "small"), Key::new("e", "tiny")]);
        let named = pod("d/small/uid-1,d/small/uid-2,e/tiny/uid-3");
        assert_eq!(reservations.set(&key, Some(&named)), both);
        assert_eq!(reservations.rivals().len(), 1);
        // Told again, nothing is new.
        assert!(reservations.set(&key, Some(&named)).is_empty());
        assert_eq!(reservations.set(&key, Some(&pod(""))), both);
        assert!(reservations.rivals().is_empty());
        assert!(reservations.set(&key, None).is_empty());
    }
}
