//! Autoscaling by what a Prometheus server says: the operator asks its query API over the wire, moves replicas up and
//! down within the range, and keeps the number when the server is gone.
#![cfg(feature = "lab")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use e2e::eventually;

mod control_plane;
use control_plane::{Stand, config_of_r1, fleet};

/// Speaks just the instant queries of the HTTP API, with one number for requests that wait. Negative: it fails.
fn prometheus(waiting: Arc<AtomicI64>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let waiting = Arc::clone(&waiting);
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                while let Ok(length) = stream.read(&mut request) {
                    if length == 0 {
                        return;
                    }
                    let asked = String::from_utf8_lossy(&request[..length]).into_owned();
                    let answer = answer(&asked, waiting.load(Ordering::Relaxed));
                    if stream.write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    format!("http://{address}")
}

fn answer(asked: &str, waiting: i64) -> String {
    assert!(asked.starts_with("GET /api/v1/query?query="), "{asked}");
    let (status, body) = match (
        waiting,
        asked.contains("num_requests_waiting"),
        asked.contains("kv_cache_usage_perc"),
    ) {
        (..0, _, _) => ("503 Service Unavailable", "down".to_string()),
        (_, true, _) => ("200 OK", sample(&waiting.to_string())),
        (_, _, true) => ("200 OK", sample("0.1")),
        _ => (
            "400 Bad Request",
            r#"{"status":"error","error":"unknown metric"}"#.to_string(),
        ),
    };
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn sample(value: &str) -> String {
    format!(
        r#"{{"status":"success","data":{{"resultType":"vector","result":[{{"metric":{{}},"value":[1700000000.0,"{value}"]}}]}}}}"#
    )
}

#[test]
fn replicas_follow_the_queue_that_prometheus_sees() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    stand.simulate("gpu", 3);
    let waiting = Arc::new(AtomicI64::new(0));
    let url = prometheus(Arc::clone(&waiting));
    let operator = stand.operator("only", &["--prometheus-url", &url, "--scrape-period=500ms"]);
    operator.wait_leading();
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    let spec = "  rollout: {drainTimeoutSeconds: 1}\n  autoscaling:\n    minReplicas: 1\n    maxReplicas: 3\n    targets: \
                {queuedRequestsPerReplica: 2}\n    stabilization: {scaleUpSeconds: 0, scaleDownSeconds: 2}\n";
    cluster
        .apply("default", &fleet("r1", spec))
        .expect("applied");
    let replicas = |number: usize| {
        eventually(
            &format!("{number} replicas"),
            Duration::from_secs(60),
            || {
                let pods = cluster
                    .engine_pods("default", "r1")
                    .map_err(|error| error.to_string())?;
                let mdep = cluster
                    .get("default", "mdep", "r1")
                    .map_err(|error| error.to_string())?
                    .ok_or("gone")?;
                if pods.len() == number && mdep["status"]["readyReplicas"] == number {
                    Ok(())
                } else {
                    Err(format!("{} pods, {}", pods.len(), mdep["status"]))
                }
            },
        );
    };
    replicas(1);
    waiting.store(50, Ordering::Relaxed);
    replicas(3);
    let mdep = cluster
        .get("default", "mdep", "r1")
        .expect("an answer")
        .expect("there");
    assert_eq!(
        mdep["status"]["autoscaling"]["desiredReplicas"], 3,
        "{}",
        mdep["status"]
    );

    // A server that fails says nothing about demand: the number stays.
    waiting.store(-1, Ordering::Relaxed);
    eventually("the failure is counted", Duration::from_secs(20), || {
        let failed = operator
            .metric("cachalot_operator_prometheus_queries_total{result=\"failed\"}")
            .unwrap_or(0.0);
        if failed >= 6.0 {
            Ok(())
        } else {
            Err(format!("{failed}"))
        }
    });
    replicas(3);

    waiting.store(0, Ordering::Relaxed);
    replicas(1);
}
