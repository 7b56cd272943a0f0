//! The metrics exposition: exact names, types, labels and buckets; numbers that agree with what was done.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::harness::{Backend, Server, options};
use serde_json::json;

fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics
        .lines()
        .find(|line| {
            line.strip_prefix(series)
                .is_some_and(|rest| rest.starts_with(' '))
        })
        .unwrap_or_else(|| panic!("{series} is not in\n{metrics}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

fn busy_server() -> Server {
    let server = Server::start(options(), Backend::quick());
    let body = json!({"prompt": "p".repeat(40), "temperature": 0, "ignore_eos": true, "max_tokens": 5, "n": 2});
    for _ in 0..2 {
        assert_eq!(server.post("/v1/completions", &body).status, 200);
    }
    assert_eq!(
        server
            .post("/v1/completions", &json!({"prompt": []}))
            .status,
        400
    );
    server
}

/// Everything but the numbers.
fn shape(metrics: &str) -> Vec<String> {
    // Whether a probe came before the model was ready is chance.
    let is_chance = |line: &&str| line.contains("status=\"5xx\"");
    let shape: BTreeSet<String> = metrics
        .lines()
        .filter(|line| !is_chance(line))
        .map(|line| match line.strip_prefix('#') {
            Some(_) => line.to_owned(),
            None => line.rsplit_once(' ').unwrap().0.to_owned(),
        })
        .collect();
    shape.into_iter().collect()
}

#[test]
fn the_exposition_has_exactly_these_series() {
    insta::assert_snapshot!(shape(&busy_server().get("/metrics").body).join("\n"));
}

#[test]
fn the_numbers_agree_with_what_was_done() {
    let metrics = busy_server().get("/metrics").body;
    let labels = "{engine=\"0\",model_name=\"toy\"}";
    let count = |name: &str| value(&metrics, &format!("{name}{labels}"));
    assert_eq!(count("vllm:prompt_tokens_total"), 4.0 * 41.0);
    assert_eq!(count("vllm:generation_tokens_total"), 20.0);
    assert_eq!(count("vllm:request_prompt_tokens_count"), 2.0);
    assert_eq!(count("vllm:request_prompt_tokens_sum"), 82.0);
    assert_eq!(count("vllm:time_to_first_token_seconds_count"), 4.0);
    assert_eq!(count("vllm:inter_token_latency_seconds_count"), 16.0);
    assert_eq!(count("vllm:request_max_num_generation_tokens_sum"), 10.0);
    assert_eq!(count("vllm:num_requests_running"), 0.0);
    assert_eq!(count("vllm:kv_cache_usage_perc"), 0.0);
    // The second choice of the first request and both of the second find two full blocks.
    assert_eq!(count("vllm:prefix_cache_hits_total"), 3.0 * 32.0);
    let finished =
        "vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"toy\"}";
    assert_eq!(value(&metrics, finished), 4.0);
    let http = "http_requests_total{handler=\"/v1/completions\",method=\"POST\",status=\"4xx\"}";
    assert_eq!(value(&metrics, http), 1.0);
    // Two prefills of one request's choices in one step each, then both choices decode: two of eight sequences.
    let steps = count("cachalot_engine_step_seconds_count");
    assert_eq!(count("cachalot_engine_batch_occupancy_ratio_count"), steps);
    let ratio = count("cachalot_engine_roofline_ratio");
    assert!(ratio > 0.0 && ratio <= 1.0, "{ratio}");
}

#[test]
fn drafts_are_counted_under_vllms_names_and_change_no_answer() {
    let bodies = [
        json!({"prompt": "p".repeat(40), "temperature": 0, "ignore_eos": true, "max_tokens": 60}),
        json!({"prompt": "draft", "seed": 7, "max_tokens": 40, "n": 2, "logprobs": 2, "ignore_eos": true}),
        json!({"prompt": "stop", "seed": 5, "max_tokens": 90, "ignore_eos": true, "stop": ["e", "o"]}),
    ];
    let answers = |server: &Server| {
        bodies.each_ref().map(|body| {
            let answer = server.post("/v1/completions", body);
            assert_eq!(answer.status, 200);
            let mut answer = answer.json();
            for changing in ["id", "created"] {
                answer.as_object_mut().unwrap().remove(changing);
            }
            answer
        })
    };
    let plain = Server::start(options(), Backend::quick());
    let expected = answers(&plain);
    assert!(!plain.get("/metrics").body.contains("vllm:spec_decode"));

    let server = Server::start(options(), Backend::drafting(2));
    assert_eq!(answers(&server), expected);
    let metrics = server.get("/metrics").body;
    let labels = "engine=\"0\",model_name=\"toy\"";
    let count = |name: &str| value(&metrics, &format!("vllm:{name}{{{labels}}}"));
    let at = |position: u32| {
        let name = "vllm:spec_decode_num_accepted_tokens_per_pos_total";
        value(
            &metrics,
            &format!("{name}{{{labels},position=\"{position}\"}}"),
        )
    };
    let drafts = count("spec_decode_num_drafts_total");
    let accepted = count("spec_decode_num_accepted_tokens_total");
    assert_eq!(at(0) + at(1), accepted);
    assert!(at(0) > at(1) && at(1) > 0.0, "{} {}", at(0), at(1));
    let drafted = count("spec_decode_num_draft_tokens_total");
    assert!(accepted < drafted && drafts < drafted && drafted <= 2.0 * drafts);
    for name in [
        "num_drafts",
        "num_draft_tokens",
        "num_accepted_tokens",
        "num_accepted_tokens_per_pos",
    ] {
        let line = format!("# TYPE vllm:spec_decode_{name}_total counter");
        assert!(metrics.contains(&line), "{line}");
    }
    assert_eq!(metrics.matches("position=").count(), 2);
    // Each step of a sequence after its first token is one interval, however many tokens it gave.
    let tokens = count("generation_tokens_total");
    assert!(count("inter_token_latency_seconds_count") < tokens - 4.0);
}

/// One family of the exposition.
#[derive(Default)]
struct Family {
    kind: String,
    help: String,
    /// Values that each label has.
    labels: BTreeMap<String, BTreeSet<String>>,
    buckets: Vec<String>,
}

/// The families of an exposition, by name.
fn families(metrics: &str) -> BTreeMap<String, Family> {
    let mut families = BTreeMap::<String, Family>::new();
    let mut current = String::new();
    for line in metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            current = name.to_owned();
            families.entry(current.clone()).or_default().help = help.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            families.get_mut(name).unwrap().kind = kind.to_owned();
        } else {
            let family = families.get_mut(&current).unwrap();
            let labels = line
                .split_once('{')
                .map_or("", |(_, rest)| rest.rsplit_once('}').unwrap().0);
            for label in labels.split("\",").filter(|label| !label.is_empty()) {
                let (name, value) = label.split_once("=\"").unwrap();
                let value = value.trim_end_matches('"').to_owned();
                if name == "le" {
                    if !family.buckets.contains(&value) {
                        family.buckets.push(value);
                    }
                } else {
                    family
                        .labels
                        .entry(name.to_owned())
                        .or_default()
                        .insert(value);
                }
            }
        }
    }
    families
}

