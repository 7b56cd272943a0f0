//! S6 and S7 at full size: a thousand ModelDeployments with ten thousand one-GPU pods, the operator's writes and memory
//! over them and its restart.
//!
//! They lie in twenty namespaces: in one, the controllers of budgets and endpoints walk a thousand of each for every
//! change of a pod, and it is those that are measured.

use std::time::{Duration, Instant};

use anyhow::Result;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ServiceAccount};
use kube::api::{Api, ListParams, ObjectMeta, Patch, PatchParams};
use operator_api::ModelDeployment;

use crate::cluster::{Place, idle, restart, wait_planned};
use crate::lists::{self, Told};
use crate::objects::{clear, create_all, say, wait_for, wait_pods};
use crate::operator::{self, Operator};
use crate::planning::{self, Shape};
use crate::stories::is_at;
use bench_report::{Figure, Row};

/// How long is waited once all are ready: what they say is told in statuses a little later.
const SETTLE: Duration = Duration::from_secs(60);
/// How long after a restart memory is read: the operator gives back what the first lists took within seconds.
const RELEASED: Duration = Duration::from_secs(20);
/// Namespaces over which the ModelDeployments are spread.
const NAMESPACES: u32 = 20;
/// Restarts over each fleet.
const RESTARTS: usize = 3;
/// How often it is looked whether a namespace can be used.
const LOOK: Duration = Duration::from_millis(200);
/// How often it is looked whether all are ready: a list of a thousand takes the API server a quarter of a second.
const LOOK_AT_ALL: Duration = Duration::from_secs(3);

/// How large the fleet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// ModelDeployments.
    pub models: u32,
    /// Replicas of each.
    pub replicas: u32,
}

/// One fleet.
struct Run {
    pods_per_second: f64,
    ready_seconds: f64,
    writes_per_pod: f64,
    megabytes: f64,
    peak_megabytes: f64,
    /// Of one core, while nothing changes.
    idle_percent: f64,
    restarts: Vec<Restart>,
}

struct Restart {
    lists: Told,
    first_seconds: f64,
    all_seconds: f64,
    megabytes: f64,
    peak_megabytes: f64,
}

/// Has the fleet created `runs` times and restarts the operator over each; the control plane is left without pods.
pub async fn rows(place: &Place<'_>, size: Size, runs: usize) -> Result<Vec<Row>> {
    let namespaces = NAMESPACES.min(size.models);
    prepare(place, namespaces).await?;
    let mut all = Vec::new();
    for _ in 0..runs {
        all.push(run(place, size, namespaces).await?);
        // What was measured counts however the rest goes, if nothing comes after it.
        if let Err(error) = clear(place.cluster, place.client).await {
            say(format!("S6: not everything could be removed: {error:#}"));
            break;
        }
    }
    Ok(table(size, namespaces, &all))
}

fn name(namespace: u32) -> String {
    format!("fleet-{namespace}")
}

/// Makes the namespaces with what their models need.
async fn prepare(place: &Place<'_>, namespaces: u32) -> Result<()> {
    let api: Api<Namespace> = Api::all(place.client.clone());
    let how = PatchParams::apply("bench-fleet");
    for index in 0..namespaces {
        let name = name(index);
        let metadata = ObjectMeta {
            name: Some(name.clone()),
            ..ObjectMeta::default()
        };
        let namespace = Namespace {
            metadata,
            ..Namespace::default()
        };
        api.patch(&name, &how, &Patch::Apply(&namespace)).await?;
        let mut config = Shape::Small.config()?;
        config.metadata.namespace = Some(name.clone());
        let configs: Api<ConfigMap> = Api::namespaced(place.client.clone(), &name);
        let of = config.metadata.name.clone().unwrap_or_default();
        configs.patch(&of, &how, &Patch::Apply(&config)).await?;
        // No pod can be made before it is there.
        let accounts: Api<ServiceAccount> = Api::namespaced(place.client.clone(), &name);
        wait_for(LOOK, || async {
            let account = accounts.get_opt("default").await?;
            Ok(account
                .is_none()
                .then(|| format!("{name} has no service account")))
        })
        .await?;
    }
    Ok(())
}

/// Applies the ModelDeployments, one namespace after the other.
async fn apply(place: &Place<'_>, size: Size, namespaces: u32) -> Result<()> {
    for namespace in 0..namespaces {
        let models = (0..size.models).filter(|index| index % namespaces == namespace);
        let wishes = models.map(|index| {
            let mut wish = planning::wish(&format!("m{index}"), size.replicas, Shape::Small)?;
            wish.metadata.namespace = Some(name(namespace));
            Ok(wish)
        });
        let wishes: Vec<ModelDeployment> = wishes.collect::<Result<_>>()?;
        let api = Api::namespaced(place.client.clone(), &name(namespace));
        create_all(&api, wishes).await?;
    }
    Ok(())
}

