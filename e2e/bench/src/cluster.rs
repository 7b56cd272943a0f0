//! S1: one model with many replicas, created on a real API server with simulated nodes; beside it a bare client that
//! creates the same pods as fast as the API server takes them, which is the limit of any operator.
//!
//! The same control plane serves both, one after the other, in each run; the pods are those of the operator's plan.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use e2e::{Cluster, Lab};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use operator_api::ModelDeployment;
use operator_k8s::Client;

use crate::operator::{Operator, newest_operator};
use crate::planning;
use bench_report::{Row, median};

/// ModelDeployments of S8, which tells the story of a fleet of many models.
const MODELS: u32 = 300;
/// Creates under way at once by the bare client; other numbers were not measured.
const CONCURRENCY: usize = 64;
/// How long one run may take.
const RUN_MAX: Duration = Duration::from_secs(600);
/// How long simulated nodes need to report a thousand pods. It need not be all of them ready: on a busy machine simulated
/// nodes miss heartbeats, and the pods on them are then reported not ready for good.
const SETTLE: Duration = Duration::from_secs(30);
/// How long the operator is watched while nothing changes.
const IDLE: Duration = Duration::from_secs(10);
const ACTIONS: &str = "cachalot_operator_actions_total";
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
    /// Processor time, the operator's start included.
    millis_per_pod: f64,
    /// Of one core, while nothing changes.
    idle_percent: f64,
    /// From the start of the process to its first look at everything, which changes nothing.
    restart_seconds: f64,
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
        let mut many = Vec::new();
        for run in 0..self.runs {
            let log = folder.path().join(format!("operator-{run}.log"));
            let operated = self
                .operate(&binary, &cluster, &client, &pods, &log)
                .await?;
            let templates = templates(&pods).await?;
            self.clear(&cluster, &pods).await?;
            let rate = self.create_bare(&pods, templates).await?;
            self.clear(&cluster, &pods).await?;
            many.push(self.many(&binary, &cluster, &client, &log).await?);
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
            Row::plain(
                "S1: operator's processor time per pod created, its start included",
                column(|run| run.millis_per_pod),
                "ms",
            ),
            Row::below(
                &format!("S6: restart with {replicas} pods to the first look that changes nothing"),
                column(|run| run.restart_seconds),
                "s",
                3.0,
            ),
            Row::below(
                &format!(
                    "S7: operator's share of a core with {replicas} pods while nothing changes"
                ),
                column(|run| run.idle_percent),
                "%",
                1.0,
            ),
            Row::below(
                &format!("S8: {MODELS} ModelDeployments applied at once, until all are Planned"),
                median(many),
                "s",
                5.0,
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
        let wishes: Api<ModelDeployment> = Api::namespaced(client.clone(), "default");
        let mut wish = planning::deployment(NAME, self.replicas)?;
        wish.metadata.uid = None;
        wish.metadata.generation = None;
        let start = Instant::now();
        wishes.create(&PostParams::default(), &wish).await?;
        self.wait_count(pods, self.replicas).await?;
        let span = start.elapsed();
        let used_seconds = operator.processor_seconds()?;
        // Status and budget may still be on their way.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let metrics = operator.metrics()?;
        let writes = Operator::sum(&metrics, ACTIONS);
        let resident_megabytes = Operator::resident_megabytes(&metrics)?;
        tokio::time::sleep(SETTLE).await;
        let before = operator.processor_seconds()?;
        let begin = Instant::now();
        tokio::time::sleep(IDLE).await;
        let used = operator.processor_seconds()? - before;
        let idle_percent = 100.0 * used / begin.elapsed().as_secs_f64();
        drop(operator);
        let restart_seconds = restart(binary, cluster, log).await?;
        let replicas = f64::from(self.replicas);
        Ok(Run {
            pods_per_second: replicas / span.as_secs_f64(),
            resident_megabytes,
            millis_per_pod: 1000.0 * used_seconds / replicas,
            idle_percent,
            restart_seconds,
            writes_per_pod: writes / replicas,
        })
    }

    /// Creates many ModelDeployments of one replica; seconds until all of them have a plan.
    async fn many(
        &self,
        binary: &Path,
        cluster: &Cluster,
        client: &Client,
        log: &Path,
    ) -> Result<f64> {
        let operator = Operator::start(binary, cluster, log)?;
        operator.wait_leading().await?;
        let wishes: Api<ModelDeployment> = Api::namespaced(client.clone(), "default");
        let mut models = Vec::new();
        for index in 0..MODELS {
            let mut wish = planning::deployment(&format!("{NAME}-{index}"), 1)?;
            wish.metadata.uid = None;
            wish.metadata.generation = None;
            models.push(wish);
        }
        let start = Instant::now();
        let wishes = &wishes;
        let mut calls = futures::stream::iter(models)
            .map(|wish| async move { wishes.create(&PostParams::default(), &wish).await })
            .buffer_unordered(CONCURRENCY);
        while let Some(created) = calls.next().await {
            created?;
        }
        loop {
            let all = wishes.list(&ListParams::default()).await?;
            let planned = all.iter().filter(|wish| is_planned(wish)).count();
            if planned >= usize::try_from(MODELS)? {
                return Ok(start.elapsed().as_secs_f64());
            }
            if start.elapsed() > RUN_MAX {
                bail!("{planned} of {MODELS} are Planned after {RUN_MAX:?}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
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
        cluster.kubectl(&["delete", "mdep", "--all", "--wait=false"])?;
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

fn is_planned(wish: &ModelDeployment) -> bool {
    let mut conditions = wish.status.iter().flat_map(|status| &status.conditions);
    conditions.any(|condition| condition.type_ == "Planned" && condition.status == "True")
}

/// Starts the operator over a fleet that is as it should be; seconds until it has looked at all of it.
async fn restart(binary: &Path, cluster: &Cluster, log: &Path) -> Result<f64> {
    let start = Instant::now();
    let operator = Operator::start(binary, cluster, log)?;
    loop {
        // It may not listen yet.
        let metrics = operator.metrics().unwrap_or_default();
        if Operator::sum(&metrics, "cachalot_operator_reconcile_total") >= 1.0 {
            break;
        }
        if start.elapsed() > RUN_MAX {
            bail!("the restarted operator looked at nothing in {RUN_MAX:?}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let seconds = start.elapsed().as_secs_f64();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let actions = Operator::sum(&operator.metrics()?, ACTIONS);
    if actions > 0.0 {
        bail!("the restarted operator made {actions} writes to a fleet that was as it should be");
    }
    Ok(seconds)
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
