//! What the operator does on a real API server with simulated nodes, beside what bounds it.
//!
//! S1: one model with many replicas; a bare client then creates the same pods as fast as the API server takes them, which
//! is the limit of any operator. S6: a restart over a fleet that is as it should be. S7: the operator while nothing
//! changes, and while pods are deleted. S8: many models at once. The same control plane serves all, one after the other, in each run.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::ValueEnum;
use e2e::{Cluster, Lab};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, PostParams};
use operator_api::ModelDeployment;
use operator_k8s::Client;

use crate::churn::{self, Churn};
use crate::clocks::{self, Clocks};
use crate::objects::{
    WAIT_MAX, api, clear, clear_pods, create_all, say, templates, wait_for, wait_pods,
};
use crate::operator::{self, Operator, newest_operator};
use crate::planning::{self, Shape};
use crate::rivals::Rival;
use crate::runs::Runs;
use crate::writes::{Audit, kubeconfig_of};
use crate::{beside, large, rival_stories, stories};
use bench_report::{Figure, Row};

/// ModelDeployments of S8, which tells the story of a fleet of many models. Each takes a node; there are fewer where there
/// are fewer nodes.
const MODELS: u32 = 300;
/// How long simulated nodes need to report a thousand pods. It need not be all of them ready: on a busy machine simulated
/// nodes miss heartbeats, and the pods on them are then reported not ready for good.
const SETTLE: Duration = Duration::from_secs(30);
/// How long the operator is watched while nothing changes.
const IDLE: Duration = Duration::from_secs(10);
/// How long after a fleet is ready its last writes may come.
pub const LAST_WRITES: Duration = Duration::from_secs(2);
/// In whose name the bare client comes to the API server.
const BARE: &str = "bench-bare";
/// How long a restarted operator may take.
const RESTART_MAX: Duration = Duration::from_secs(60);
const ACTIONS: &str = "cachalot_operator_actions_total";
const PASSES: &str = "cachalot_operator_reconcile_total";
/// Name of the ModelDeployment.
const NAME: &str = "fleet";

/// A part of what is measured on the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// One model with many replicas, restart, idle share, many models (S1, S6 to S8).
    Create,
    /// Other projects' controllers, those that are given, at their defaults and tuned (S1).
    Rivals,
    /// The same, tuned: many models, scaling, a burst of models (S2, S3, S8).
    RivalStories,
    /// Fleets over time (S2 to S5).
    Stories,
    /// Ten thousand pods (S6, S7).
    Large,
}

/// What to measure.
pub struct Bench {
    /// Replicas.
    pub replicas: u32,
    /// Nodes.
    pub nodes: u32,
    /// Runs of each part.
    pub runs: Runs,
    /// The large fleet.
    pub large: large::Size,
    /// What of the cluster part is measured.
    pub parts: Vec<Part>,
    /// The operator's binary.
    pub operator: Option<PathBuf>,
    /// Who it is held against.
    pub rivals: Vec<Rival>,
}

/// One run of the operator.
struct Run {
    clocks: Clocks,
    bare: Bare,
    resident_megabytes: f64,
    writes_per_pod: f64,
    /// Processor time until all are ready, the operator's start included.
    millis_per_pod: f64,
    /// Of one core, while nothing changes.
    idle_percent: f64,
    churn: Churn,
    /// From the start of the process to its first look that changes nothing.
    restart_seconds: f64,
    /// Until all of many ModelDeployments are Planned, and until all their pods exist.
    many_seconds: (f64, f64),
}

/// What a bare client did.
#[derive(Clone, Copy, Debug)]
pub struct Bare {
    /// Its clocks; ready is when all its pods run.
    pub clocks: Clocks,
    /// Its writes for each pod.
    pub writes_per_pod: f64,
}

/// Where it is measured.
pub struct Place<'a> {
    /// The operator's binary.
    pub binary: &'a Path,
    /// The control plane.
    pub cluster: &'a Cluster,
    /// A client of it.
    pub client: &'a Client,
    /// What everybody writes there.
    pub audit: &'a Audit,
    /// Where the operator logs.
    pub log: &'a Path,
    /// Where files may lie.
    pub folder: &'a Path,
}

impl Place<'_> {
    /// A kubeconfig with which somebody's writes can be told from those of others.
    pub fn kubeconfig(&self, user: &str) -> Result<PathBuf> {
        kubeconfig_of(self.cluster.kubeconfig(), user, self.folder)
    }
}

/// What was measured.
#[derive(Default)]
pub struct Found {
    /// The rows.
    pub rows: Vec<Row>,
    /// The parts that failed with why: what the others measured is worth keeping.
    pub failed: Vec<String>,
    /// How long each part took.
    pub times: Vec<String>,
}

