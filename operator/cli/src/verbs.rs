//! The verbs: each finds its input, asks the core, and writes the answer.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::jiff::Timestamp;
use operator_api::ModelDeployment;
use operator_core::explain::{Explanation, explain as explained};
use operator_core::inspect::{facts_of_config, report_of};
use operator_core::report::{Rates, StatusWords, rates, status_words};
use operator_core::sim::{Happening, Pace, replay};
use operator_core::{Inventory, PodPhase, PodView, Snapshot, names};
use operator_k8s::list::{self, Extent};

use crate::output::write;
use crate::source::{Found, Source, bare_name};
use crate::{Ending, OptionallyNamedArguments, SimulateArguments, TopArguments, files, text};

/// `plan`: every ModelDeployment of the manifests, in their order, each on what the ones before leave.
pub async fn plan(manifests: &[String], source: &Source) -> Result<Ending> {
    let found = source.find(manifests, false, Extent::Plans).await?;
    if found.given.is_empty() {
        bail!("{}: no ModelDeployment in it", manifests.join(", "));
    }
    let named = found.given.clone();
    let explanations = explanations(found, source, named)?;
    let fits = explanations.iter().all(|explanation| explanation.fits);
    write(source.output, &explanations, |all| text::plans(all))?;
    Ok(if fits {
        Ending::Done
    } else {
        Ending::DoesNotFit
    })
}

/// `explain`: one ModelDeployment with all nodes.
pub async fn explain(target: &str, manifests: &[String], source: &Source) -> Result<Ending> {
    let name = bare_name(target)?;
    let found = source.find(manifests, false, Extent::Plans).await?;
    let key = (found.namespace.clone(), name.to_owned());
    let explanation = explanations(found, source, vec![key])?.remove(0);
    let fits = explanation.fits;
    write(source.output, &explanation, text::explanation)?;
    Ok(if fits {
        Ending::Done
    } else {
        Ending::DoesNotFit
    })
}

/// Plans the named ModelDeployments one after the other; what one takes is not there for the next.
fn explanations(
    found: Found,
    source: &Source,
    named: Vec<(String, String)>,
) -> Result<Vec<Explanation>> {
    let Found { inventory, .. } = found;
    let settings = source.settings(&inventory);
    let facts = source
        .model_config()?
        .map(|text| facts_of_config(&text))
        .transpose()
        .map_err(|why| anyhow!("--model-config: {why}"))?;
    let mut cluster = inventory.cluster();
    let mut explanations = Vec::new();
    for (namespace, name) in named {
        let deployment = inventory
            .deployment(&namespace, &name)
            .with_context(|| missing(&namespace, &name))?;
        let now = operator_k8s::now();
        let mut snapshot = inventory.snapshot(deployment.clone(), Arc::new(cluster.clone()), now);
        if let Some(facts) = &facts {
            snapshot.suppose_facts(facts);
        }
        let plan = operator_core::plan(&snapshot, &settings);
        explanations.push(explained(&snapshot, &settings, &plan));
        cluster.take(&plan);
    }
    Ok(explanations)
}

fn missing(namespace: &str, name: &str) -> String {
    format!("there is no ModelDeployment {name} in namespace {namespace}")
}

/// The ModelDeployments that were asked for, by namespace and name.
async fn asked_for(which: &OptionallyNamedArguments) -> Result<(Found, Vec<ModelDeployment>)> {
    let found = which
        .source
        .find(&which.filename, which.all_namespaces, Extent::Reports)
        .await?;
    let mut chosen = found.inventory.deployments.clone();
    if !which.all_namespaces {
        chosen.retain(|mdep| mdep.metadata.namespace.as_deref() == Some(&found.namespace));
    }
    if let Some(target) = &which.name {
        let name = bare_name(target)?;
        chosen.retain(|mdep| mdep.metadata.name.as_deref() == Some(name));
        if chosen.is_empty() {
            bail!("{}", missing(&found.namespace, name));
        }
    }
    chosen.sort_by(|left, right| {
        let key =
            |mdep: &ModelDeployment| (mdep.metadata.namespace.clone(), mdep.metadata.name.clone());
        key(left).cmp(&key(right))
    });
    Ok((found, chosen))
}

fn snapshot(inventory: &Inventory, deployment: ModelDeployment, now: Timestamp) -> Snapshot {
    inventory.snapshot(deployment, Arc::new(inventory.cluster()), now)
}

