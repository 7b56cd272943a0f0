//! Answers as text for people.

use std::fmt::Write;

use operator_core::explain::{
    Explanation, Judgement, NODES_NAMED_MAX, NodeGroup, PodWords, Standing,
};
use operator_core::report::{Rates, StatusWords};
use operator_core::sim::Planned;

use crate::output::table;

/// Several plans, one below the other.
pub fn plans(all: &[Explanation]) -> String {
    let texts: Vec<String> = all.iter().map(plan).collect();
    texts.join("\n")
}

fn plan(explanation: &Explanation) -> String {
    let mut text = head(explanation);
    section(&mut text, "Places", places(explanation));
    let actions = explanation
        .actions
        .iter()
        .map(|action| vec![action.clone()]);
    section(&mut text, "Writes", actions.collect());
    section(&mut text, "Conditions", conditions(&explanation.conditions));
    if !explanation.fits {
        text.push_str(&nodes(&explanation.nodes));
    }
    text
}

/// One ModelDeployment with all nodes.
pub fn explanation(explanation: &Explanation) -> String {
    let mut text = head(explanation);
    section(&mut text, "Pods", pods(&explanation.pods));
    section(&mut text, "Places", places(explanation));
    section(&mut text, "Conditions", conditions(&explanation.conditions));
    text.push_str(&nodes(&explanation.nodes));
    text
}

fn head(explanation: &Explanation) -> String {
    let Explanation {
        namespace,
        name,
        wanted,
        fits,
        layout,
        ..
    } = explanation;
    let replicas = if *wanted == 1 { "replica" } else { "replicas" };
    let verdict = match (*fits, *wanted) {
        (_, 0) => "nothing to place",
        (true, 1) => "it has a place",
        (true, _) => "all have a place",
        (false, _) => "not all have a place",
    };
    let mut text = format!("{namespace}/{name}: {wanted} {replicas} wanted, {verdict}\n");
    if let Some(layout) = layout {
        let device = match layout.gpus_per_replica {
            0 if layout.pods_per_replica.is_some() => {
                format!("{}, {}", layout.device, layout.parallelism)
            }
            0 => layout.device.clone(),
            gpus => format!(
                "{gpus} x {} per replica, {}",
                layout.device, layout.parallelism
            ),
        };
        let rows = [
            vec!["  layout".into(), device],
            vec!["  memory".into(), layout.words.clone()],
            vec!["  revision".into(), layout.revision.clone()],
        ];
        text.push_str(&table(&rows));
    }
    text
}

fn section(text: &mut String, title: &str, rows: Vec<Vec<String>>) {
    if rows.is_empty() {
        return;
    }
    let indented: Vec<Vec<String>> = rows
        .into_iter()
        .map(|mut row| {
            if let Some(first) = row.first_mut() {
                first.insert_str(0, "  ");
            }
            row
        })
        .collect();
    text.push_str(title);
    text.push('\n');
    text.push_str(&table(&indented));
}

fn places(explanation: &Explanation) -> Vec<Vec<String>> {
    explanation
        .places
        .iter()
        .map(|place| {
            let mut nodes = place.nodes.join(", ");
            if place.more_nodes > 0 {
                let _ = write!(nodes, " and {} more", place.more_nodes);
            }
            if !place.preempts.is_empty() {
                let _ = write!(
                    nodes,
                    ", once replicas of {} have left",
                    place.preempts.join(", ")
                );
            }
            vec![place.pod.clone(), nodes]
        })
        .collect()
}

fn conditions(conditions: &[Judgement]) -> Vec<Vec<String>> {
    conditions
        .iter()
        .map(|condition| {
            vec![
                condition.kind.clone(),
                condition.status.clone(),
                condition.reason.clone(),
                condition.message.clone(),
            ]
        })
        .collect()
}

fn pods(pods: &[PodWords]) -> Vec<Vec<String>> {
    pods.iter()
        .map(|pod| {
            vec![
                pod.name.clone(),
                pod.state.to_owned(),
                pod.node.clone().unwrap_or_else(|| "-".into()),
                pod.revision.clone(),
                pod.message.clone(),
            ]
        })
        .collect()
}

