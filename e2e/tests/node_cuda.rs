//! On a real node that advertises a GPU: the quick start's model answers through the CUDA backend.
//!
//! Lab only: the node has no GPU. It advertises one (`kubelab node gpus`), and the driver's library that NVIDIA's container
//! toolkit would mount is the emulated one, from a ConfigMap.
#![cfg(feature = "lab")]

use std::path::Path;
use std::process::Command;

use e2e::{Cluster, chat};
use kernels::emulation::Emulation;

mod node;
use node::{Model, wait_ready};

/// What a pod needs beside the manifest of a CPU model. A GPU's pod would ask for the host memory of pinned buffers.
const TEMPLATE: &str = "
  podTemplate:
    env:
      - name: CACHALOT_CUDA_DRIVER
        value: /driver/libcuda.so.1
    volumes:
      - name: driver
        mountPath: /driver
        configMap:
          name: emulated-driver
    resources:
      requests: {cpu: 250m, memory: 512Mi}
      limits: {memory: 2Gi}
";

#[test]
fn a_model_on_a_gpu_node_answers_through_the_cuda_backend() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let lab = cluster.kubeconfig().parent().expect("the lab's folder");
    let advertised = Command::new(e2e::tool("kubelab"))
        .args(["node", "gpus", "--count", "1", "--dir"])
        .arg(lab)
        .output()
        .expect("kubelab runs");
    assert!(
        advertised.status.success(),
        "{}",
        String::from_utf8_lossy(&advertised.stderr)
    );
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulation");
    let driver = Emulation::new(&folder).build().expect("a C++ compiler");
    let namespace = cluster.namespace("cuda").expect("a namespace");
    let file = format!("--from-file=libcuda.so.1={}", driver.display());
    cluster
        .kubectl(&[
            "create",
            "configmap",
            "emulated-driver",
            &file,
            "-n",
            &namespace.name,
        ])
        .expect("the library fits a ConfigMap");

    let manifest = node::manifest("tiny-gpu", "replicas: 1").replace("type: cpu", "type: nvidia")
        + TEMPLATE.trim_start_matches('\n');
    cluster.apply(&namespace.name, &manifest).expect("applied");
    wait_ready(&cluster, &namespace.name, "tiny-gpu");
    let pods = cluster
        .engine_pods(&namespace.name, "tiny-gpu")
        .expect("the API answers");
    let [pod] = pods.as_slice() else {
        panic!("one pod: {pods:?}");
    };
    let limits = &pod["spec"]["containers"][0]["resources"]["limits"];
    assert_eq!(limits["nvidia.com/gpu"], "1");
    let name = pod["metadata"]["name"].as_str().expect("a name");
    let log = cluster
        .kubectl(&["logs", name, "-n", &namespace.name])
        .expect("a log");
    let chosen = log.lines().find(|line| line.contains("device chosen"));
    assert!(chosen.is_some_and(|line| line.contains("cuda")), "{log}");

    let model = Model::of(&cluster, &namespace.name, "tiny-gpu");
    let answer = chat::ask(&model.base_url, "tiny-gpu", "What is 123 + 456?").expect("an answer");
    assert_eq!(answer.boxed(), Some("579"), "{answer:?}");
}
