//! S2, S3 and S8 beside other projects' controllers, each as it is fastest: many objects of two replicas, one object up,
//! down and to none, and many objects at once. A span that takes longer than [`PATIENCE`] has no figure.
//!
//! S4 and S5 are not here: the projects exchange replicas by rules of their own (KubeAI with a surge of one, Kthena by
//! partitions, AIBrix by its own limits), and none of them replaces pods of a silent node before Kubernetes does. Neither
//! are S6 and S7: they have no count of looks that changed nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::beside::beside;
use crate::clocks::within;
use crate::cluster::Place;
use crate::objects::{api, count, create_all, say, wait_for, wait_pods};
use crate::rivals::{Contestant, Project, Rival, contestants, dynamic};
use bench_report::Row;

/// How long one span may take.
const PATIENCE: Duration = Duration::from_secs(90);
/// How often a status is read.
const LOOK: Duration = Duration::from_millis(200);
/// Name of the one object, and the beginning of those of many.
const NAME: &str = "story";

/// A span of a story and how many seconds it took, if it ended.
type Span = (String, Option<f64>);

/// Ours beside each rival, `runs` times; the control plane is left without their pods.
pub async fn rows(
    place: &Place<'_>,
    rivals: &[Rival],
    replicas: u32,
    runs: usize,
) -> Result<Vec<Row>> {
    if rivals.is_empty() {
        return Ok(Vec::new());
    }
    let mut all = contestants(place, rivals)?;
    all.retain(|who| who.is_best);
    let mut told: Vec<Vec<Vec<Span>>> = all.iter().map(|_| Vec::new()).collect();
    for run in 0..runs {
        for (who, told) in all.iter().zip(&mut told) {
            let spans = tell(place, who, replicas).await.context(who.name.clone())?;
            for (span, seconds) in &spans {
                println!("run {run}: {}: {span}: {seconds:.1?} s", who.name);
            }
            told.push(spans);
        }
    }
    let (ours, theirs) = told.split_first().context("nobody was measured")?;
    let names = ours.first().context("nobody was measured")?;
    let mut rows = Vec::new();
    for (index, (span, _)) in names.iter().enumerate() {
        let of = |told: &[Vec<Span>]| told.iter().map(|spans| spans[index].1).collect();
        for (who, theirs) in all.iter().skip(1).zip(theirs) {
            let theirs = (&*who.name, of(theirs));
            rows.push(beside(span, "s", of(ours), theirs, None, PATIENCE));
        }
    }
    Ok(rows)
}

/// All stories of one controller, which begins each anew.
async fn tell(place: &Place<'_>, who: &Contestant<'_>, replicas: u32) -> Result<Vec<Span>> {
    let (half, burst) = (replicas / 2, replicas * 3 / 10);
    let mut spans = many(place, who, "S2", half, 2).await.context("S2")?;
    spans.extend(scale(place, who, half).await.context("S3")?);
    spans.extend(many(place, who, "S8", burst, 1).await.context("S8")?);
    Ok(spans)
}

/// Many objects at once.
async fn many(
    place: &Place<'_>,
    who: &Contestant<'_>,
    story: &str,
    objects: u32,
    each: u32,
) -> Result<Vec<Span>> {
    say(format!(
        "{story}: {}: {objects} objects x {each} replicas",
        who.name
    ));
    let running = who.start(place).await?;
    let own = &dynamic(place, &who.project.resource());
    let made = (0..objects)
        .map(|index| who.project.object(&format!("{NAME}-{index}"), each))
        .collect::<Result<_>>()?;
    let pods: Api<Pod> = api(place.client);
    let start = Instant::now();
    let wanted = usize::try_from(objects * each)?;
    let created = within(start, PATIENCE, async {
        create_all(own, made).await?;
        wait_pods(&pods, wanted).await
    });
    let created = created.await?;
    let ready = match created {
        None => None,
        Some(_) => within(start, PATIENCE, wait_many(own, who.project, objects, each)).await?,
    };
    drop(running);
    who.clear(place).await?;
    let of = format!("{story}: {objects} objects x {each} one-GPU replicas");
    Ok(vec![
        (format!("{of}, until all pods exist"), created),
        (format!("{of}, until all are ready"), ready),
    ])
}

/// Waits until so many objects say that they are ready.
async fn wait_many(
    own: &Api<DynamicObject>,
    project: Project,
    objects: u32,
    each: u32,
) -> Result<()> {
    wait_for(LOOK, || async {
        let all = own.list(&ListParams::default()).await?;
        let ready = all.iter().filter(|one| project.is_at(one, each)).count();
        Ok((ready < usize::try_from(objects)?).then(|| format!("{ready} of {objects} are ready")))
    })
    .await
}

/// One object up, down and to none.
async fn scale(place: &Place<'_>, who: &Contestant<'_>, half: u32) -> Result<Vec<Span>> {
    say(format!("S3: {}: {half} replicas are made", who.name));
    let running = who.start(place).await?;
    let own = &dynamic(place, &who.project.resource());
    let object = who.project.object(NAME, half)?;
    own.create(&PostParams::default(), &object).await?;
    let mut here = within(
        Instant::now(),
        PATIENCE,
        wait_at(place, own, who.project, half),
    )
    .await?;
    let (mut spans, mut before) = (Vec::new(), half);
    for wanted in [2 * half, half, 0] {
        let start = Instant::now();
        // Who has not got to one number is not asked for the next.
        if here.is_some() {
            let patch = Patch::Merge(json!({"spec": {"replicas": wanted}}));
            own.patch(NAME, &PatchParams::default(), &patch).await?;
            here = within(start, PATIENCE, wait_at(place, own, who.project, wanted)).await?;
        }
        let of = format!("S3: {before} one-GPU replicas to {wanted}");
        spans.push((format!("{of}, until they are ready or gone"), here));
        before = wanted;
    }
    drop(running);
    who.clear(place).await?;
    Ok(spans)
}

/// Waits until there are so many pods, and the object's status says that they are ready.
async fn wait_at(
    place: &Place<'_>,
    own: &Api<DynamicObject>,
    project: Project,
    replicas: u32,
) -> Result<()> {
    let pods: Api<Pod> = api(place.client);
    wait_for(LOOK, || async {
        let there = count(&pods, &ListParams::default()).await?;
        let is_at = project.is_at(&own.get(NAME).await?, replicas);
        let missing = !is_at || there != usize::try_from(replicas)?;
        Ok(missing.then(|| format!("{there} of {replicas} pods; the status says ready: {is_at}")))
    })
    .await
}