/// KWOK has to be heard of each node in time while it makes thousands of pods ready on two processors; stories in which nodes
/// fall silent say so in their status.
const NODE_GRACE: &str = "--node-grace=5m";

impl Bench {
    /// The cluster part.
    pub async fn rows(&self) -> Result<Found> {
        let binary = match &self.operator {
            Some(given) => given.clone(),
            None => newest_operator()?,
        };
        let lab = Lab::start_with(&["--audit", NODE_GRACE])?;
        let cluster = lab.cluster();
        prepare(&lab, &cluster, self.nodes)?;
        let (client, _) =
            operator_k8s::client::connect_as(Some(cluster.kubeconfig()), None).await?;
        let audit = Audit::new(lab.audit_log());
        let folder = tempfile::tempdir()?;
        let mut all = Found::default();
        for part in &self.parts {
            let log = folder.path().join(format!("operator-{part:?}.log"));
            let place = Place {
                binary: &binary,
                cluster: &cluster,
                client: &client,
                audit: &audit,
                log: &log,
                folder: folder.path(),
            };
            let (runs, begin) = (self.runs.of(*part), Instant::now());
            say(format!("part {part:?} begins; runs: {runs}"));
            let found = match part {
                Part::Create => self.create(&place, runs).await,
                Part::Rivals => beside::rows(&place, &self.rivals, self.replicas, runs).await,
                Part::RivalStories => {
                    rival_stories::rows(&place, &self.rivals, self.replicas, runs).await
                }
                Part::Stories => stories::rows(&place, runs).await,
                Part::Large => large::rows(&place, self.large, runs).await,
            };
            let took = format!("{part:?} {:.1} min", begin.elapsed().as_secs_f64() / 60.0);
            say(format!("part {took}"));
            all.times.push(took);
            match found {
                Ok(found) => all.rows.extend(found),
                Err(why) => {
                    eprintln!("{part:?} failed: {why:#}");
                    all.failed.push(format!("{part:?}: {why:#}"));
                    clear(&cluster, &client).await?;
                }
            }
        }
        Ok(all)
    }

    /// S1 and S6 to S8, the operator beside a bare client.
    async fn create(&self, place: &Place<'_>, number: usize) -> Result<Vec<Row>> {
        let mut runs = Vec::new();
        for run in 0..number {
            let measured = self.run(place).await?;
            println!(
                "run {run}: operator {:.0} pods/s, bare client {:.0} pods/s, restart {:.2} s, {} models {:.1} s, \
                 their pods {:.1} s, {:.0} MB, {:.2} writes and {:.2} ms per pod, idle {:.1} %",
                measured.clocks.pods_per_second,
                measured.bare.clocks.pods_per_second,
                measured.restart_seconds,
                self.models(),
                measured.many_seconds.0,
                measured.many_seconds.1,
                measured.resident_megabytes,
                measured.writes_per_pod,
                measured.millis_per_pod,
                measured.idle_percent,
            );
            runs.push(measured);
        }
        Ok(self.table(&runs))
    }

    fn models(&self) -> u32 {
        MODELS.min(self.nodes)
    }

