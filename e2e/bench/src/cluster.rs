//! S1: one model with many replicas, created on a real API server with simulated nodes; beside it a bare client that
//! creates the same pods as fast as the API server takes them, which is the limit of any operator.
//!
//! The same control plane serves both, one after the other, in each run; the pods are those of the operator's plan.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use e2e::{Cluster, Lab};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use operator_k8s::Client;

use crate::planning;
use bench_report::{Row, median};

/// Creates under way at once by the bare client; other numbers were not measured.
const CONCURRENCY: usize = 64;
/// How long one run may take.
const RUN_MAX: Duration = Duration::from_secs(600);
/// Name of the ModelDeployment.
const NAME: &str = "fleet";

/// What to measure.
pub struct Bench {
    /// Replicas.
    pub replicas: u32,
    /// Nodes.
    pub nodes: u32,
    /// Runs.
    pub runs: usize,
    /// The operator's binary.
    pub operator: Option<PathBuf>,
}

/// One run of the operator.
struct Run {
    pods_per_second: f64,
    resident_megabytes: f64,
    writes_per_pod: f64,
}

impl Bench {
    /// The rows of the cluster part.
    pub async fn rows(&self) -> Result<Vec<Row>> {
        let binary = match &self.operator {
            Some(given) => given.clone(),
            None => newest_operator()?,
        };
        let lab = Lab::start()?;
        let cluster = lab.cluster();
        prepare(&lab, &cluster, self.nodes)?;
        let (client, _) =
            operator_k8s::client::connect_as(Some(cluster.kubeconfig()), None).await?;
        let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
        let folder = tempfile::tempdir()?;
        let mut bare = Vec::new();
        let mut runs = Vec::new();
        for run in 0..self.runs {
            let log = folder.path().join(format!("operator-{run}.log"));
            let operated = self
                .operate(&binary, &cluster, &client, &pods, &log)
                .await?;
            let templates = templates(&pods).await?;
            self.clear(&cluster, &pods).await?;
            let rate = self.create_bare(&pods, templates).await?;
            self.clear(&cluster, &pods).await?;
            println!(
                "run {run}: operator {:.0} pods/s, bare client {rate:.0} pods/s",
                operated.pods_per_second
            );
            bare.push(rate);
            runs.push(operated);
        }
        let column = |of: fn(&Run) -> f64| median(runs.iter().map(of).collect());
        let replicas = self.replicas;
        Ok(vec![
            Row::against(
                &format!(
                    "S1: 1 model x {replicas} replicas, pods created per second, beside a bare client"
                ),
                column(|run| run.pods_per_second),
                "pods/s",
                median(bare),
                Some(0.9),
            ),
            Row::below(
                &format!("S1: operator's memory with {replicas} pods"),
                column(|run| run.resident_megabytes),
                "MB",
                40.0,
            ),
            Row::below(
                "S1: API writes of the operator per pod created",
                column(|run| run.writes_per_pod),
                "writes",
                1.2,
            ),
        ])
    }

    /// Creates the fleet with the operator, which starts and stops with the run.
    async fn operate(
        &self,
        binary: &Path,
        cluster: &Cluster,
        client: &Client,
        pods: &Api<Pod>,
        log: &Path,
    ) -> Result<Run> {
        let operator = Operator::start(binary, cluster, log)?;
        operator.wait_leading().await?;
        let wishes: Api<operator_api::ModelDeployment> = Api::namespaced(client.clone(), "default");
        let mut wish = planning::deployment(NAME, self.replicas)?;
        wish.metadata.uid = None;
        wish.metadata.generation = None;
        let start = Instant::now();
        wishes.create(&PostParams::default(), &wish).await?;
        self.wait_count(pods, self.replicas).await?;
        let span = start.elapsed();
        // Status and budget may still be on their way.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let metrics = operator.metrics()?;
        let writes = metrics
            .lines()
            .filter(|line| line.starts_with("cachalot_operator_actions_total{"))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum::<f64>();
        let resident = metrics
            .lines()
            .find_map(|line| line.strip_prefix("process_resident_memory_bytes "))
            .and_then(|value| value.parse::<f64>().ok())
            .context("the operator does not say how much memory it takes")?;
        let replicas = f64::from(self.replicas);
        Ok(Run {
            pods_per_second: replicas / span.as_secs_f64(),
            resident_megabytes: resident / 1e6,
            writes_per_pod: writes / replicas,
        })
    }

    /// Creates the same pods with nothing but a client; pods per second.
    async fn create_bare(&self, pods: &Api<Pod>, templates: Vec<Pod>) -> Result<f64> {
        let start = Instant::now();
        let mut calls = futures::stream::iter(templates)
            .map(|pod| async move { pods.create(&PostParams::default(), &pod).await })
            .buffer_unordered(CONCURRENCY);
        while let Some(created) = calls.next().await {
            created?;
        }
        Ok(f64::from(self.replicas) / start.elapsed().as_secs_f64())
    }

