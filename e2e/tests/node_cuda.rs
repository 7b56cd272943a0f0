//! On a real node that advertises GPUs: the quick start's model answers through the CUDA backend, on one and on two.
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
      - name: CACHALOT_EMULATION_DEVICES
        value: '{gpus}'
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
fn a_model_on_a_gpu_node_answers_through_the_cuda_backend_on_one_gpu_and_on_two() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let lab = cluster.kubeconfig().parent().expect("the lab's folder");
    let advertised = Command::new(e2e::tool("kubelab"))
        .args(["node", "gpus", "--count", "3", "--dir"])
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

    on_gpus(&cluster, &namespace.name, "tiny-gpu", "1", "replicas: 1");
    let shared = "replicas: 1\nparallelism: {tensor: 2}";
    let log = on_gpus(&cluster, &namespace.name, "tiny-gpus", "2", shared);
    assert!(log.contains("all ranks are here"), "{log}");
}

/// Serves the model on so many GPUs of one pod and asks it; what the pod said.
fn on_gpus(cluster: &Cluster, namespace: &str, name: &str, gpus: &str, spec: &str) -> String {
    let manifest = node::manifest(name, spec).replace("type: cpu", "type: nvidia")
        + TEMPLATE.replace("{gpus}", gpus).trim_start_matches('\n');
    cluster.apply(namespace, &manifest).expect("applied");
    wait_ready(cluster, namespace, name);
    let pods = cluster
        .engine_pods(namespace, name)
        .expect("the API answers");
    let [pod] = pods.as_slice() else {
        panic!("one pod: {pods:?}");
    };
    let limits = &pod["spec"]["containers"][0]["resources"]["limits"];
    assert_eq!(limits["nvidia.com/gpu"], gpus);
    let pod = pod["metadata"]["name"].as_str().expect("a name");
    let log = cluster
        .kubectl(&["logs", pod, "-n", namespace])
        .expect("a log");
    let chosen = log.lines().find(|line| line.contains("device chosen"));
    assert!(chosen.is_some_and(|line| line.contains("cuda")), "{log}");
    let model = Model::of(cluster, namespace, name);
    let answer = chat::ask(&model.base_url, name, "What is 123 + 456?").expect("an answer");
    assert_eq!(answer.boxed(), Some("579"), "{answer:?}");
    log
}
