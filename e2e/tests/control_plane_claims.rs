//! GPUs by resource claims on a real API server with the real kube-scheduler: what it allocates is what was planned, what
//! others hold is seen, and without the rights the reason is told while other models go on.
#![cfg(feature = "lab")]

use std::time::Duration;

use e2e::{Cluster, eventually};
use serde_json::{Value, json};

mod control_plane;
use control_plane::{SOON, Stand, children, config_of_r1, fleet, read, wait_condition};

const MINUTE: Duration = Duration::from_secs(60);

/// What a node's DRA driver would publish: eight GPUs.
fn slice(node: &str) -> Value {
    let devices: Vec<Value> = (0..8)
        .map(|index| {
            json!({
                "name": format!("gpu-{index}"),
                "attributes": {
                    "type": {"string": "gpu"},
                    "uuid": {"string": format!("GPU-{node}-{index}")},
                    "productName": {"string": "NVIDIA H200"},
                    "cudaComputeCapability": {"version": "9.0.0"},
                },
                "capacity": {"memory": {"value": "143771Mi"}},
            })
        })
        .collect();
    json!({
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": format!("{node}-gpu")},
        "spec": {
            "driver": "gpu.nvidia.com",
            "nodeName": node,
            "pool": {"name": node, "generation": 1, "resourceSliceCount": 1},
            "devices": devices,
        },
    })
}

fn device_class() -> Value {
    json!({
        "apiVersion": "resource.k8s.io/v1",
        "kind": "DeviceClass",
        "metadata": {"name": "gpu.nvidia.com"},
        "spec": {"selectors": [{"cel": {
            "expression": "device.driver == 'gpu.nvidia.com' && device.attributes['gpu.nvidia.com'].type == 'gpu'"
        }}]},
    })
}

/// A pod of someone else on `node` that holds one GPU.
fn holder(node: &str) -> [Value; 2] {
    let claim = json!({
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {"name": "other"},
        "spec": {"devices": {"requests": [
            {"name": "one", "exactly": {"deviceClassName": "gpu.nvidia.com"}}]}},
    });
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "other"},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}],
            "resourceClaims": [{"name": "gpu", "resourceClaimName": "other"}],
            "containers": [{"name": "one", "image": "none", "resources": {"claims": [{"name": "gpu"}]}}],
        },
    });
    [claim, pod]
}

fn apply(cluster: &Cluster, object: &Value) {
    cluster
        .apply("default", &object.to_string())
        .expect("applied");
}

/// Claims of the model, each with the node and the number of devices it was given.
fn given(cluster: &Cluster) -> Result<Vec<(String, usize)>, String> {
    let claims = cluster
        .list(
            "default",
            "resourceclaims",
            "cachalot.dev/model-deployment=r1",
        )
        .map_err(|error| error.to_string())?;
    let mut given = Vec::new();
    for claim in claims {
        let results = &claim["status"]["allocation"]["devices"]["results"];
        let devices = results.as_array().map_or(0, Vec::len);
        given.push((
            results[0]["pool"].as_str().unwrap_or("").to_owned(),
            devices,
        ));
    }
    given.sort();
    Ok(given)
}

const BY_CLAIM: &str = "  accelerator: {claim: {}}\n";

#[test]
fn the_scheduler_allocates_what_was_planned() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    // What the chart renders with resourceClaims.enabled.
    stand.apply_rights(&read("charts/tests/golden/claims.yaml"));
    stand.simulate("gpu", 3);
    apply(cluster, &device_class());
    for node in ["gpu-0001", "gpu-0002", "gpu-0003"] {
        apply(cluster, &slice(node));
    }
    for object in holder("gpu-0002") {
        apply(cluster, &object);
    }
    eventually("someone else holds a GPU", MINUTE, || {
        let claim = cluster
            .get("default", "resourceclaim", "other")
            .map_err(|error| error.to_string())?
            .unwrap_or_default();
        let pool = &claim["status"]["allocation"]["devices"]["results"][0]["pool"];
        if pool == "gpu-0002" {
            Ok(())
        } else {
            Err(claim.to_string())
        }
    });
    let operator = stand.operator("only", &["--resource-claims=true"]);
    operator.wait_leading();
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    let three = format!("{BY_CLAIM}  replicas: 3\n");
    cluster
        .apply("default", &fleet("r1", &three))
        .expect("applied");
    eventually("two replicas have their GPUs", MINUTE, || {
        let wanted = [("gpu-0001".to_owned(), 8), ("gpu-0003".to_owned(), 8)];
        let given = given(cluster)?;
        if given == wanted {
            Ok(())
        } else {
            Err(format!("{given:?}"))
        }
    });
    let message = wait_condition(cluster, "default", "r1", "Planned", "False", SOON);
    assert!(
        message.contains("GPUs of gpu.nvidia.com is taken: needs 8, 7 free"),
        "{message}"
    );
    for pod in cluster.engine_pods("default", "r1").expect("pods") {
        let resources = &pod["spec"]["containers"][0]["resources"];
        assert!(
            resources["limits"]["nvidia.com/gpu"].is_null(),
            "{resources}"
        );
        assert!(!resources["claims"].is_null(), "{resources}");
    }

    // What the other held is free: the third replica is made without anyone touching the model.
    cluster
        .kubectl(&["delete", "pod", "other", "--force", "--grace-period=0"])
        .expect("deleted");
    cluster
        .kubectl(&["delete", "resourceclaim", "other", "--wait=false"])
        .expect("deleted");
    wait_condition(cluster, "default", "r1", "Ready", "True", MINUTE);
    assert_eq!(given(cluster).expect("claims").len(), 3);

    // A template that somebody removes comes back.
    let template = || {
        cluster
            .list(
                "default",
                "resourceclaimtemplates",
                "cachalot.dev/model-deployment=r1",
            )
            .map_err(|error| error.to_string())
    };
    let first = template().expect("templates");
    assert_eq!(first.len(), 1, "{first:?}");
    let name = first[0]["metadata"]["name"].as_str().unwrap_or("?");
    cluster
        .kubectl(&["delete", "resourceclaimtemplate", name])
        .expect("deleted");
    eventually("the template is back", SOON, || {
        let again = template()?;
        if again.len() == 1 && again[0]["metadata"]["uid"] != first[0]["metadata"]["uid"] {
            Ok(())
        } else {
            Err(format!("{again:?}"))
        }
    });

    cluster
        .kubectl(&["delete", "mdep", "r1", "--wait=false"])
        .expect("deleted");
    eventually("nothing is left", MINUTE, || {
        let (left, claims) = (children(cluster, "default", "r1"), given(cluster)?);
        let templates = template()?;
        if left.is_empty() && claims.is_empty() && templates.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?} {claims:?} {templates:?}"))
        }
    });
}

#[test]
fn without_the_rights_the_reason_is_told_and_others_go_on() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    stand.simulate("gpu", 1);
    // The chart's rights without resourceClaims.enabled.
    let operator = stand.operator("only", &["--resource-claims=true"]);
    operator.wait_leading();
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    let one = format!("{BY_CLAIM}  replicas: 1\n");
    cluster
        .apply("default", &fleet("r1", &one))
        .expect("applied");
    cluster
        .apply("default", &fleet("plain", "  replicas: 1\n"))
        .expect("applied");
    wait_condition(cluster, "default", "plain", "Ready", "True", MINUTE);
    eventually("the missing right is named", MINUTE, || {
        let message = wait_condition(cluster, "default", "r1", "Planned", "False", SOON);
        if message.contains("cannot be read yet") && message.contains("forbidden") {
            Ok(())
        } else {
            Err(message)
        }
    });
}
