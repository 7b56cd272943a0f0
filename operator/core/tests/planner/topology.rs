//! Ranks of one replica are kept together, by the narrowest domain that has room for all of them.

use std::collections::BTreeMap;

use crate::common::*;
use operator_core::{Action, Object, Plan};
use proptest::prelude::*;
use serde_json::{Value, json};

const LEAF: &str = "network.topology.nvidia.com/leaf";
const ZONE: &str = "topology.kubernetes.io/zone";

/// A plan for one replica of sixteen or more GPUs on nodes of eight, each with its labels.
fn planned(tensor: u32, topology: Value, nodes: &[(&str, Value)]) -> Plan {
    let spec = json!({
        "parallelism": {"tensor": tensor, "expert": tensor},
        // FP8 blocks are too few for 32.
        "precision": "bfloat16",
        "placement": {"topology": topology},
    });
    let nodes = nodes.iter().map(|(name, labels)| {
        with(
            h200x8(name),
            json!({"metadata": {"labels": labels.clone()}}),
        )
    });
    story(r1(spec)).on(nodes).plan()
}

fn nodes_of(plan: &Plan) -> Vec<String> {
    let pods = plan.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => Some(pod),
        _ => None,
    });
    let mut nodes: Vec<String> = pods
        .map(|pod| operator_core::objects::preferred_nodes(pod)[0].clone())
        .collect();
    nodes.sort();
    nodes
}

#[test]
fn ranks_share_a_switch_where_one_has_room_and_a_zone_where_none_has() {
    let at = |leaf: &str, zone: &str| json!({LEAF: leaf, ZONE: zone});
    let nodes = [
        ("a", at("s1", "z1")),
        ("b", at("s2", "z1")),
        ("c", at("s2", "z1")),
        ("d", at("s3", "z2")),
    ];
    assert_eq!(nodes_of(&planned(16, Value::Null, &nodes)), ["b", "c"]);
    let nodes = [
        ("a", at("s1", "z1")),
        ("b", at("s2", "z2")),
        ("c", at("s3", "z2")),
        ("d", at("s4", "z3")),
    ];
    assert_eq!(nodes_of(&planned(16, Value::Null, &nodes)), ["b", "c"]);
}

#[test]
fn labels_that_the_user_names_replace_those_that_are_known() {
    let at = |rack: &str, leaf: &str| json!({"example.com/rack": rack, LEAF: leaf});
    let nodes = [
        ("a", at("r1", "s1")),
        ("b", at("r2", "s1")),
        ("c", at("r1", "s2")),
    ];
    assert_eq!(nodes_of(&planned(16, Value::Null, &nodes)), ["a", "b"]);
    let named = json!({"keepWithin": ["example.com/rack"]});
    assert_eq!(nodes_of(&planned(16, named, &nodes)), ["a", "c"]);
    // Kept nowhere, they go where any single replica of the size of a rank would go.
    let nodes = [
        ("a", json!({LEAF: "s1"})),
        ("b", json!({LEAF: "s2"})),
        ("c", json!({LEAF: "s2"})),
    ];
    assert_eq!(
        nodes_of(&planned(16, json!({"keepWithin": []}), &nodes)),
        ["a", "b"]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Against a search through all domains: the first label under which any value has enough nodes is the one that all
    /// ranks share, and the value is one with the fewest nodes that are enough.
    #[test]
    fn the_narrowest_label_with_room_is_shared_and_its_smallest_domain_taken(
        given in prop::collection::vec((0..4u8, 0..3u8, 0..2u8), 2..10),
        wants in prop::sample::select(vec![2usize, 4]),
    ) {
        let labels = ["nvidia.com/gpu.clique", LEAF, ZONE];
        // Zero stands for a node without the label.
        let names: Vec<String> = (0..given.len()).map(|index| format!("n{index}")).collect();
        let of = |values: &(u8, u8, u8)| -> BTreeMap<&str, String> {
            let values = [values.0, values.1, values.2];
            let pairs = labels.iter().zip(values).filter(|(_, value)| *value > 0);
            pairs.map(|(label, value)| (*label, value.to_string())).collect()
        };
        let nodes: Vec<(&str, Value)> = names.iter().zip(&given)
            .map(|(name, values)| (name.as_str(), json!(of(values))))
            .collect();
        let found = nodes_of(&planned(u32::try_from(8 * wants).unwrap(), Value::Null, &nodes));
        prop_assert_eq!(found.len(), if given.len() < wants { 0 } else { wants });
        let expected = labels.iter().find_map(|label| {
            let mut sizes: BTreeMap<String, usize> = BTreeMap::new();
            for value in given.iter().filter_map(|values| of(values).get(label).cloned()) {
                *sizes.entry(value).or_default() += 1;
            }
            let least = sizes.values().copied().filter(|size| *size >= wants).min()?;
            Some((*label, least, sizes))
        });
        if let (Some((label, least, sizes)), false) = (expected, found.is_empty()) {
            let values: Vec<Option<String>> = found.iter()
                .map(|name| of(&given[names.iter().position(|other| other == name).unwrap()]).get(label).cloned())
                .collect();
            prop_assert!(values.iter().all(|value| value.is_some() && *value == values[0]), "{label}: {found:?}");
            prop_assert_eq!(sizes[values[0].as_ref().unwrap()], least);
        }
    }
}
