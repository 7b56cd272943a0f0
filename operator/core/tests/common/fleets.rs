//! Random fleets for the simulation: nodes of different sizes, ModelDeployments that compete for
//! them, and a mix of faults; all from one seed.

use k8s_openapi::api::core::v1::{Node, ResourceQuota};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use operator_api::ModelDeployment;
use operator_core::sim::{Faults, Seed, Story};
use operator_core::{Inventory, NodeCache, Settings};
use serde_json::{Value, json};

use super::{
    deployment, gpu_node, mig_mixed, mig_single, node, settings, slice, small_report, with,
};

/// The story of a seed.
pub fn story_of(seed: u64) -> Story {
    // A stream of its own, so that the world's chances do not repeat those of the fleet.
    let mut dice = Seed(seed ^ 0x00C0_FFEE_D15E_A5E5);
    let on_gpus = dice.below(2) == 0;
    let by_claims = on_gpus && dice.below(4) == 0;
    let count = 2 + dice.below(4);
    let nodes: Vec<Node> = (0..count)
        .map(|index| random_node(&mut dice, index, on_gpus))
        .collect();
    let names = nodes.iter().filter_map(|node| node.metadata.name.clone());
    let slices = names
        .filter(|_| by_claims)
        .map(|name| slice(&name, "NVIDIA H200", "143771Mi", dice.below(9)))
        .collect();
    let wishes = 1 + dice.below(3);
    let deployments = (0..wishes)
        .map(|index| {
            let wish = random_wish(&mut dice, index, on_gpus);
            if by_claims {
                with(wish, by_claim())
            } else {
                wish
            }
        })
        .collect();
    let quotas = (on_gpus && dice.below(3) == 0).then(|| {
        let resource = *dice.of(&["gpu", "gpu", "mig-3g.71gb"]).unwrap();
        quota(resource, 2 + dice.below(8))
    });
    let inventory = Inventory {
        nodes,
        deployments,
        quotas: quotas.into_iter().collect(),
        slices,
        priority_classes: classes(),
        ..Inventory::default()
    };
    Story {
        seed,
        inventory,
        report: small_report(),
        faults: random_faults(&mut dice),
        steps: usize::try_from(30 + dice.below(50)).unwrap(),
        settings: Settings {
            node_cache: (dice.below(2) == 0)
                .then(|| NodeCache::new("/var/lib/cachalot", "1Gi").unwrap()),
            ..settings()
        },
    }
}

/// What makes a wish ask for GPUs by claims, which kube-scheduler alone allocates.
fn by_claim() -> Value {
    json!({"spec": {
        "accelerator": {"mig": null, "claim": {}},
        "placement": {"binding": null},
    }})
}

fn quota(resource: &str, most: u64) -> ResourceQuota {
    let key = format!("requests.nvidia.com/{resource}");
    serde_json::from_value(json!({
        "metadata": {"name": "gpus", "namespace": "default"},
        "spec": {"hard": {key: most.to_string()}},
    }))
    .unwrap()
}

/// One that comes first, one that comes first and waits, and one that comes last.
pub fn classes() -> Vec<PriorityClass> {
    [
        json!({"metadata": {"name": "high"}, "value": 1000}),
        json!({"metadata": {"name": "meek"}, "value": 2000, "preemptionPolicy": "Never"}),
        json!({"metadata": {"name": "low"}, "value": -10}),
    ]
    .into_iter()
    .map(|class| serde_json::from_value(class).unwrap())
    .collect()
}

fn random_node(dice: &mut Seed, index: u64, on_gpus: bool) -> Node {
    let name = format!("node-{index}");
    let zone = json!({"metadata": {"labels": {"topology.kubernetes.io/zone": format!("zone-{}", dice.below(2))}}});
    let zone = if dice.below(3) == 0 {
        with(
            zone,
            json!({"metadata": {"labels": {"cloud.google.com/gke-spot": "true"}}}),
        )
    } else {
        zone
    };
    if on_gpus {
        let gpus = *dice.of(&[1, 2, 4, 8]).unwrap();
        let (product, memory_mib) = *dice
            .of(&[("NVIDIA-H200", 143_771), ("NVIDIA-H100-80GB-HBM3", 81_559)])
            .unwrap();
        let node = match dice.below(5) {
            0 => mig_single(&name, "3g.71gb", 71_424, 2 * gpus),
            1 => mig_mixed(&name, gpus / 2, &[("3g.71gb", 71_424, gpus)]),
            _ => gpu_node(&name, product, memory_mib, gpus),
        };
        return with(node, zone);
    }
    // Room for a few replicas, each of which asks for 250m, and always for inspections.
    let cpu = format!("{}m", 250 * (1 + dice.below(4)) + 200);
    with(node(&name, &cpu, "16Gi"), zone)
}

