//! Pods of large ModelDeployments as their last snapshot showed them, while they are looked at again and again.
//!
//! Pods are kept packed, and opening a thousand of them takes longer than deciding that nothing is to be done. While their
//! replicas come up, a ModelDeployment is looked at once a second, and only those that changed are opened again. The surprise:
//! what is kept for one that is not looked at any more goes by itself only when [`Opened::tidy`] is called.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use operator_core::PodView;
use tokio::time::Instant;

use crate::trim::ChildPod;
use crate::wakes::lock;
use crate::watch::Key;

/// Fewer pods are opened each time.
const FEW: usize = 64;
/// Most pods that are kept open, of all ModelDeployments; each takes some three kilobytes.
const MOST: usize = 2048;
/// How long they are kept when nobody looks.
const KEPT_FOR: Duration = Duration::from_secs(3);

/// A pod: its name, what is kept of it, and that opened.
type Open = (Arc<str>, Arc<ChildPod>, Arc<PodView>);
/// Pods in the order of their names.
type Pods = Vec<Open>;

/// Open pods by ModelDeployment.
#[derive(Debug, Default)]
pub(crate) struct Opened(Mutex<HashMap<Key, (Instant, Pods)>>);

/// What was open when a look began, and what it opened.
pub(crate) struct Look {
    before: std::iter::Peekable<std::vec::IntoIter<Open>>,
    now: Pods,
}

impl Opened {
    /// Begins a look at the pods of `deployment`, which are to be asked for in the order of their names.
    pub(crate) fn look(&self, deployment: &Key) -> Look {
        let before = lock(&self.0).remove(deployment);
        Look {
            before: before
                .map(|(_, pods)| pods)
                .unwrap_or_default()
                .into_iter()
                .peekable(),
            now: Vec::new(),
        }
    }

    /// Keeps what a look opened, if it is worth it and there is room.
    pub(crate) fn keep(&self, deployment: &Key, look: Look) {
        let mut all = lock(&self.0);
        let held: usize = all.values().map(|(_, pods)| pods.len()).sum();
        if look.now.len() >= FEW && held + look.now.len() <= MOST {
            all.insert(deployment.clone(), (Instant::now(), look.now));
        }
    }

    /// Forgets what nobody has looked at lately; true if there was something.
    pub(crate) fn tidy(&self) -> bool {
        let mut all = lock(&self.0);
        let before = all.len();
        all.retain(|_, (looked, _)| looked.elapsed() < KEPT_FOR);
        all.len() < before
    }
}

impl Look {
    /// A pod, opened unless it is open; none if it does not read what it wrote.
    pub(crate) fn open(&mut self, name: &Arc<str>, pod: &Arc<ChildPod>) -> Option<Arc<PodView>> {
        while self.before.next_if(|(other, ..)| other < name).is_some() {}
        let same = |(other, seen, _): &Open| other == name && Arc::ptr_eq(seen, pod);
        let view = match self.before.next_if(same) {
            Some((.., view)) => view,
            None => Arc::new(pod.view()?),
        };
        self.now
            .push((Arc::clone(name), Arc::clone(pod), Arc::clone(&view)));
        Some(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pods(names: std::ops::Range<usize>, node: &str) -> Vec<(Arc<str>, Arc<ChildPod>)> {
        names
            .map(|index| {
                let name = format!("m-{index:04}");
                let pod = serde_json::from_value(serde_json::json!({
                    "metadata": {"name": name}, "spec": {"nodeName": node, "containers": []}}));
                let pod = ChildPod::of(&PodView::of(&pod.expect("a pod"))).expect("a JSON form");
                (name.into(), Arc::new(pod))
            })
            .collect()
    }

    fn look(opened: &Opened, key: &Key, pods: &[(Arc<str>, Arc<ChildPod>)]) -> Vec<Arc<PodView>> {
        let mut look = opened.look(key);
        let views = pods
            .iter()
            .map(|(name, pod)| look.open(name, pod).expect("a pod"))
            .collect();
        opened.keep(key, look);
        views
    }

    fn shared(one: &[Arc<PodView>], other: &[Arc<PodView>]) -> usize {
        let is_shared = |view: &&Arc<PodView>| other.iter().any(|old| Arc::ptr_eq(view, old));
        one.iter().filter(is_shared).count()
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_changed_is_opened_again() {
        let (opened, key) = (Opened::default(), Key::new("d", "m"));
        let mut pods = pods(0..100, "n1");
        let first = look(&opened, &key, &pods);
        let changed = self::pods(40..42, "n2");
        pods.splice(40..42, changed);
        pods.remove(7);
        pods.extend(self::pods(100..101, "n1"));
        let second = look(&opened, &key, &pods);
        assert_eq!(shared(&second, &first), 97);
        for ((name, pod), view) in pods.iter().zip(&second) {
            assert_eq!(view.name, **name);
            assert_eq!(Some(&**view), pod.view().as_ref(), "{name}");
        }
        assert_eq!(
            shared(&look(&opened, &Key::new("d", "n"), &pods), &second),
            0
        );
    }

    #[tokio::test(start_paused = true)]
    async fn few_pods_too_many_and_those_of_long_ago_are_not_kept() {
        let (opened, key) = (Opened::default(), Key::new("d", "m"));
        let few = pods(0..FEW - 1, "n1");
        let first = look(&opened, &key, &few);
        assert_eq!(shared(&look(&opened, &key, &few), &first), 0);
        let many = pods(0..MOST, "n1");
        let first = look(&opened, &key, &many);
        let other = pods(0..FEW, "n1");
        let second = look(&opened, &Key::new("d", "n"), &other);
        assert_eq!(
            shared(&look(&opened, &Key::new("d", "n"), &other), &second),
            0
        );
        assert!(!opened.tidy());
        assert_eq!(shared(&look(&opened, &key, &many), &first), MOST);
        tokio::time::advance(KEPT_FOR).await;
        assert!(opened.tidy());
        assert_eq!(shared(&look(&opened, &key, &many), &first), 0);
    }
}
