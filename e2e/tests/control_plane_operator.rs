//! The operator on a real API server, with the chart's own rights: what it creates, that it creates it once, what a
//! restart changes (nothing), who leads, and what is left after a deletion (nothing).
#![cfg(feature = "lab")]

use std::time::{Duration, Instant};

use e2e::eventually;

mod control_plane;
use control_plane::{
    SOON, SYSTEM, Stand, children, config_of_r1, fleet, is_true, read, wait_condition,
};

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn a_fleet_is_created_once_survives_restarts_and_leaves_nothing() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    stand.simulate("gpu", 4);
    let operator = stand.operator("first", &[]);
    operator.wait_leading();
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    let applied = Instant::now();
    cluster
        .apply("default", &fleet("r1", "  replicas: 2\n"))
        .expect("applied");
    wait_condition(cluster, "default", "r1", "Planned", "True", SOON);
    let planned = applied.elapsed();
    wait_condition(cluster, "default", "r1", "Ready", "True", MINUTE);
    println!(
        "Planned after {planned:?}, Ready (simulated pods) after {:?}",
        applied.elapsed()
    );

    let before = children(cluster, "default", "r1");
    let pods = before
        .iter()
        .filter(|name| name.starts_with("pods/"))
        .count();
    assert_eq!(pods, 2, "{before:?}");
    for kind in ["services/r1 ", "poddisruptionbudgets/r1 ", "configmaps/r1-"] {
        assert!(
            before.iter().any(|name| name.starts_with(kind)),
            "no {kind} in {before:?}"
        );
    }
    let mdep = cluster
        .get("default", "mdep", "r1")
        .expect("an answer")
        .expect("there");
    assert_eq!(mdep["status"]["ready"], "2/2", "{}", mdep["status"]);
    assert_eq!(mdep["status"]["plan"]["gpus"], 16, "{}", mdep["status"]);

    // Nothing to do: nothing is written.
    let writes = |operator: &control_plane::Operator| {
        operator.metric("cachalot_operator_reconcile_total{outcome=\"applied\"}")
    };
    let looks = || operator.log().matches("pass ended").count();
    // The look that follows its own status may be under way.
    std::thread::sleep(Duration::from_secs(3));
    let (settled, looked) = (writes(&operator), looks());
    let version = mdep["metadata"]["resourceVersion"].clone();
    cluster
        .kubectl(&["annotate", "mdep", "r1", "test/poke=1"])
        .expect("annotated");
    eventually("the operator looked again", SOON, || {
        (looks() > looked).then_some(()).ok_or(operator.log())
    });
    assert_eq!(
        writes(&operator),
        settled,
        "a pass without news wrote something"
    );
    assert_ne!(
        cluster
            .get("default", "mdep", "r1")
            .expect("an answer")
            .expect("there")["metadata"]["resourceVersion"],
        version
    );

    // A restart, gentle and brutal: the same objects with the same uids.
    let log = operator.terminate();
    assert!(log.contains("lease given back"), "{log}");
    let second = stand.operator("second", &[]);
    let began = Instant::now();
    second.wait_leading();
    println!(
        "the second leads after {:?}; RSS {:?} bytes",
        began.elapsed(),
        second.metric("process_resident_memory_bytes")
    );
    eventually("a first pass", SOON, || {
        match second.metric("cachalot_operator_reconcile_total{outcome=\"unchanged\"}") {
            Some(passes) if passes >= 1.0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    assert_eq!(children(cluster, "default", "r1"), before);
    second.kill();
    let third = stand.operator("third", &[]);
    third.wait_leading();
    assert_eq!(children(cluster, "default", "r1"), before);

    // A child that somebody removes comes back; the others stay.
    cluster
        .kubectl(&["delete", "service", "r1"])
        .expect("deleted");
    eventually("the Service is back", SOON, || {
        cluster
            .get("default", "service", "r1")
            .map_err(|error| error.to_string())?
            .map(|_| ())
            .ok_or("not there".into())
    });

    // Fields of others stay theirs.
    cluster
        .kubectl(&["label", "service", "r1", "owner=somebody"])
        .expect("labelled");
    cluster
        .kubectl(&["annotate", "mdep", "r1", "test/poke=2", "--overwrite"])
        .expect("annotated");
    std::thread::sleep(Duration::from_millis(500));
    let service = cluster
        .get("default", "service", "r1")
        .expect("an answer")
        .expect("there");
    assert_eq!(service["metadata"]["labels"]["owner"], "somebody");

    cluster
        .kubectl(&["delete", "mdep", "r1", "--wait=false"])
        .expect("deleted");
    eventually("nothing is left", MINUTE, || {
        let left = children(cluster, "default", "r1");
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
    let events = cluster.kubectl(&[
        "get",
        "events",
        "-n",
        "default",
        "--field-selector=involvedObject.kind=ModelDeployment",
    ]);
    let events = events.expect("events");
    assert!(events.lines().count() > 2, "{events}");
    assert_eq!(
        third.metric("cachalot_operator_reconcile_errors_total{category=\"forbidden\"}"),
        Some(0.0),
        "{}",
        third.log()
    );
}

#[test]
fn what_cannot_fit_says_for_each_node_why_and_starts_when_room_appears() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    stand.simulate("gpu", 2);
    let operator = stand.operator("only", &[]);
    operator.wait_leading();
    cluster
        .apply("default", &read("docs/guide/gpu-fleet.yaml"))
        .expect("applied");
    wait_condition(cluster, "default", "deepseek-r1", "Ready", "True", MINUTE);
    let why = wait_condition(
        cluster,
        "default",
        "deepseek-r1-too-large",
        "Planned",
        "False",
        SOON,
    );
    assert!(
        why.contains("NVIDIA-H200") && why.contains("it would fit with 8 devices"),
        "{why}"
    );
    let described = cluster
        .kubectl(&["describe", "mdep", "deepseek-r1-too-large"])
        .expect("described");
    assert!(
        described.contains("Warning  MemoryDoesNotFit"),
        "{described}"
    );

    // All GPUs are taken; a third replica waits, and starts when a node appears.
    cluster
        .kubectl(&["scale", "mdep", "deepseek-r1", "--replicas=3"])
        .expect("scaled");
    let why = wait_condition(cluster, "default", "deepseek-r1", "Planned", "False", SOON);
    assert!(
        why.contains("2 nodes: GPUs are taken: needs 8, 0 free"),
        "{why}"
    );
    stand.simulate("late", 1);
    wait_condition(cluster, "default", "deepseek-r1", "Ready", "True", MINUTE);
    let pods = cluster.engine_pods("default", "deepseek-r1").expect("pods");
    let mut nodes: Vec<_> = pods
        .iter()
        .map(|pod| pod["spec"]["nodeName"].to_string())
        .collect();
    nodes.sort();
    nodes.dedup();
    assert_eq!((pods.len(), nodes.len()), (3, 3), "{nodes:?}");
    // It waited, it did not spin.
    let passes = operator
        .metric("cachalot_operator_reconcile_duration_seconds_count")
        .expect("counted");
    assert!(passes < 300.0, "{passes} passes");
}

#[test]
fn replicas_follow_kubectl_scale_and_a_horizontal_pod_autoscaler() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    stand.simulate("gpu", 3);
    let operator = stand.operator("only", &[]);
    operator.wait_leading();
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    cluster
        .apply(
            "default",
            &fleet("r1", "  replicas: 1\n  rollout: {drainTimeoutSeconds: 1}\n"),
        )
        .expect("applied");
    let ready = |replicas: i64| {
        eventually(&format!("{replicas} ready"), MINUTE, || {
            let mdep = cluster
                .get("default", "mdep", "r1")
                .map_err(|error| error.to_string())?
                .ok_or("gone")?;
            let pods = cluster
                .engine_pods("default", "r1")
                .map_err(|error| error.to_string())?
                .len();
            let status = &mdep["status"];
            if status["readyReplicas"] == replicas
                && pods == replicas as usize
                && is_true(&mdep, "Ready")
            {
                Ok(())
            } else {
                Err(format!("{pods} pods, {status}"))
            }
        });
    };
    ready(1);
    cluster
        .kubectl(&["scale", "mdep", "r1", "--replicas=3"])
        .expect("scaled");
    ready(3);
    cluster
        .kubectl(&["scale", "mdep", "r1", "--replicas=1"])
        .expect("scaled");
    ready(1);

    // An autoscaler that may not go below two raises the number through the scale subresource.
    let hpa = "apiVersion: autoscaling/v2\nkind: HorizontalPodAutoscaler\nmetadata: {name: r1}\nspec:\n  scaleTargetRef: \
               {apiVersion: cachalot.dev/v1alpha1, kind: ModelDeployment, name: r1}\n  minReplicas: 2\n  maxReplicas: 3\n";
    cluster.apply("default", hpa).expect("an autoscaler");
    ready(2);
    let hpa = cluster
        .get("default", "hpa", "r1")
        .expect("an answer")
        .expect("there");
    assert!(is_true(&hpa, "AbleToScale"), "{}", hpa["status"]);
    let scale = cluster
        .kubectl(&["get", "mdep", "r1", "--subresource=scale", "-o", "json"])
        .expect("the scale");
    assert!(
        scale.contains("cachalot.dev/model-deployment=r1"),
        "{scale}"
    );
}

#[test]
fn one_of_two_operators_acts_and_the_other_takes_over() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    stand.simulate("gpu", 2);
    let first = stand.operator("first", &[]);
    first.wait_leading();
    let second = stand.operator("second", &[]);
    eventually("the second is ready", SOON, || {
        match second.get("/readyz") {
            (200, _) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    cluster
        .apply("default", &fleet("a", "  replicas: 1\n"))
        .expect("applied");
    wait_condition(cluster, "default", "a", "Ready", "True", MINUTE);
    assert_eq!(first.metric("cachalot_operator_leader"), Some(1.0));
    assert_eq!(second.metric("cachalot_operator_leader"), Some(0.0));
    assert_eq!(
        second.metric("cachalot_operator_reconcile_total{outcome=\"applied\"}"),
        Some(0.0)
    );

    let before = children(cluster, "default", "a");
    first.kill();
    let killed = Instant::now();
    second.wait_leading();
    let took = killed.elapsed();
    assert!(
        took >= Duration::from_secs(10),
        "the lease of a dead operator was taken after {took:?}, before it expired"
    );
    println!("takeover after a kill: {took:?}");
    cluster
        .apply("default", &fleet("b", "  replicas: 1\n"))
        .expect("applied");
    wait_condition(cluster, "default", "b", "Ready", "True", MINUTE);
    assert_eq!(children(cluster, "default", "a"), before);

    let third = stand.operator("third", &[]);
    eventually("the third stands by", SOON, || {
        if third.get("/readyz").0 == 200 {
            Ok(())
        } else {
            Err(third.log())
        }
    });
    let stopped = Instant::now();
    let log = second.terminate();
    assert!(log.contains("lease given back"), "{log}");
    third.wait_leading();
    println!("takeover after a stop: {:?}", stopped.elapsed());
    let lease = cluster
        .get(SYSTEM, "lease", "cachalot")
        .expect("an answer")
        .expect("there");
    assert_eq!(lease["spec"]["holderIdentity"], "third");
    assert!(
        lease["spec"]["leaseTransitions"].as_i64() >= Some(2),
        "{lease}"
    );
}

#[test]
fn a_malformed_object_and_a_foreign_name_stop_nobody_else() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    stand.simulate("gpu", 2);
    // An object stored under an older, looser schema is what this imitates.
    let loose = r#"[{"op":"replace","path":"/spec/versions/0/schema/openAPIV3Schema","value":{"type":"object","x-kubernetes-preserve-unknown-fields":true}}]"#;
    cluster
        .kubectl(&[
            "patch",
            "crd",
            "modeldeployments.cachalot.dev",
            "--type=json",
            "-p",
            loose,
        ])
        .expect("loosened");
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    eventually("the loose schema is in force", SOON, || {
        cluster
            .apply("default", "apiVersion: cachalot.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {name: bad}\nspec: {model: {source: [1]}, replicas: 1}\n")
            .map_err(|error| error.to_string())
    });
    cluster
        .kubectl(&["create", "service", "clusterip", "taken", "--tcp=80:80"])
        .expect("somebody's service");
    let operator = stand.operator("only", &[]);
    operator.wait_leading();
    cluster
        .apply("default", &fleet("good", "  replicas: 1\n"))
        .expect("applied");
    cluster
        .apply("default", &fleet("taken", "  replicas: 1\n"))
        .expect("applied");
    wait_condition(cluster, "default", "good", "Ready", "True", MINUTE);
    eventually("an event names the field", SOON, || {
        let events = cluster
            .kubectl(&["get", "events", "-o", "json"])
            .map_err(|error| error.to_string())?;
        if events.contains("SpecNotUnderstood") && events.contains("spec.model.source: ") {
            Ok(())
        } else {
            Err(operator.log())
        }
    });
    let why = wait_condition(cluster, "default", "bad", "Valid", "False", SOON);
    assert!(why.starts_with("spec.model.source: "), "{why}");
    // It is told once.
    let version = |cluster: &e2e::Cluster| {
        let bad = cluster.get("default", "mdep", "bad").expect("an answer");
        bad.expect("there")["metadata"]["resourceVersion"].clone()
    };
    let told = version(cluster);
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(version(cluster), told, "it is written again and again");
    let why = wait_condition(cluster, "default", "taken", "Planned", "False", SOON);
    assert!(why.contains("belongs to someone else"), "{why}");
    let service = cluster
        .get("default", "service", "taken")
        .expect("an answer")
        .expect("there");
    assert!(
        service["metadata"]["ownerReferences"].is_null(),
        "somebody's Service was taken over: {service}"
    );
    cluster
        .kubectl(&["delete", "mdep", "bad"])
        .expect("deleted");
}

/// Name, uid and owner of each child.
fn owners(cluster: &e2e::Cluster, name: &str) -> Vec<(String, String, String)> {
    let selector = format!("cachalot.dev/model-deployment={name}");
    let kinds = ["pods", "services", "configmaps", "poddisruptionbudgets"];
    let objects = kinds.iter().flat_map(|kind| {
        let all = cluster.list("default", kind, &selector).expect("a list");
        all.into_iter()
            .map(move |object| (kind.to_string(), object))
    });
    let mut owners: Vec<_> = objects
        .map(|(kind, object)| {
            let text = |value: &serde_json::Value| value.as_str().unwrap_or("none").to_owned();
            let metadata = &object["metadata"];
            (
                format!("{kind}/{}", text(&metadata["name"])),
                text(&metadata["uid"]),
                text(&metadata["ownerReferences"][0]["uid"]),
            )
        })
        .collect();
    owners.sort();
    owners
}

#[test]
fn what_an_orphaning_deletion_left_behind_is_adopted_and_goes_with_its_new_owner() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    stand.simulate("gpu", 2);
    let operator = stand.operator("only", &[]);
    operator.wait_leading();
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    let manifest = fleet("r1", "  replicas: 2\n");
    cluster.apply("default", &manifest).expect("applied");
    wait_condition(cluster, "default", "r1", "Ready", "True", MINUTE);
    let before = owners(cluster, "r1");
    assert!(before.len() >= 5, "{before:?}");
    cluster
        .kubectl(&["delete", "mdep", "r1", "--cascade=orphan"])
        .expect("deleted");
    eventually("nothing controls the children", MINUTE, || {
        let left = owners(cluster, "r1");
        let are_left = left.iter().all(|(.., owner)| owner == "none");
        match are_left && left.len() == before.len() {
            true => Ok(()),
            false => Err(format!("{left:?}")),
        }
    });
    cluster.apply("default", &manifest).expect("applied again");
    wait_condition(cluster, "default", "r1", "Ready", "True", MINUTE);
    let mdep = cluster.get("default", "mdep", "r1").expect("an answer");
    let uid = mdep.expect("there")["metadata"]["uid"].clone();
    eventually("all is adopted as it is", SOON, || {
        let now = owners(cluster, "r1");
        let same = |(one, other): (&(String, String, String), &(String, String, String))| {
            one.0 == other.0 && one.1 == other.1 && Some(other.2.as_str()) == uid.as_str()
        };
        match now.len() == before.len() && before.iter().zip(&now).all(same) {
            true => Ok(()),
            false => Err(format!("{before:?} became {now:?}, owner {uid}")),
        }
    });
    assert_eq!(
        operator.metric("cachalot_operator_reconcile_errors_total{category=\"forbidden\"}"),
        Some(0.0),
        "{}",
        operator.log()
    );
    cluster
        .kubectl(&["delete", "mdep", "r1", "--wait=false"])
        .expect("deleted");
    eventually("nothing is left", MINUTE, || {
        let left = children(cluster, "default", "r1");
        match left.is_empty() {
            true => Ok(()),
            false => Err(format!("{left:?}")),
        }
    });
}