fn random_wish(dice: &mut Seed, index: u64, on_gpus: bool) -> ModelDeployment {
    let (surge, unavailable) = *dice
        .of(&[(1, 0), (0, 1), (1, 1), (2, 0), (2, 1), (0, 2)])
        .unwrap();
    let mut spec = json!({
        "replicas": dice.below(5),
        "rollout": {
            "maxSurge": surge,
            "maxUnavailable": unavailable,
            "drainTimeoutSeconds": 10 + dice.below(50),
        },
    });
    if dice.below(4) == 0 {
        let least = 1 + dice.below(2);
        spec["replicas"] = Value::Null;
        spec["autoscaling"] = json!({
            "minReplicas": least,
            "maxReplicas": least + dice.below(3),
            "targets": {"queuedRequestsPerReplica": 1 + dice.below(3)},
            "stabilization": {"scaleDownSeconds": 30},
        });
    }
    match dice.below(6) {
        0 => spec["rollout"]["partition"] = json!(1 + dice.below(2)),
        1 => {
            spec["rollout"]["steps"] = json!([
                {"percent": 25, "holdSeconds": 10 + dice.below(60)},
                {"percent": 60, "holdSeconds": dice.below(100)},
            ]);
        }
        2 => spec["rollout"]["onFailure"] = json!("Halt"),
        _ => {}
    }
    if dice.below(3) == 0 {
        spec["rollout"]["progressDeadlineSeconds"] = json!(60 + dice.below(300));
    }
    spec["rollout"]["restartBudget"] = json!(2 + dice.below(6));
    // Replicas of several pods: on the CPU each rank is one, on GPUs what is more than a node has.
    let is_group = dice.below(3) == 0;
    if is_group && !on_gpus {
        spec["parallelism"] = json!({"tensor": *dice.of(&[2, 2, 4]).unwrap()});
    }
    if on_gpus {
        spec["accelerator"] = json!({"type": "nvidia"});
        let tensor = *dice.of(&[0, 1, 2, 4]).unwrap();
        if tensor > 0 {
            spec["parallelism"] = json!({"tensor": tensor});
        }
        match dice.below(4) {
            0 => spec["accelerator"]["mig"] = json!("allowed"),
            1 if tensor < 2 => spec["accelerator"]["mig"] = json!("only"),
            _ => {}
        }
    }
    spec["placement"] = json!({});
    if dice.below(4) == 0 {
        spec["placement"]["topology"] = json!({"spreadBy": "topology.kubernetes.io/zone"});
    }
    if dice.below(5) == 0 {
        spec["placement"]["spot"] = json!({"onDemandMin": dice.below(3)});
    }
    if dice.below(3) == 0 {
        spec["placement"]["binding"] = json!("direct");
    }
    if dice.below(2) == 0 {
        let class = *dice.of(&["high", "meek", "low"]).unwrap();
        spec["placement"]["priorityClassName"] = json!(class);
    }
    if dice.below(2) == 0 {
        spec["model"] = json!({"source": "hf://org/small"});
    }
    let name = format!("m{index}");
    with(
        deployment(&name, spec),
        json!({"metadata": {
            "uid": format!("uid-of-{name}"),
        }}),
    )
}

fn random_faults(dice: &mut Seed) -> Faults {
    let all = Faults::all();
    match dice.below(8) {
        0 => Faults {
            killed: 1000,
            ..all
        },
        1 => Faults {
            lost_write: 400,
            lost_answer: 200,
            late_create: 200,
            ..all
        },
        2 => Faults {
            stale_view: 800,
            torn_view: 300,
            relist: 100,
            ..all
        },
        3 => Faults {
            silent_api: 50,
            slow_kubelet: 400,
            ..all
        },
        4 => Faults {
            node_silent: 60,
            node_gone: 20,
            node_sick: 40,
            gpu_reported: 60,
            node_booted: 20,
            node_cordoned: 40,
            ..all
        },
        5 => Faults {
            rescaled: 60,
            revised: 40,
            bad_revision: 400,
            recreated: 15,
            meddled: 60,
            ..all
        },
        _ => all,
    }
}
