//! S2 to S5: fleets over time. Each span ends when the status of the ModelDeployments says so, which is what a user waits
//! for; S2 has a second clock that stops when the pods are there.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use operator_api::ModelDeployment;
use serde_json::{Value, json};

use crate::cluster::Place;
use crate::objects::{api, clear, create_all, say, wait_for, wait_pods};
use crate::operator::Operator;
use crate::planning::{self, Shape};
use bench_report::{Figure, Row};

/// ModelDeployments of S2, of two replicas each.
const PAIRS: u32 = 500;
/// Half of the largest number of replicas of S3.
const HALF: u32 = 500;
/// Replicas that S4 exchanges, and of whose nodes S5 takes a tenth away.
const EXCHANGED: u32 = 200;
/// Replicas beyond the wanted number while they are exchanged.
const SURGE: u32 = 50;
/// How often a status is read.
const LOOK: Duration = Duration::from_millis(100);
/// Set on a simulated node whose kubelet nobody plays any more.
const SILENT: &str = "kubelab/silent";

/// A span of a story and how many seconds it took.
type Span = (String, f64);

/// Tells the stories `runs` times; the control plane is left empty.
pub async fn rows(place: &Place<'_>, runs: usize) -> Result<Vec<Row>> {
    let mut told: Vec<Vec<Span>> = Vec::new();
    for run in 0..runs {
        let operator = Operator::start(place)?;
        operator.wait_leading().await?;
        let mut spans = pairs(place).await.context("S2")?;
        clear(place.cluster, place.client).await?;
        spans.extend(scale(place).await.context("S3")?);
        spans.push(exchange(place).await.context("S4")?);
        spans.push(silence(place).await.context("S5")?);
        drop(operator);
        clear(place.cluster, place.client).await?;
        for (span, seconds) in &spans {
            println!("run {run}: {span}: {seconds:.1} s");
        }
        told.push(spans);
    }
    let spans = told.first().map(Vec::as_slice).unwrap_or_default();
    let row = |(index, (span, _)): (usize, &Span)| {
        let seconds: Figure = told.iter().map(|spans| spans[index].1).collect();
        Row::plain(span, seconds, "s")
    };
    Ok(spans.iter().enumerate().map(row).collect())
}

/// Many models of two replicas each.
async fn pairs(place: &Place<'_>) -> Result<Vec<Span>> {
    let wishes: Api<ModelDeployment> = api(place.client);
    let models = (0..PAIRS)
        .map(|index| planning::wish(&format!("pair-{index}"), 2, Shape::Small))
        .collect::<Result<_>>()?;
    say(format!("S2: {PAIRS} models x 2 replicas are applied"));
    let start = Instant::now();
    create_all(&wishes, models).await?;
    wait_pods(&api(place.client), usize::try_from(2 * PAIRS)?).await?;
    let created = start.elapsed().as_secs_f64();
    wait_for(LOOK, || async {
        let all = wishes.list(&ListParams::default()).await?;
        let ready = all.iter().filter(|wish| is_at(wish, 2)).count();
        Ok((ready < usize::try_from(PAIRS)?).then(|| format!("{ready} of {PAIRS} are ready")))
    })
    .await?;
    let of = format!("S2: {PAIRS} models x 2 replicas");
    Ok(vec![
        (format!("{of}, until all pods exist"), created),
        (
            format!("{of}, until all are ready"),
            start.elapsed().as_secs_f64(),
        ),
    ])
}

/// One model up, down and to zero.
async fn scale(place: &Place<'_>) -> Result<Vec<Span>> {
    let name = "scaled";
    say(format!("S3: {HALF} replicas are made"));
    create(place, name, HALF).await?;
    wait_at(place, name, HALF).await?;
    let mut spans = Vec::new();
    let mut before = HALF;
    for wanted in [2 * HALF, HALF, 0] {
        say(format!("S3: {before} replicas to {wanted}"));
        let start = Instant::now();
        change(place, name, json!({"replicas": wanted})).await?;
        wait_at(place, name, wanted).await?;
        spans.push((
            format!("S3: {before} replicas to {wanted}, until they are ready or gone"),
            start.elapsed().as_secs_f64(),
        ));
        before = wanted;
    }
    Ok(spans)
}

