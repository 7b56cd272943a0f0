//! Which node labels say that nodes are close to each other.
//!
//! A cluster carries the labels of one source, and of that the levels stand here from the narrowest to the widest, so
//! that the list can be gone through as it is.

/// Labels whose values name domains of fast links: NVLink first, then switches, then zones.
const KNOWN: &[&str] = &[
    // NVIDIA's gpu-feature-discovery, and Topograph where that says nothing.
    "nvidia.com/gpu.clique",
    "accelerator.topograph.run/sub-domain",
    "accelerator.topograph.run/domain",
    "network.topology.nvidia.com/accelerator",
    // The switch next to the node, by Topograph of one version or another.
    "fabric.topograph.run/tier-0",
    "network.topology.nvidia.com/leaf",
    "network.topology.nvidia.com/block",
    "fabric.topograph.run/tier-1",
    "network.topology.nvidia.com/spine",
    "fabric.topograph.run/tier-2",
    "network.topology.nvidia.com/core",
    "network.topology.nvidia.com/datacenter",
    // EKS counts its layers from the top.
    "topology.k8s.aws/network-node-layer-4",
    "topology.k8s.aws/network-node-layer-3",
    "topology.k8s.aws/network-node-layer-2",
    "topology.k8s.aws/network-node-layer-1",
    // GKE.
    "cloud.google.com/gce-topology-subblock",
    "cloud.google.com/gce-topology-block",
    "topology.kubernetes.io/zone",
];

/// The labels that keep the pods of a replica together where the user names none.
pub fn known() -> Vec<String> {
    KNOWN.iter().map(|key| (*key).to_owned()).collect()
}
