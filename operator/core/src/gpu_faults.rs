//! GPUs that engines reported at fault: remembered in the status, and avoided until they are repaired.
//!
//! An engine that ends because its GPU is at fault says so in its termination message. Kubernetes shows that message
//! until the container ends once more or its pod is gone, so a fault is remembered before anything is done about it. It
//! counts while its node is the same and was not booted anew, for a day at most.
//!
//! A record that counts no more stays while its pod shows the same report: it would be taken for news otherwise.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use engine_spec::EndReport;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use operator_api::GpuFaultStatus;

use crate::names;
use crate::replicas::Replica;
use crate::snapshot::{Cluster, PodView, Snapshot};
use crate::time::seconds_between;

/// Seconds after which a fault is forgotten in any case: a GPU may be reset, or taken out, without a boot.
pub const FORGET_SECONDS: u64 = 24 * 3600;
/// Faults that are remembered.
const FAULTS_MAX: usize = 64;

/// What is known after `snapshot`, the latest first.
pub fn remember(snapshot: &Snapshot) -> Vec<GpuFaultStatus> {
    let stored = stored(snapshot);
    let told: Vec<GpuFaultStatus> = snapshot
        .pods
        .iter()
        .filter_map(|pod| told(pod, &snapshot.cluster))
        // One that is known was seen when the node had the boot ID that it has.
        .map(|new| match stored.iter().find(|old| is_same(old, &new)) {
            Some(old) => old.clone(),
            None => new,
        })
        .collect();
    let kept = stored.iter().filter(|old| counts(old, snapshot)).cloned();
    let mut all: Vec<GpuFaultStatus> = told.into_iter().chain(kept).collect();
    all.sort_by(|left, right| {
        let key = |fault: &GpuFaultStatus| (fault.node.clone(), fault.uuid.clone());
        let latest = right.since.0.cmp(&left.since.0);
        latest.then_with(|| key(left).cmp(&key(right)))
    });
    let mut seen = BTreeSet::new();
    all.retain(|fault| seen.insert((fault.node.clone(), fault.uuid.clone())));
    all.truncate(FAULTS_MAX);
    all
}

/// Whether a fault still counts: its node was neither replaced nor booted anew, and not too long has passed.
pub fn counts(fault: &GpuFaultStatus, snapshot: &Snapshot) -> bool {
    let node = snapshot.cluster.nodes.get(&fault.node);
    node.is_some_and(|node| node.uid == fault.node_uid && node.boot_id == fault.boot_id)
        && seconds_between(fault.since.0, snapshot.now) < FORGET_SECONDS
}

/// The same snapshot, where each node says which of its GPUs were reported: by engines of this ModelDeployment, or of
/// others that remember it.
pub fn marked(snapshot: &Snapshot) -> Cow<'_, Snapshot> {
    let own = remember(snapshot);
    let all = own.iter().chain(&snapshot.gpu_faults);
    let counting: Vec<&GpuFaultStatus> = all.filter(|fault| counts(fault, snapshot)).collect();
    if counting.is_empty() {
        return Cow::Borrowed(snapshot);
    }
    let mut marked = snapshot.clone();
    let nodes = Arc::make_mut(&mut Arc::make_mut(&mut marked.cluster).nodes);
    let mut seen = BTreeSet::new();
    for fault in counting {
        if let Some(node) = nodes.get_mut(&fault.node)
            && seen.insert((&fault.node, &fault.uuid))
        {
            Arc::make_mut(node).reported.push(words(fault));
        }
    }
    Cow::Owned(marked)
}

/// The fault that a replica's engine reported, once it is remembered: the replica must not stay on that GPU.
pub fn of_replica<'a>(replica: &Replica<'_>, snapshot: &'a Snapshot) -> Option<&'a GpuFaultStatus> {
    let stored = stored(snapshot).iter();
    let mut counting = stored.filter(|fault| counts(fault, snapshot));
    counting.find(|fault| replica.pods().any(|pod| is_of(fault, pod)))
}

/// Faults that are remembered now, and those that are not any more, where `before` was stored.
pub fn changes<'a>(
    before: &'a [GpuFaultStatus],
    after: &'a [GpuFaultStatus],
) -> (Vec<&'a GpuFaultStatus>, Vec<&'a GpuFaultStatus>) {
    let lacks = |all: &[GpuFaultStatus], fault: &GpuFaultStatus| {
        let mut all = all.iter();
        !all.any(|other| other.node == fault.node && other.uuid == fault.uuid)
    };
    let new = after.iter().filter(|fault| lacks(before, fault));
    let forgotten = before.iter().filter(|fault| lacks(after, fault));
    (new.collect(), forgotten.collect())
}

/// "GPU-1: CUDA_ERROR_X (214), reported at …; used again when …".
pub fn words(fault: &GpuFaultStatus) -> String {
    format!(
        "{}: {}, reported at {}; used again when the node was rebooted or replaced, or from {} on",
        fault.uuid,
        fault.error,
        fault.since.0,
        forgotten_at(fault.since.0)
    )
}

fn forgotten_at(since: Timestamp) -> Timestamp {
    let seconds = i64::try_from(FORGET_SECONDS).unwrap_or(i64::MAX);
    since
        .checked_add(SignedDuration::from_secs(seconds))
        .unwrap_or(since)
}

fn stored(snapshot: &Snapshot) -> &[GpuFaultStatus] {
    let status = snapshot.deployment.status.as_ref();
    status.map_or(&[], |status| &status.gpu_faults)
}

/// What a pod shows of the end of its engine; none when that was not the fault of a GPU.
fn told(pod: &PodView, cluster: &Cluster) -> Option<GpuFaultStatus> {
    if pod.label(names::COMPONENT) != names::ENGINE {
        return None;
    }
    let ended = pod.container.terminated.as_deref()?;
    let fault = EndReport::from_message(&ended.message)?.gpu_fault?;
    let node = cluster.nodes.get(pod.node.as_ref()?)?;
    Some(GpuFaultStatus {
        node: node.name.clone(),
        node_uid: node.uid.clone(),
        boot_id: node.boot_id.clone(),
        uuid: fault.uuid,
        error: fault.error,
        pod: pod.name.clone(),
        since: Time(ended.finished.or(pod.created)?),
    })
}

/// Whether two records are of one report.
fn is_same(left: &GpuFaultStatus, right: &GpuFaultStatus) -> bool {
    let key = |fault: &GpuFaultStatus| (fault.pod.clone(), fault.uuid.clone(), fault.since.0);
    key(left) == key(right) && left.node == right.node
}

/// Whether a pod is the one that reported a fault, not a later one of its name. It holds that GPU for life.
fn is_of(fault: &GpuFaultStatus, pod: &PodView) -> bool {
    pod.name == fault.pod
        && pod.node.as_ref() == Some(&fault.node)
        && pod.created.is_none_or(|created| created <= fault.since.0)
}
