//! By what a node's GPUs are known to be at fault: one table, read for every node.
//!
//! The words are NVSentinel's and node-problem-detector's. They are compared without regard to
//! case, because the spelling differs between releases (`GpuNvlinkWatch`, `GpuNvLinkWatch`). To
//! teach the operator another word, add it here.

use k8s_openapi::api::core::v1::Node;

/// Node conditions that are True while a GPU is at fault.
const CONDITIONS: &[&str] = &[
    "GpuMemWatch",
    "GpuMemoryError",
    "GpuNvlinkWatch",
    "GpuThermalWatch",
    "GpuPcieWatch",
    "GpuPowerWatch",
    "GpuInforomWatch",
    "GpuSmWatch",
    "GpuMcuWatch",
    "GpuPmuWatch",
    "GpuDriverWatch",
    "SysLogsXIDError",
    "SysLogsSXIDError",
    "SysLogsGPUFallenOff",
    "NVSwitchFatalError",
    "NVSwitchDown",
    "DCGMError",
];
/// Taints that health checkers set on nodes with GPUs at fault.
const TAINTS: &[&str] = &[
    "nvidia.com/gpu-xid-error",
    "nvidia.com/gpu-nvlink-error",
    "nvidia.com/syslog-xid-error",
    "nvidia.com/gpu-error",
];
/// A label whose value says how far a repair is.
const STATE_LABEL: &str = "dgxc.nvidia.com/nvsentinel-state";
/// Its values while the node must not be used.
const STATES: &[&str] = &[
    "quarantined",
    "draining",
    "drain-succeeded",
    "drain-failed",
    "remediating",
    "remediation-failed",
];

/// What reports a node's GPUs at fault, by condition and label.
pub fn faults(node: &Node) -> Vec<String> {
    let conditions = node
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten());
    let mut faults: Vec<String> = conditions
        .filter(|condition| condition.status == "True" && is_in(CONDITIONS, &condition.type_))
        .map(|condition| condition.type_.clone())
        .collect();
    let labels = node.metadata.labels.as_ref();
    if let Some(state) = labels.and_then(|labels| labels.get(STATE_LABEL))
        && is_in(STATES, state)
    {
        faults.push(format!("{STATE_LABEL}={state}"));
    }
    faults
}

/// Whether a taint of this key says that GPUs are at fault.
pub fn is_fault_taint(key: &str) -> bool {
    is_in(TAINTS, key)
}

fn is_in(table: &[&str], word: &str) -> bool {
    table.iter().any(|known| known.eq_ignore_ascii_case(word))
}