async fn run(place: &Place<'_>, size: Size, namespaces: u32) -> Result<Run> {
    let (models, total) = (size.models, size.models * size.replicas);
    let pods: Api<Pod> = Api::all(place.client.clone());
    let operator = Operator::start(place)?;
    operator.wait_leading().await?;
    say(format!("S6: {models} models and {total} pods are made"));
    let mark = place.audit.mark()?;
    let start = Instant::now();
    apply(place, size, namespaces).await?;
    wait_pods(&pods, usize::try_from(total)?).await?;
    let pods_per_second = f64::from(total) / start.elapsed().as_secs_f64();
    say(format!(
        "S6: {pods_per_second:.0} pods/s; simulated nodes report them, and statuses tell"
    ));
    let wishes: Api<ModelDeployment> = Api::all(place.client.clone());
    wait_planned(&wishes, usize::try_from(models)?).await?;
    wait_ready(&wishes, size).await?;
    let ready_seconds = start.elapsed().as_secs_f64();
    say(format!("S6: all are ready after {ready_seconds:.0} s"));
    tokio::time::sleep(SETTLE).await;
    let writes = place.audit.since(mark, operator::USER)?;
    let megabytes = Operator::resident_megabytes(&operator.metrics()?)?;
    let peak_megabytes = operator.peak_megabytes()?;
    say(format!(
        "S6: {megabytes:.0} MB, {peak_megabytes:.0} MB at the peak; {writes}; S7: nothing changes"
    ));
    let idle_percent = idle(&operator).await?;
    drop(operator);
    let mut restarts = Vec::new();
    for _ in 0..RESTARTS {
        restarts.push(restarted(place, models).await?);
    }
    Ok(Run {
        pods_per_second,
        ready_seconds,
        writes_per_pod: writes.number() / f64::from(total),
        megabytes,
        peak_megabytes,
        idle_percent,
        restarts,
    })
}

/// Waits until every ModelDeployment has all its replicas, and all of them answer.
async fn wait_ready(wishes: &Api<ModelDeployment>, size: Size) -> Result<()> {
    let (wanted, replicas) = (usize::try_from(size.models)?, i32::try_from(size.replicas)?);
    wait_for(LOOK_AT_ALL, || async {
        let all = wishes.list(&ListParams::default()).await?;
        let ready = all.iter().filter(|wish| is_at(wish, replicas)).count();
        Ok((ready < wanted).then(|| format!("{ready} of {wanted} have all their replicas ready")))
    })
    .await
}

async fn restarted(place: &Place<'_>, models: u32) -> Result<Restart> {
    let lists = lists::read(place.cluster.kubeconfig()).await?;
    say(format!(
        "S6: lists of {:.0} MB take {:.2} s by themselves; the operator is restarted",
        lists.megabytes, lists.seconds
    ));
    let (first_seconds, all_seconds, operator) = restart(place, models).await?;
    tokio::time::sleep(RELEASED).await;
    let megabytes = Operator::resident_megabytes(&operator.metrics()?)?;
    let peak_megabytes = operator.peak_megabytes()?;
    say(format!(
        "S6: first look after {first_seconds:.2} s, all after {all_seconds:.2} s, {megabytes:.0} MB, \
         {peak_megabytes:.0} MB at the peak"
    ));
    Ok(Restart {
        lists,
        first_seconds,
        all_seconds,
        megabytes,
        peak_megabytes,
    })
}

fn table(size: Size, namespaces: u32, runs: &[Run]) -> Vec<Row> {
    let made = |of: fn(&Run) -> f64| runs.iter().map(of).collect::<Figure>();
    let restarted = |of: fn(&Restart) -> f64| {
        let all = runs.iter().flat_map(|run| &run.restarts);
        all.map(of).collect::<Figure>()
    };
    let total = size.models * size.replicas;
    let of = format!("{} models and {total} pods", size.models);
    vec![
        Row::plain(
            &format!("S6: {of} in {namespaces} namespaces, created per second"),
            made(|run| run.pods_per_second),
            "pods/s",
        ),
        Row::plain(
            &format!("S6: {of} in {namespaces} namespaces, until all are ready"),
            made(|run| run.ready_seconds),
            "s",
        ),
        Row::below(
            &format!("S6: API writes of the operator per pod, {of}"),
            made(|run| run.writes_per_pod),
            "writes",
            1.2,
        ),
        Row::below(
            &format!("S6: operator's memory with {of}, which it made"),
            made(|run| run.megabytes),
            "MB",
            40.0,
        ),
        Row::below(
            &format!("S6: operator's memory with {of}, after a restart"),
            restarted(|restart| restart.megabytes),
            "MB",
            40.0,
        ),
        Row::plain(
            &format!("S6: operator's memory with {of} at its peak while it made them"),
            made(|run| run.peak_megabytes),
            "MB",
        ),
        Row::plain(
            &format!("S6: operator's memory with {of} at its peak after a restart"),
            restarted(|restart| restart.peak_megabytes),
            "MB",
        ),
        Row::below(
            &format!("S6: restart with {of} to the first look that changes nothing"),
            restarted(|restart| restart.first_seconds),
            "s",
            3.0,
        ),
        Row::against(
            "S6: the same, beside a client that only reads the lists",
            restarted(|restart| restart.first_seconds),
            "s",
            restarted(|restart| restart.lists.seconds),
            None,
        ),
        Row::plain(
            &format!("S6: lists that a restart with {of} reads"),
            restarted(|restart| restart.lists.megabytes),
            "MB",
        ),
        Row::plain(
            &format!("S6: restart with {of} until it looked at all"),
            restarted(|restart| restart.all_seconds),
            "s",
        ),
        Row::below(
            &format!("S7: operator's share of a core with {of} while nothing changes"),
            made(|run| run.idle_percent),
            "%",
            1.0,
        ),
    ]
}