/// What the page says of a family's labels: values too where there is a closed set of them.
fn labels_of(family: &Family) -> String {
    let closed = [
        "reason",
        "source",
        "finished_reason",
        "sleep_state",
        "phase",
        "position",
    ];
    let own = family
        .labels
        .iter()
        .filter(|(name, _)| !["engine", "model_name"].contains(&name.as_str()));
    let shown = own.map(|(name, values)| {
        let values: Vec<&str> = values.iter().map(String::as_str).collect();
        match closed.contains(&name.as_str()) {
            true => format!("`{name}`: {}", values.join(", ")),
            false => format!("`{name}`"),
        }
    });
    shown.collect::<Vec<_>>().join("; ")
}

fn table(families: &BTreeMap<String, Family>, chosen: impl Fn(&str) -> bool) -> String {
    let mut table =
        String::from("| Metric | Type | Own labels | Meaning |\n| --- | --- | --- | --- |\n");
    for (name, family) in families.iter().filter(|(name, _)| chosen(name)) {
        let Family { kind, help, .. } = family;
        table.push_str(&format!(
            "| `{name}` | {kind} | {} | {help} |\n",
            labels_of(family)
        ));
    }
    table
}

fn buckets(families: &BTreeMap<String, Family>) -> String {
    let mut by_buckets = BTreeMap::<&[String], Vec<&str>>::new();
    for (name, family) in families
        .iter()
        .filter(|(_, family)| !family.buckets.is_empty())
    {
        by_buckets.entry(&family.buckets).or_default().push(name);
    }
    let mut rows: Vec<_> = by_buckets.into_iter().collect();
    rows.sort_by(|a, b| a.1.cmp(&b.1));
    let mut table = String::from("| Histograms | Upper bounds |\n| --- | --- |\n");
    for (buckets, names) in rows {
        let bounds: Vec<&str> = buckets
            .iter()
            .map(String::as_str)
            .filter(|bound| *bound != "+Inf")
            .collect();
        let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
        table.push_str(&format!(
            "| {} | {} |\n",
            names.join(", "),
            bounds.join(", ")
        ));
    }
    table
}