/// `status`: what is stored, and the pods.
pub async fn status(which: &OptionallyNamedArguments) -> Result<Ending> {
    let (found, chosen) = asked_for(which).await?;
    let now = operator_k8s::now();
    let words: Vec<StatusWords> = chosen
        .into_iter()
        .map(|deployment| status_words(&snapshot(&found.inventory, deployment, now)))
        .collect();
    let is_one = which.name.is_some();
    write(which.format(), &words, |words| {
        text::statuses(words, is_one)
    })?;
    Ok(Ending::Done)
}

/// `top`: rates, with time to first token from the pods themselves.
pub async fn top(arguments: &TopArguments) -> Result<Ending> {
    let (found, chosen) = asked_for(&arguments.which).await?;
    let pods: Vec<(String, String, String)> = found
        .inventory
        .pods
        .iter()
        .filter(|_| !arguments.no_metrics)
        .map(|pod| {
            (
                pod.metadata.namespace.clone().unwrap_or_default(),
                PodView::of(pod),
            )
        })
        .filter(|(_, pod)| pod.ready && pod.phase == PodPhase::Running)
        .map(|(namespace, pod)| {
            let owner = pod.label(names::MODEL_DEPLOYMENT).to_owned();
            (namespace, owner, pod.name)
        })
        .collect();
    let answers = match &found.client {
        None => Vec::new(),
        Some(client) => {
            let named = pods
                .iter()
                .map(|(space, _, pod)| (space.clone(), pod.clone()));
            list::metrics(client, named.collect()).await
        }
    };
    let rows: Vec<Rates> = chosen
        .iter()
        .map(|mdep| {
            let metadata = &mdep.metadata;
            let is_own = |(space, owner, _): &(String, String, String)| {
                metadata.namespace.as_ref() == Some(space) && metadata.name.as_ref() == Some(owner)
            };
            let own = pods.iter().zip(&answers).filter(|(pod, _)| is_own(pod));
            rates(mdep, own.filter_map(|(_, answer)| answer.as_deref().ok()))
        })
        .collect();
    write(arguments.which.format(), &rows, |rows| text::top(rows))?;
    let failed = answers.iter().find_map(|answer| answer.as_ref().err());
    if let Some(error) = failed {
        eprintln!("kubectl cachalot: some pods were not measured: {error}");
    }
    Ok(Ending::Done)
}

/// `simulate`: the plans that happenings lead to.
pub async fn simulate(arguments: &SimulateArguments) -> Result<Ending> {
    let source = &arguments.source;
    let found = source
        .find(&arguments.filename, false, Extent::Plans)
        .await?;
    let Found { inventory, .. } = found;
    let settings = source.settings(&inventory);
    let config = source.model_config()?;
    let report = match &config {
        Some(text) => {
            report_of(facts_of_config(text).map_err(|why| anyhow!("--model-config: {why}"))?)
        }
        None => {
            let unknown = inventory
                .deployments
                .iter()
                .find(|mdep| mdep.spec.model.config_map_ref.is_none());
            if let Some(mdep) = unknown {
                bail!(
                    "{}: nothing is known of its model; give --model-config FILE, or spec.model.configMapRef",
                    mdep.metadata.name.as_deref().unwrap_or_default()
                );
            }
            String::new()
        }
    };
    let happenings = match &arguments.happenings {
        None => Vec::new(),
        Some(path) => happenings(path)?,
    };
    let pace = Pace {
        start_seconds_min: arguments.start_seconds,
        start_seconds_max: arguments.start_seconds,
        ..Pace::default()
    };
    let plans = replay(inventory, report, &settings, pace, &happenings)
        .map_err(|why| anyhow!("{}: {why}", arguments.happenings.as_deref().unwrap_or("")))?;
    write(source.output, &plans, |plans| text::story(plans))?;
    Ok(Ending::Done)
}

fn happenings(path: &str) -> Result<Vec<Happening>> {
    let value: serde_json::Value =
        serde_yaml::from_str(&files::text(path)?).with_context(|| path.to_owned())?;
    let serde_json::Value::Array(values) = value else {
        bail!("{path}: must be a YAML list of happenings");
    };
    values
        .into_iter()
        .enumerate()
        .map(|(index, value)| {
            Happening::parse(value).map_err(|why| anyhow!("{path}: entry {}: {why}", index + 1))
        })
        .collect()
}
