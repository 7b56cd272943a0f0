//! S1 beside other projects' controllers: one object with many one-GPU replicas, on the same control plane.
//!
//! Each is timed at its defaults and, where it limits its own calls, with the limits raised. The clocks run from the
//! create of the object; who has not made all pods after [`PATIENCE`] is rated by those that are there.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kube::api::{DynamicObject, PostParams};

use crate::clocks::{self, Clocks};
use crate::cluster::{Bare, LAST_WRITES, Place, create_bare};
use crate::objects::{api, say};
use crate::operator::{megabytes, processor_seconds};
use crate::rivals::{Contestant, Project, Rival, contestants, dynamic};
use bench_report::{Figure, Row};

/// How long one may take; then the pods that are there are rated.
const PATIENCE: Duration = Duration::from_secs(90);
/// Name of the one object.
const NAME: &str = "rival";

/// What one controller did once.
#[derive(Clone, Copy, Debug)]
struct Seen {
    clocks: Clocks,
    /// When the last clock stopped.
    megabytes: f64,
    /// Until then.
    millis_per_pod: f64,
    writes_per_pod: f64,
}

/// Has one make the pods, and then, after ours, a bare client the same ones.
async fn measure(
    place: &Place<'_>,
    who: &Contestant<'_>,
    replicas: u32,
) -> Result<(Seen, Option<Bare>)> {
    let running = who.start(place).await?;
    let objects = &dynamic(place, &who.project.resource());
    let object = who.project.object(NAME, replicas)?;
    let mark = place.audit.mark()?;
    let start = Instant::now();
    objects.create(&PostParams::default(), &object).await?;
    let unready = || async {
        let object: DynamicObject = objects.get(NAME).await?;
        let status = &object.data["status"];
        Ok((!who.project.is_at(&object, replicas)).then(|| format!("{status}")))
    };
    let clocks = clocks::watch(&api(place.client), replicas, (start, PATIENCE), unready).await?;
    if clocks.there < 2.0 {
        bail!("{} pods:\n{}", clocks.there, who.last_words(place));
    }
    let (megabytes, used) = (
        megabytes(running.id(), "VmRSS")?,
        processor_seconds(running.id())?,
    );
    tokio::time::sleep(LAST_WRITES).await;
    let writes = place.audit.since(mark, &who.user())?;
    say(format!("{}: {writes}", who.name));
    drop(running);
    let seen = Seen {
        clocks,
        megabytes,
        millis_per_pod: 1000.0 * used / clocks.there,
        writes_per_pod: writes.number() / clocks.there,
    };
    let bare = match who.project {
        Project::Cachalot => Some(create_bare(place).await?),
        _ => None,
    };
    who.clear(place).await?;
    Ok((seen, bare))
}

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
    let all = contestants(place, rivals)?;
    let mut seen: Vec<Vec<Seen>> = all.iter().map(|_| Vec::new()).collect();
    let mut bare = Vec::new();
    for run in 0..runs {
        for (who, seen) in all.iter().zip(&mut seen) {
            let (one, beside) = measure(place, who, replicas)
                .await
                .context(who.name.clone())?;
            say(format!("run {run}: {}: {one:.1?}", who.name));
            seen.push(one);
            bare.extend(beside);
        }
    }
    let model = format!("S1: 1 object x {replicas} one-GPU replicas");
    let (ours, theirs) = seen.split_first().context("nobody was measured")?;
    let bare: Vec<Seen> = bare
        .iter()
        .map(|bare| Seen {
            clocks: bare.clocks,
            megabytes: f64::NAN,
            millis_per_pod: f64::NAN,
            writes_per_pod: bare.writes_per_pod,
        })
        .collect();
    let mut rows = Vec::new();
    let mut push = |name: &str, seen: &[Seen], least, whole: bool| {
        let row = |what: &str, unit: &str, get: fn(&Seen) -> Option<f64>, least| {
            let (ours, theirs) = (ours.iter().map(get), seen.iter().map(get));
            let (what, who) = (format!("{model}, {what}"), name);
            beside(
                &what,
                unit,
                ours.collect(),
                (who, theirs.collect()),
                least,
                PATIENCE,
            )
        };
        rows.push(row(
            "pods created per second",
            "pods/s",
            |seen| Some(seen.clocks.pods_per_second),
            Some(least),
        ));
        rows.push(row(
            "until the last is bound",
            "s",
            |seen| seen.clocks.bound,
            None,
        ));
        rows.push(row(
            "until all are ready",
            "s",
            |seen| seen.clocks.ready,
            None,
        ));
        rows.push(row(
            "API writes per pod",
            "writes",
            |seen| Some(seen.writes_per_pod),
            None,
        ));
        if whole {
            rows.push(row("memory", "MB", |seen| Some(seen.megabytes), None));
            rows.push(row(
                "processor time per pod",
                "ms",
                |seen| Some(seen.millis_per_pod),
                None,
            ));
        }
    };
    push("a bare client", &bare, 0.9, false);
    for (who, seen) in all.iter().skip(1).zip(theirs) {
        push(&who.name, seen, who.least, true);
    }
    Ok(rows)
}

/// A row of ours beside theirs. Where one did not get there in every run, there is no figure of it.
pub fn beside(
    what: &str,
    unit: &str,
    ours: Vec<Option<f64>>,
    (who, theirs): (&str, Vec<Option<f64>>),
    least: Option<f64>,
    patience: Duration,
) -> Row {
    let figure = |runs: Vec<Option<f64>>| -> Option<Figure> {
        let runs: Option<Vec<f64>> = runs.into_iter().collect();
        Some(runs?.into_iter().collect())
    };
    let limit = format!("not in every run within {} s", patience.as_secs());
    match (figure(ours), figure(theirs)) {
        (Some(ours), Some(theirs)) => Row::against(
            &format!("{what}, ours beside {who}"),
            ours,
            unit,
            theirs,
            least,
        ),
        (Some(ours), None) => Row::plain(&format!("{what}, ours; {who}: {limit}"), ours, unit),
        (None, Some(theirs)) => Row::plain(&format!("{what}, {who}; ours: {limit}"), theirs, unit),
        (None, None) => Row::plain(
            &format!("{what}, ours and {who}: {limit}"),
            patience.as_secs_f64(),
            unit,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_did_not_get_there_in_every_run_has_no_figure() {
        let row = |ours: &[Option<f64>], theirs: &[Option<f64>]| {
            let row = beside(
                "x",
                "s",
                ours.to_vec(),
                ("b", theirs.to_vec()),
                None,
                PATIENCE,
            );
            (row.name, row.value, row.reference)
        };
        let (two, none) = ([Some(1.0), Some(3.0)], [Some(2.0), None]);
        assert_eq!(row(&two, &two), ("x, ours beside b".into(), 2.0, Some(2.0)));
        let words = "x, ours; b: not in every run within 90 s";
        assert_eq!(row(&two, &none), (words.into(), 2.0, None));
        let words = "x, b; ours: not in every run within 90 s";
        assert_eq!(row(&none, &two), (words.into(), 2.0, None));
        let words = "x, ours and b: not in every run within 90 s";
        assert_eq!(row(&none, &none), (words.into(), 90.0, None));
    }
}
