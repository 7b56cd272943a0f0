//! Which nodes are spot: cheaper, and taken away at short notice. One table for all clouds.

use crate::snapshot::NodeView;

/// Labels by which clouds and autoscalers tell of spot nodes; values in any case of letters.
const LABELS: &[(&str, &str)] = &[
    ("karpenter.sh/capacity-type", "spot"),
    ("eks.amazonaws.com/capacityType", "spot"),
    ("cloud.google.com/gke-spot", "true"),
    ("cloud.google.com/gke-preemptible", "true"),
    ("cloud.google.com/gke-provisioning", "spot"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
];

/// Whether a node is spot.
pub fn is_spot(node: &NodeView) -> bool {
    LABELS
        .iter()
        .any(|(key, value)| node.label(key).eq_ignore_ascii_case(value))
}
