//! Which nodes may be used, and who binds.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use operator_api::{Binding, Placement};

use super::{Rules, template};
use crate::topology;

/// Which nodes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ValidPlacement {
    /// Labels a node must carry.
    pub node_selector: BTreeMap<String, String>,
    /// Taints accepted.
    pub tolerations: Vec<Toleration>,
    /// Label to spread over.
    pub spread_by: Option<String>,
    /// Labels that keep the pods of a replica together, the narrowest first.
    pub keep_within: Vec<String>,
    /// Replicas kept off spot nodes, which the others prefer; none when price does not matter.
    pub on_demand_min: Option<u32>,
    /// Priority class.
    pub priority_class: Option<String>,
    /// Who binds pods to nodes.
    pub binding: Binding,
}

pub(super) fn valid_placement(rules: &mut Rules, given: &Placement) -> ValidPlacement {
    let Placement {
        node_selector,
        tolerations,
        topology,
        spot,
        priority_class_name,
        binding,
    } = given;
    template::check_labels(rules, "spec.placement.nodeSelector", node_selector);
    for toleration in tolerations {
        let operator = toleration.operator.as_deref().unwrap_or("Equal");
        let field = "spec.placement.tolerations";
        rules.require(
            matches!(operator, "Equal" | "Exists"),
            &format!("{field}[].operator"),
            operator,
            "must be Equal or Exists",
        );
        let effect = toleration.effect.as_deref().unwrap_or("");
        rules.require(
            matches!(effect, "" | "NoSchedule" | "PreferNoSchedule" | "NoExecute"),
            &format!("{field}[].effect"),
            effect,
            "must be NoSchedule, PreferNoSchedule or NoExecute, or absent for all",
        );
        rules.require(
            toleration.key.as_deref().is_some_and(|key| !key.is_empty()) || operator == "Exists",
            &format!("{field}[].key"),
            "",
            "an empty key needs operator Exists",
        );
        rules.require(
            operator != "Exists" || toleration.value.as_deref().unwrap_or("").is_empty(),
            &format!("{field}[].value"),
            toleration.value.as_deref().unwrap_or(""),
            "must be absent with operator Exists",
        );
        rules.require(
            toleration.toleration_seconds.is_none() || effect == "NoExecute",
            &format!("{field}[].tolerationSeconds"),
            toleration.toleration_seconds.unwrap_or(0),
            "needs effect NoExecute",
        );
    }
    let spread_by = topology.as_ref().and_then(|given| given.spread_by.clone());
    let keep_within = topology
        .as_ref()
        .and_then(|given| given.keep_within.clone());
    rules.require(
        topology.is_none() || spread_by.is_some() || keep_within.is_some(),
        "spec.placement.topology",
        "{}",
        "needs spreadBy or keepWithin; set one of them or remove it",
    );
    let keys = spread_by.iter().map(|key| ("spreadBy", key));
    let kept = keep_within.iter().flatten();
    for (field, key) in keys.chain(kept.map(|key| ("keepWithin[]", key))) {
        rules.require(
            template::is_label_key(key),
            &format!("spec.placement.topology.{field}"),
            key,
            "must be the key of a node label, such as topology.kubernetes.io/zone",
        );
    }
    ValidPlacement {
        binding: binding.unwrap_or_default(),
        node_selector: node_selector.clone(),
        tolerations: tolerations.clone(),
        spread_by,
        keep_within: keep_within.unwrap_or_else(topology::known),
        on_demand_min: spot.as_ref().map(|spot| {
            let field = "spec.placement.spot.onDemandMin";
            rules.number(field, spot.on_demand_min, (0, 10_000), 0)
        }),
        priority_class: rules.name(
            "spec.placement.priorityClassName",
            priority_class_name.as_deref(),
        ),
    }
}