fn page(metrics: &str) -> String {
    let families = families(metrics);
    format!(
        "<!-- Generated by `UPDATE_GOLDENS=1 cargo test -p engine-server --test api exposition`; do not edit. -->\n\n\
         # Metrics of the engine\n\n\
         `GET /metrics` needs no key and takes no lock that a step could hold. Every series but those of HTTP and of the\n\
         process has the labels `model_name` and `engine` (always \"0\"). Series of a loaded model appear when the model is ready.\n\n\
         Names, types, labels and buckets under `vllm:` are those of vLLM V1, so dashboards, autoscalers and endpoint pickers\n\
         made for vLLM read this engine unchanged; [e2e/dashboards](../../e2e/dashboards/README.md) evaluates their queries on a\n\
         Prometheus engine in every test run, and holds the exposition to the rules of `promtool check metrics`. Two of vLLM's\n\
         names break those rules and are kept: the colon, and a histogram that ends in `_total`.\n\n\
         ## vLLM's names\n\n{}\n\
         ## HTTP and the process\n\n{}\n\
         ## The engine's own\n\n{}\n\
         `cachalot_engine_roofline_ratio` holds a decode step against the memory it has to read: the weights that one token uses,\n\
         and for each further sequence the experts that no other chose, as often as an even choice would, over the bandwidth\n\
         that was measured at the start on as many threads. It says nothing of prefill, which is bound by arithmetic, nor of the\n\
         cache, which grows with the context; on a GPU the bandwidth is not measured and the ratio stays 0.\n\n\
         ## Buckets\n\n\
         Bounds of token counts go up to `max_model_len`; these are of a model with 256.\n\n{}",
        table(&families, |name| name.starts_with("vllm:")),
        table(&families, |name| !name.starts_with("vllm:")
            && !name.starts_with("cachalot_")),
        table(&families, |name| name.starts_with("cachalot_")),
        buckets(&families),
    )
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn updates() -> bool {
    std::env::var_os("UPDATE_GOLDENS").is_some()
}

#[test]
fn the_reference_of_metrics_is_fresh() {
    let path = repository().join("docs/reference/engine-metrics.md");
    let page = page(&busy_server().get("/metrics").body);
    if updates() {
        std::fs::write(&path, &page).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == page,
        "docs/reference/engine-metrics.md is stale: UPDATE_GOLDENS=1 cargo test -p engine-server --test api exposition"
    );
}

/// The scrapes that `e2e/dashboards` puts queries to are those of this server: the numbers are of one run, the series
/// must be the same.
#[test]
fn the_recorded_scrapes_are_of_this_server() {
    let server = Server::start(options(), Backend::quick());
    let mut scrapes = vec![("idle", server.get("/metrics").body)];
    for name in ["busy", "busier"] {
        let body = json!({"prompt": "p".repeat(40), "temperature": 0, "ignore_eos": true, "max_tokens": 5, "n": 2});
        assert_eq!(server.post("/v1/completions", &body).status, 200);
        assert_eq!(
            server
                .post("/v1/completions", &json!({"prompt": []}))
                .status,
            400
        );
        server.get("/metrics");
        scrapes.push((name, server.get("/metrics").body));
    }
    for (name, scrape) in scrapes {
        let path = repository().join(format!("e2e/dashboards/testdata/{name}.prom"));
        if updates() {
            std::fs::write(&path, &scrape).unwrap();
        }
        let recorded = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(
            shape(&recorded),
            shape(&scrape),
            "{name}.prom is stale: UPDATE_GOLDENS=1 cargo test -p engine-server --test api exposition"
        );
    }
}