fn nodes(groups: &[NodeGroup]) -> String {
    let mut text = String::new();
    if groups.is_empty() {
        return text;
    }
    text.push_str("Nodes\n");
    for group in groups {
        let count = match group.count {
            1 => "1 node".to_owned(),
            count => format!("{count} nodes"),
        };
        let words = match group.standing {
            Standing::InUse => "in use by this ModelDeployment".to_owned(),
            Standing::Holds => "holds the weights, and could take another replica".to_owned(),
            Standing::Fits => "could take another replica".to_owned(),
            Standing::DoesNotFit => group.why.clone().unwrap_or_default(),
        };
        let _ = writeln!(text, "  {count}: {words}");
        if let Some(remedy) = &group.remedy {
            let _ = writeln!(text, "    would fit: {remedy}");
        }
        let mut names = group.nodes.join(", ");
        if group.count > group.nodes.len() {
            let _ = write!(names, " and {} more", group.count - NODES_NAMED_MAX);
        }
        let _ = writeln!(text, "    {names}");
    }
    text
}

/// Statuses: one line each, or one in full.
pub fn statuses(all: &[StatusWords], is_one: bool) -> String {
    if all.is_empty() {
        return "no ModelDeployments\n".into();
    }
    if is_one {
        return all.iter().map(status).collect();
    }
    let mut rows = vec![row([
        "NAMESPACE",
        "NAME",
        "READY",
        "PHASE",
        "GPUS",
        "MESSAGE",
    ])];
    rows.extend(all.iter().map(|words| {
        vec![
            words.namespace.clone(),
            words.name.clone(),
            words.ready.clone(),
            words.phase.clone(),
            words.gpus.to_string(),
            words.message.clone(),
        ]
    }));
    table(&rows)
}

fn status(words: &StatusWords) -> String {
    let stale = if words.is_current {
        ""
    } else {
        " (of an older spec: the operator has not looked yet)"
    };
    let mut text = format!(
        "{}/{}: {}, {} ready, {} GPUs{stale}\n",
        words.namespace, words.name, words.phase, words.ready, words.gpus
    );
    let rows = [
        vec!["  endpoint".into(), words.endpoint.clone()],
        vec!["  revision".into(), words.revision.clone()],
    ];
    text.push_str(&table(&rows));
    section(&mut text, "Pods", pods(&words.pods));
    section(&mut text, "Conditions", conditions(&words.conditions));
    text
}

/// Rates, one line each.
pub fn top(rows: &[Rates]) -> String {
    if rows.is_empty() {
        return "no ModelDeployments\n".into();
    }
    let mut lines = vec![row([
        "NAMESPACE",
        "NAME",
        "READY",
        "TOK/S",
        "TTFT P50",
        "TTFT P95",
        "KV %",
        "RUNNING",
        "QUEUED",
    ])];
    let seconds = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.3} s"));
    lines.extend(rows.iter().map(|rates| {
        vec![
            rates.namespace.clone(),
            rates.name.clone(),
            rates.ready.clone(),
            rates
                .tokens_per_second
                .map_or("-".into(), |value| format!("{value:.1}")),
            seconds(rates.ttft_p50_seconds),
            seconds(rates.ttft_p95_seconds),
            rates
                .kv_percent
                .map_or("-".into(), |value| value.to_string()),
            rates.running.map_or("-".into(), |value| value.to_string()),
            rates.queued.map_or("-".into(), |value| value.to_string()),
        ]
    }));
    table(&lines)
}

/// A sequence of plans.
pub fn story(plans: &[Planned]) -> String {
    let mut text = String::new();
    for plan in plans {
        for because in &plan.because {
            let _ = writeln!(text, "* {because}");
        }
        let _ = writeln!(text, "{} s  {}", plan.at_seconds, plan.deployment);
        for action in &plan.actions {
            let _ = writeln!(text, "  {action}");
        }
        for condition in &plan.conditions {
            let _ = writeln!(
                text,
                "  {}={} {}: {}",
                condition.kind, condition.status, condition.reason, condition.message
            );
        }
    }
    text
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}