    async fn wait_count(&self, pods: &Api<Pod>, wanted: u32) -> Result<()> {
        let start = Instant::now();
        loop {
            let there = count(pods).await?;
            if there >= usize::try_from(wanted)? {
                return Ok(());
            }
            if start.elapsed() > RUN_MAX {
                bail!("{there} of {wanted} pods after {RUN_MAX:?}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Removes the fleet, whoever made it.
    async fn clear(&self, cluster: &Cluster, pods: &Api<Pod>) -> Result<()> {
        cluster.kubectl(&["delete", "mdep", NAME, "--ignore-not-found", "--wait=false"])?;
        let at_once = DeleteParams::default().grace_period(0);
        let start = Instant::now();
        loop {
            let left = count(pods).await?;
            if left == 0 {
                return Ok(());
            }
            if start.elapsed() > RUN_MAX {
                bail!("{left} pods are still there after {RUN_MAX:?}");
            }
            pods.delete_collection(&at_once, &ListParams::default())
                .await?;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
}

/// How many pods there are: the first of them, and how many the API server says remain.
async fn count(pods: &Api<Pod>) -> Result<usize> {
    let page = pods.list_metadata(&ListParams::default().limit(1)).await?;
    let more = page.metadata.remaining_item_count.unwrap_or(0);
    Ok(page.items.len() + usize::try_from(more)?)
}

/// The pods that are there, as they were created: without what the cluster added, and owned by nobody.
async fn templates(pods: &Api<Pod>) -> Result<Vec<Pod>> {
    let list = pods.list(&ListParams::default()).await?;
    Ok(list
        .items
        .into_iter()
        .map(|mut pod| {
            pod.metadata.uid = None;
            pod.metadata.resource_version = None;
            pod.metadata.creation_timestamp = None;
            pod.metadata.managed_fields = None;
            pod.metadata.owner_references = None;
            pod.status = None;
            if let Some(spec) = &mut pod.spec {
                spec.node_name = None;
            }
            pod
        })
        .collect())
}

fn prepare(lab: &Lab, cluster: &Cluster, nodes: u32) -> Result<()> {
    let crd = e2e::root().join("crds/modeldeployments.cachalot.dev.yaml");
    let crd = crd.to_string_lossy().into_owned();
    cluster.kubectl(&["apply", "--server-side", "-f", &crd])?;
    let name = "crd/modeldeployments.cachalot.dev";
    cluster.kubectl(&["wait", "--for=condition=Established", name, "--timeout=30s"])?;
    let config = serde_json::to_string(&planning::config()?)?;
    let typed = config.replacen('{', "{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",", 1);
    cluster.apply("default", &typed)?;
    let count = nodes.to_string();
    let mut arguments = vec!["simulate", "--prefix", "gpu", "--count", &count];
    arguments.extend([
        "--gpus",
        "8",
        "--product",
        "NVIDIA-H200",
        "--memory-mib",
        "143771",
    ]);
    lab.kubelab(&arguments)?;
    let start = Instant::now();
    loop {
        let all = cluster.list("", "nodes", "type=kwok")?;
        let is_ready = |node: &&serde_json::Value| {
            e2e::cluster::condition(node, "Ready").is_some_and(|(status, ..)| status == "True")
        };
        if all.iter().filter(is_ready).count() >= usize::try_from(nodes)? {
            return Ok(());
        }
        if start.elapsed() > RUN_MAX {
            bail!("the simulated nodes are not ready after {RUN_MAX:?}");
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn newest_operator() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| e2e::root().join("target"), PathBuf::from);
    let built = target.join("release/operator");
    if built.is_file() {
        return Ok(built);
    }
    bail!(
        "{}: build it with cargo build --release -p operator, or give --operator",
        built.display()
    )
}

/// A running operator; stopped when dropped.
struct Operator {
    child: Child,
    log: PathBuf,
}

impl Operator {
    fn start(binary: &Path, cluster: &Cluster, log: &Path) -> Result<Self> {
        let child = Command::new(binary)
            .args(["run", "--engine-image=localhost/cachalot-engine:dev"])
            .args([
                "--bind=127.0.0.1:0",
                "--leader-elect=false",
                "--scrape-timeout=200ms",
            ])
            .env("KUBECONFIG", cluster.kubeconfig())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(log)?)
            .spawn()
            .with_context(|| binary.display().to_string())?;
        Ok(Self {
            child,
            log: log.to_path_buf(),
        })
    }

    fn text(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    async fn wait_leading(&self) -> Result<()> {
        let start = Instant::now();
        while !self.text().contains("leading") {
            if start.elapsed() > Duration::from_secs(60) {
                bail!("the operator does not lead: {}", self.text());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    fn metrics(&self) -> Result<String> {
        let text = self.text();
        let address = text
            .lines()
            .find(|line| line.contains("operator started"))
            .and_then(|line| line.split("127.0.0.1:").nth(1))
            .map(|rest| {
                rest.chars()
                    .take_while(char::is_ascii_digit)
                    .collect::<String>()
            })
            .context("the operator does not say where it listens")?;
        let mut answer = ureq::get(format!("http://127.0.0.1:{address}/metrics")).call()?;
        Ok(answer.body_mut().read_to_string()?)
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