    fn table(&self, runs: &[Run]) -> Vec<Row> {
        let column = |of: fn(&Run) -> f64| runs.iter().map(of).collect::<Figure>();
        // Who does not get there in time fails.
        let clock = |of: fn(&Run) -> Option<f64>| runs.iter().filter_map(of).collect::<Figure>();
        let (replicas, models) = (self.replicas, self.models());
        let model = format!("S1: 1 model x {replicas} replicas");
        let deleted = churn::rate(replicas);
        let seconds = churn::TIME.as_secs();
        vec![
            Row::against(
                &format!("{model}, pods created per second, beside a bare client"),
                column(|run| run.clocks.pods_per_second),
                "pods/s",
                column(|run| run.bare.clocks.pods_per_second),
                Some(0.9),
            ),
            Row::against(
                &format!("{model}, until the last is bound, beside a bare client's pods"),
                clock(|run| run.clocks.bound),
                "s",
                clock(|run| run.bare.clocks.bound),
                None,
            ),
            Row::against(
                &format!(
                    "{model}, until its status says ready, beside a bare client's pods running"
                ),
                clock(|run| run.clocks.ready),
                "s",
                clock(|run| run.bare.clocks.ready),
                None,
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
                "S1: API writes of the bare client per pod created",
                column(|run| run.bare.writes_per_pod),
                "writes",
            ),
            Row::plain(
                "S1: operator's processor time per pod until all are ready, its start included",
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
            Row::plain(
                &format!(
                    "S7: operator's share of a core with {replicas} pods while {deleted} a second are deleted for {seconds} s"
                ),
                column(|run| run.churn.percent),
                "%",
            ),
            Row::plain(
                &format!(
                    "S7: from the last of these deletions until {replicas} pods are ready again"
                ),
                column(|run| run.churn.back_seconds),
                "s",
            ),
            Row::below(
                &format!("S8: {models} ModelDeployments applied at once, until all are Planned"),
                column(|run| run.many_seconds.0),
                "s",
                5.0,
            ),
            Row::plain(
                &format!("S8: {models} ModelDeployments applied at once, until all pods exist"),
                column(|run| run.many_seconds.1),
                "s",
            ),
        ]
    }

    /// Everything once; the control plane is left empty.
    async fn run(&self, place: &Place<'_>) -> Result<Run> {
        let Place {
            cluster, client, ..
        } = place;
        let replicas = f64::from(self.replicas);
        let operator = Operator::start(place)?;
        operator.wait_leading().await?;
        let mark = place.audit.mark()?;
        let clocks = self.create_operated(place).await?;
        let used_seconds = operator.processor_seconds()?;
        // Status and budget may still be on their way.
        tokio::time::sleep(LAST_WRITES).await;
        let writes = place.audit.since(mark, operator::USER)?;
        say(format!("S1: {clocks:.1?}; {writes}"));
        let resident_megabytes = Operator::resident_megabytes(&operator.metrics()?)?;
        let idle_percent = idle(&operator).await?;
        let churn = churn::churn(place, &operator, NAME, self.replicas).await?;
        drop(operator);
        let restart_seconds = restart(place, 1).await?.0;
        // The bare client creates the same pods, of the same owner, while no operator runs.
        let bare = create_bare(place).await?;
        clear(cluster, client).await?;
        let many_seconds = many(place, self.models()).await?;
        clear(cluster, client).await?;
        Ok(Run {
            clocks,
            bare,
            resident_megabytes,
            millis_per_pod: 1000.0 * used_seconds / replicas,
            idle_percent,
            churn,
            restart_seconds,
            many_seconds,
            writes_per_pod: writes.number() / replicas,
        })
    }

    /// Has the fleet created by the operator that runs.
    async fn create_operated(&self, place: &Place<'_>) -> Result<Clocks> {
        let wish = planning::wish(NAME, self.replicas, Shape::DeepSeekR1)?;
        let wishes: Api<ModelDeployment> = api(place.client);
        let start = Instant::now();
        wishes.create(&PostParams::default(), &wish).await?;
        let wanted = i32::try_from(self.replicas)?;
        let unready = || async {
            let wish = wishes.get(NAME).await?;
            Ok((!stories::is_at(&wish, wanted)).then(|| "its status does not say ready".into()))
        };
        let time = (start, WAIT_MAX);
        let clocks = clocks::watch(&api(place.client), self.replicas, time, unready).await?;
        all_stopped(clocks)
    }
}

/// Clocks that all have stopped.
fn all_stopped(clocks: Clocks) -> Result<Clocks> {
    if clocks.ready.is_none() {
        bail!("the pods are not all ready after {WAIT_MAX:?}: {clocks:.1?}");
    }
    Ok(clocks)
}

/// Creates the pods that are there once more, with nothing but a client and while no operator runs, by the same clocks as
/// the operator's.
pub async fn create_bare(place: &Place<'_>) -> Result<Bare> {
    let pods: Api<Pod> = api(place.client);
    let templates = templates(&pods).await?;
    clear_pods(place.client).await?;
    let wanted = u32::try_from(templates.len())?;
    let access = place.kubeconfig(BARE)?;
    let (client, _) = operator_k8s::client::connect_as(Some(&access), None).await?;
    let mark = place.audit.mark()?;
    let start = Instant::now();
    let (own, running) = (api(&client), || clocks::not_running(&pods));
    let ((), clocks) = tokio::try_join!(
        create_all(&own, templates),
        clocks::watch(&pods, wanted, (start, WAIT_MAX), running)
    )?;
    let writes = place.audit.since(mark, BARE)?;
    say(format!("bare client: {clocks:.1?}; {writes}"));
    Ok(Bare {
        clocks: all_stopped(clocks)?,
        writes_per_pod: writes.number() / f64::from(wanted),
    })
}

/// The operator's share of a core, in percent, once the fleet has settled.
pub async fn idle(operator: &Operator) -> Result<f64> {
    tokio::time::sleep(SETTLE).await;
    let before = operator.processor_seconds()?;
    let begin = Instant::now();
    tokio::time::sleep(IDLE).await;
    let used = operator.processor_seconds()? - before;
    Ok(100.0 * used / begin.elapsed().as_secs_f64())
}

/// Creates many ModelDeployments of one replica; seconds until all of them have a plan, and until all pods exist.
async fn many(place: &Place<'_>, number: u32) -> Result<(f64, f64)> {
    let operator = Operator::start(place)?;
    operator.wait_leading().await?;
    let wishes: Api<ModelDeployment> = api(place.client);
    let models = (0..number)
        .map(|index| planning::wish(&format!("{NAME}-{index}"), 1, Shape::DeepSeekR1))
        .collect::<Result<_>>()?;
    let start = Instant::now();
    create_all(&wishes, models).await?;
    let (wanted, pods) = (usize::try_from(number)?, api(place.client));
    tokio::try_join!(
        async {
            wait_planned(&wishes, wanted).await?;
            Ok(start.elapsed().as_secs_f64())
        },
        async {
            wait_pods(&pods, wanted).await?;
            Ok(start.elapsed().as_secs_f64())
        },
    )
}

/// Waits until so many ModelDeployments have a plan.
pub async fn wait_planned(wishes: &Api<ModelDeployment>, wanted: usize) -> Result<()> {
    // A list of a thousand takes the API server a quarter of a second.
    let period = match wanted > 500 {
        true => Duration::from_secs(3),
        false => Duration::from_millis(100),
    };
    wait_for(period, || async {
        let all = wishes.list(&ListParams::default()).await?;
        let planned = all.iter().filter(|wish| is_planned(wish)).count();
        Ok((planned < wanted).then(|| format!("{planned} of {wanted} are Planned")))
    })
    .await
}

fn is_planned(wish: &ModelDeployment) -> bool {
    let mut conditions = wish.status.iter().flat_map(|status| &status.conditions);
    conditions.any(|condition| condition.type_ == "Planned" && condition.status == "True")
}

/// Starts the operator over a fleet of `models` that is as it should be; seconds until its first look that changes
/// nothing, and until it has looked so often; with the operator. Looks that only wrote a status count: simulated nodes may
/// have reported something meanwhile.
pub async fn restart(place: &Place<'_>, models: u32) -> Result<(f64, f64, Operator)> {
    let start = Instant::now();
    let operator = Operator::start(place)?;
    let mut first = None;
    loop {
        // It may not listen yet.
        let metrics = operator.metrics().unwrap_or_default();
        let looks = |outcome: &str| {
            Operator::sum_where(&metrics, PASSES, &format!("outcome=\"{outcome}\""))
        };
        let (unchanged, elapsed) = (looks("unchanged"), start.elapsed());
        if unchanged >= 1.0 {
            first.get_or_insert(elapsed.as_secs_f64());
        }
        let reports = Operator::sum_where(&metrics, ACTIONS, "action=\"report\"");
        let actions = Operator::sum(&metrics, ACTIONS) - reports;
        if actions > 0.0 {
            let made = metrics.lines().filter(|line| line.starts_with(ACTIONS));
            let made: Vec<&str> = made.filter(|line| !line.ends_with(" 0")).collect();
            bail!(
                "the restarted operator made {actions} writes to a fleet that was as it should be: {}",
                made.join(", ")
            );
        }
        if unchanged + looks("applied") >= f64::from(models)
            && let Some(first) = first
        {
            return Ok((first, elapsed.as_secs_f64(), operator));
        }
        if elapsed > RESTART_MAX {
            bail!(
                "the restarted operator: {unchanged} of {models} looks changed nothing, {} wrote a status and {} failed in {RESTART_MAX:?}",
                looks("applied"),
                looks("failed"),
            );
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn prepare(lab: &Lab, cluster: &Cluster, nodes: u32) -> Result<()> {
    let crd = e2e::root().join("crds/modeldeployments.cachalot.dev.yaml");
    let crd = crd.to_string_lossy().into_owned();
    cluster.kubectl(&["apply", "--server-side", "-f", &crd])?;
    let name = "crd/modeldeployments.cachalot.dev";
    cluster.kubectl(&["wait", "--for=condition=Established", name, "--timeout=30s"])?;
    for shape in [Shape::DeepSeekR1, Shape::Small] {
        let config = serde_json::to_string(&shape.config()?)?;
        let typed = config.replacen('{', "{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",", 1);
        cluster.apply("default", &typed)?;
    }
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
        if start.elapsed() > WAIT_MAX {
            bail!("the simulated nodes are not ready after {WAIT_MAX:?}");
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}