/// All replicas of one model are exchanged for those of another revision.
async fn exchange(place: &Place<'_>) -> Result<Span> {
    let name = "exchanged";
    say(format!("S4: {EXCHANGED} replicas are made"));
    create(place, name, EXCHANGED).await?;
    wait_at(place, name, EXCHANGED).await?;
    say("S4: they are exchanged");
    let start = Instant::now();
    let template = json!({"env": [{"name": "NOTE", "value": "second"}]});
    change(place, name, json!({"podTemplate": template})).await?;
    wait_at(place, name, EXCHANGED).await?;
    Ok((
        format!("S4: {EXCHANGED} replicas exchanged with a surge of {SURGE}, drained for 1 s each"),
        start.elapsed().as_secs_f64(),
    ))
}

/// A tenth of the nodes of those replicas fall silent, as when racks lose power.
async fn silence(place: &Place<'_>) -> Result<Span> {
    let pods: Api<Pod> = api(place.client);
    let nodes_of = |pods: &[Pod]| -> BTreeSet<String> {
        let nodes = pods
            .iter()
            .filter_map(|pod| pod.spec.as_ref()?.node_name.clone());
        nodes.collect()
    };
    let all = nodes_of(&pods.list(&ListParams::default()).await?.items);
    let silent: BTreeSet<String> = all.iter().take(all.len().div_ceil(10)).cloned().collect();
    say(format!("S5: {} nodes fall silent", silent.len()));
    let start = Instant::now();
    hear(place, &silent, false).await?;
    wait_for(LOOK, || async {
        let left = nodes_of(&pods.list(&ListParams::default()).await?.items);
        let left = left.intersection(&silent).count();
        Ok((left > 0).then(|| format!("{left} silent nodes still have pods")))
    })
    .await?;
    wait_at(place, "exchanged", EXCHANGED).await?;
    let seconds = start.elapsed().as_secs_f64();
    hear(place, &silent, true).await?;
    Ok((
        format!(
            "S5: {} of {} nodes with {EXCHANGED} replicas fall silent, until all are ready elsewhere, the operator's patience with a silent node included",
            silent.len(),
            all.len()
        ),
        seconds,
    ))
}

/// Lets nodes be heard again, or writes what the node lifecycle controller writes when a kubelet is no longer heard.
async fn hear(place: &Place<'_>, nodes: &BTreeSet<String>, heard: bool) -> Result<()> {
    let api: Api<Node> = Api::all(place.client.clone());
    let parameters = PatchParams::default();
    let mark = if heard { Value::Null } else { json!("") };
    let mark = json!({"metadata": {"annotations": {SILENT: mark}}});
    let unknown = json!({"status": {"conditions": [
        {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}]}});
    for node in nodes {
        api.patch(node, &parameters, &Patch::Merge(&mark)).await?;
        if !heard {
            api.patch_status(node, &parameters, &Patch::Strategic(&unknown))
                .await?;
        }
    }
    Ok(())
}

async fn create(place: &Place<'_>, name: &str, replicas: u32) -> Result<()> {
    let mut wish = planning::wish(name, replicas, Shape::Small)?;
    let surge = i32::try_from(SURGE)?;
    wish.spec.rollout.max_surge = Some(surge);
    wish.spec.rollout.drain_timeout_seconds = Some(1);
    api::<ModelDeployment>(place.client)
        .create(&PostParams::default(), &wish)
        .await?;
    Ok(())
}

async fn change(place: &Place<'_>, name: &str, spec: Value) -> Result<()> {
    let patch = Patch::Merge(json!({"spec": spec}));
    api::<ModelDeployment>(place.client)
        .patch(name, &PatchParams::default(), &patch)
        .await?;
    Ok(())
}

/// Waits until a ModelDeployment has so many replicas, all ready, of its revision, and no others.
pub async fn wait_at(place: &Place<'_>, name: &str, replicas: u32) -> Result<()> {
    let wishes: Api<ModelDeployment> = api(place.client);
    let wanted = i32::try_from(replicas)?;
    wait_for(LOOK, || async {
        let wish = wishes.get(name).await?;
        Ok((!is_at(&wish, wanted)).then(|| {
            let status = wish.status.unwrap_or_default();
            format!(
                "{name}: {:?} replicas, {:?} ready, {:?} updated; {wanted} are wanted",
                status.replicas, status.ready_replicas, status.updated_replicas
            )
        }))
    })
    .await
}

/// Whether a ModelDeployment has so many replicas, all ready, of its revision, and no others.
pub fn is_at(wish: &ModelDeployment, replicas: i32) -> bool {
    wish.status.as_ref().is_some_and(|status| {
        let numbers = [
            status.replicas,
            status.ready_replicas,
            status.updated_replicas,
        ];
        status.observed_generation == wish.metadata.generation
            && numbers.iter().all(|number| number.unwrap_or(0) == replicas)
    })
}
