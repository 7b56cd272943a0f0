//! S6 at full size: a thousand ModelDeployments with ten thousand one-GPU pods, the operator's memory over them and its
//! restart.

use std::time::{Duration, Instant};

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use operator_api::ModelDeployment;

use crate::cluster::{Place, idle, restart, wait_planned};
use crate::objects::{api, clear, create_all, say, wait_pods};
use crate::operator::Operator;
use crate::planning::{self, Shape};
use bench_report::{Row, median};

/// How long simulated nodes need to report the pods.
const SETTLE: Duration = Duration::from_secs(60);

/// How long after a restart memory is read: the operator gives back what the first lists took within seconds.
const RELEASED: Duration = Duration::from_secs(20);

/// How large the fleet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// ModelDeployments.
    pub models: u32,
    /// Replicas of each.
    pub replicas: u32,
}

/// Has the fleet created once and restarts the operator over it `runs` times; the control plane is left empty.
pub async fn rows(place: &Place<'_>, size: Size, runs: usize) -> Result<Vec<Row>> {
    let (models, total) = (size.models, size.models * size.replicas);
    let wishes: Api<ModelDeployment> = api(place.client);
    let pods: Api<Pod> = api(place.client);
    let operator = Operator::start(place.binary, place.cluster, place.log)?;
    operator.wait_leading().await?;
    let fleet = (0..models)
        .map(|index| planning::wish(&format!("m{index}"), size.replicas, Shape::Small))
        .collect::<Result<_>>()?;
    say(format!("S6: {models} models and {total} pods are made"));
    let start = Instant::now();
    create_all(&wishes, fleet).await?;
    wait_pods(&pods, usize::try_from(total)?).await?;
    let rate = f64::from(total) / start.elapsed().as_secs_f64();
    say(format!(
        "S6: {rate:.0} pods/s; statuses and simulated nodes settle"
    ));
    wait_planned(&wishes, usize::try_from(models)?).await?;
    tokio::time::sleep(SETTLE).await;
    let made_megabytes = Operator::resident_megabytes(&operator.metrics()?)?;
    let made_peak = operator.peak_megabytes()?;
    say(format!(
        "S6: {made_megabytes:.0} MB, {made_peak:.0} MB at the peak; S7: nothing changes"
    ));
    let idle_percent = idle(&operator).await?;
    drop(operator);
    let (mut first, mut all) = (Vec::new(), Vec::new());
    let (mut megabytes, mut peak) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        say("S6: the operator is restarted");
        let (one, every, operator) = restart(place, models).await?;
        first.push(one);
        all.push(every);
        tokio::time::sleep(RELEASED).await;
        let (now, most) = (
            Operator::resident_megabytes(&operator.metrics()?)?,
            operator.peak_megabytes()?,
        );
        say(format!(
            "S6: first look after {one:.2} s, all after {every:.2} s, {now:.0} MB, {most:.0} MB at the peak"
        ));
        megabytes.push(now);
        peak.push(most);
    }
    // What was measured counts however the rest goes.
    if let Err(error) = clear(place.cluster, place.client).await {
        say(format!("S6: not everything could be removed: {error:#}"));
    }
    let of = format!("{models} models and {total} pods");
    Ok(vec![
        Row::plain(&format!("S6: {of}, created per second"), rate, "pods/s"),
        Row::below(
            &format!("S6: operator's memory with {of}, which it made"),
            made_megabytes,
            "MB",
            40.0,
        ),
        Row::below(
            &format!("S6: operator's memory with {of}, after a restart"),
            median(megabytes),
            "MB",
            40.0,
        ),
        Row::plain(
            &format!("S6: operator's memory with {of} at its peak while it made them"),
            made_peak,
            "MB",
        ),
        Row::plain(
            &format!("S6: operator's memory with {of} at its peak after a restart"),
            median(peak),
            "MB",
        ),
        Row::below(
            &format!("S6: restart with {of} to the first look that changes nothing"),
            median(first),
            "s",
            3.0,
        ),
        Row::plain(
            &format!("S6: restart with {of} until it looked at all"),
            median(all),
            "s",
        ),
        Row::plain(
            &format!("S7: operator's share of a core with {of} while nothing changes"),
            idle_percent,
            "%",
        ),
    ])
}
