//! The API server accepts what the guide shows, and refuses what cannot be meant, naming field and way out.
#![cfg(feature = "lab")]

mod control_plane;
use control_plane::Stand;

fn manifest(spec: &str) -> String {
    format!(
        "apiVersion: cachalot.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: m}}\nspec: {spec}\n"
    )
}

const MODEL: &str = "model: {source: 'file:///models/tiny-r1'}, accelerator: {type: cpu}";

#[test]
fn the_api_server_accepts_the_guide_and_refuses_contradictions() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    for guide in ["quickstart.yaml", "autoscaling.yaml", "gpu-fleet.yaml"] {
        let path = e2e::root().join("docs/guide").join(guide);
        let path = path.to_str().expect("UTF-8");
        cluster
            .kubectl(&[
                "apply",
                "--server-side",
                "--dry-run=server",
                "--validate=strict",
                "-f",
                path,
            ])
            .unwrap_or_else(|error| panic!("{guide}: {error}"));
    }

    let dry_run = |spec: &str| {
        let arguments = [
            "apply",
            "--server-side",
            "--dry-run=server",
            "--validate=strict",
            "-n",
            "default",
            "-f",
            "-",
        ];
        cluster.with_input(&arguments, &manifest(spec))
    };
    dry_run(&format!("{{{MODEL}, replicas: 1}}")).expect("the smallest is accepted");
    let table = [
        (format!("{{{MODEL}, replicas: 1, replica: 2}}"), "replica"),
        (format!("{{{MODEL}, replicas: -1}}"), "spec.replicas"),
        (format!("{{{MODEL}, replicas: 20000}}"), "spec.replicas"),
        (format!("{{{MODEL}, replicas: 1, autoscaling: {{minReplicas: 1, maxReplicas: 2}}}}"), "autoscaling"),
        (format!("{{{MODEL}, autoscaling: {{minReplicas: 3, maxReplicas: 2}}}}"), "minReplicas must not be above"),
        (format!("{{{MODEL}, replicas: 1, rollout: {{maxSurge: 0, maxUnavailable: 0}}}}"), "maxUnavailable"),
        (format!("{{{MODEL}, replicas: 1, parallelism: {{pipeline: 2}}}}"), "pipeline"),
        ("{model: {source: 'oci://registry/model'}, replicas: 1}".into(), "oci:// is not served yet"),
        ("{model: {source: 'ftp://x'}, replicas: 1}".into(), "must begin with hf://"),
        ("{model: {source: 'file://relative'}, replicas: 1}".into(), "absolute path"),
        ("{model: {source: 'hf://only-a-name'}, replicas: 1}".into(), "hf://org/name"),
        ("{model: {source: 'file:///../etc'}, replicas: 1}".into(), "'..'"),
        ("{model: {source: 'file:///m', revision: main}, replicas: 1}".into(), "revision"),
        (
            "{model: {source: 'file:///m'}, accelerator: {type: cpu, products: [NVIDIA-H200]}, replicas: 1}".into(),
            "accelerator.products",
        ),
        ("{model: {source: 'file:///m'}, accelerator: {type: tpu}, replicas: 1}".into(), "accelerator.type"),
        ("{replicas: 1}".into(), "model"),
    ];
    for (spec, named) in &table {
        let refused = dry_run(spec)
            .expect_err(&format!("accepted: {spec}"))
            .to_string();
        assert!(refused.contains(named), "{spec}: {refused}");
    }

    let size = cluster
        .kubectl(&["get", "crd", "modeldeployments.cachalot.dev", "-o", "json"])
        .expect("the CRD")
        .len();
    println!("{} refusals; the CRD is {size} bytes", table.len());
    let explained = cluster
        .kubectl(&["explain", "modeldeployment.spec.autoscaling"])
        .expect("explained");
    assert!(explained.contains("minReplicas"), "{explained}");
}
