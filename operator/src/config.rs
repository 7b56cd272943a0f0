//! Configuration in two stages: what was typed ([`Arguments`]), and what it means ([`Config`]).
//!
//! Everything that can be refused is refused here, at the start, with the flag, the value and the way out.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use operator_core::NodeCache;
use operator_core::node_cache::NodeCacheRefused;
use thiserror::Error;

/// Flags of `operator run`; each can also come from the environment.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Image of the engine that every model replica runs.
    #[arg(long, env = "CACHALOT_ENGINE_IMAGE", value_name = "IMAGE")]
    pub engine_image: String,

    /// When a node pulls the engine image.
    #[arg(
        long,
        env = "CACHALOT_ENGINE_IMAGE_PULL_POLICY",
        value_name = "POLICY",
        default_value = "IfNotPresent"
    )]
    pub engine_image_pull_policy: PullPolicy,

    /// Directory of every node in which replicas share fetched weights, for its user (65532) to write; empty: each pod
    /// fetches its own.
    #[arg(
        long,
        env = "CACHALOT_NODE_CACHE",
        value_name = "PATH",
        default_value = ""
    )]
    pub node_cache: String,

    /// What the models in that directory may take together, such as 500Gi; empty: no limit.
    #[arg(
        long,
        env = "CACHALOT_NODE_CACHE_LIMIT",
        value_name = "QUANTITY",
        default_value = ""
    )]
    pub node_cache_limit: String,

    /// Serve the ModelDeployments of this namespace only; empty: of all.
    #[arg(
        long,
        env = "CACHALOT_NAMESPACE",
        value_name = "NAMESPACE",
        default_value = ""
    )]
    pub namespace: String,

    /// Watch resource claims (resource.k8s.io/v1, Kubernetes 1.34), for models that ask for GPUs by them.
    #[arg(
        long,
        env = "CACHALOT_RESOURCE_CLAIMS",
        value_name = "BOOL",
        default_value_t = false,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub resource_claims: bool,

    /// Give replicas of several pods a network policy: only pods of the same ModelDeployment reach the ports where their
    /// ranks meet.
    #[arg(
        long,
        env = "CACHALOT_GROUP_NETWORK_POLICIES",
        value_name = "BOOL",
        default_value_t = false,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub group_network_policies: bool,

    /// Base URL of a Prometheus server that autoscaling asks; empty: it asks the engine pods.
    #[arg(
        long,
        env = "CACHALOT_PROMETHEUS_URL",
        value_name = "URL",
        default_value = ""
    )]
    pub prometheus_url: String,

    /// Act only while holding a lease, so that one of several operators writes.
    #[arg(
        long,
        env = "CACHALOT_LEADER_ELECT",
        value_name = "BOOL",
        default_value_t = true,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub leader_elect: bool,

    /// Name of the lease.
    #[arg(
        long,
        env = "CACHALOT_LEASE_NAME",
        value_name = "NAME",
        default_value = "cachalot"
    )]
    pub lease_name: String,

    /// Namespace of the lease; empty: the client's own.
    #[arg(
        long,
        env = "POD_NAMESPACE",
        value_name = "NAMESPACE",
        default_value = ""
    )]
    pub lease_namespace: String,

    /// Name of this process in the lease and in events; must differ between operators.
    #[arg(long, env = "POD_NAME", value_name = "NAME", default_value = "")]
    pub identity: String,

    /// Where /healthz, /readyz and /metrics are served.
    #[arg(
        long,
        env = "CACHALOT_BIND",
        value_name = "ADDRESS",
        default_value = "0.0.0.0:8080"
    )]
    pub bind: SocketAddr,

    /// How often a replica that leaves is asked whether it is idle.
    #[arg(long, env = "CACHALOT_DRAIN_POLL", value_name = "DURATION", default_value = "1s", value_parser = duration)]
    pub drain_poll: Duration,

    /// How often replicas of a model that scales by their load are asked for it; those of others a third as often, and no more than 24 of
    /// them a second.
    #[arg(long, env = "CACHALOT_SCRAPE_PERIOD", value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub scrape_period: Duration,

    /// How long a replica may take to answer.
    #[arg(long, env = "CACHALOT_SCRAPE_TIMEOUT", value_name = "DURATION", default_value = "2s", value_parser = duration)]
    pub scrape_timeout: Duration,

    /// ModelDeployments worked on at once.
    #[arg(
        long,
        env = "CACHALOT_WORKERS",
        value_name = "NUMBER",
        default_value_t = 16
    )]
    pub workers: u16,

    /// What is logged: error, warn, info, debug, trace, also per module (info,operator_k8s=debug).
    #[arg(
        long,
        env = "CACHALOT_LOG_LEVEL",
        value_name = "FILTER",
        default_value = "info"
    )]
    pub log_level: String,

    /// How a line of the log looks.
    #[arg(
        long,
        env = "CACHALOT_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "text"
    )]
    pub log_format: LogFormat,
}

/// When a node pulls an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum PullPolicy {
    /// When the node does not have it.
    IfNotPresent,
    /// Before every start.
    Always,
    /// Never: it has been put there.
    Never,
}

impl PullPolicy {
    /// Kubernetes' word.
    pub fn as_str(self) -> &'static str {
        match self {
            PullPolicy::IfNotPresent => "IfNotPresent",
            PullPolicy::Always => "Always",
            PullPolicy::Never => "Never",
        }
    }
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What the arguments mean.
#[derive(Clone, Debug)]
pub struct Config {
    /// See [`Arguments::engine_image`].
    pub engine_image: String,
    /// See [`Arguments::engine_image_pull_policy`].
    pub engine_image_pull_policy: PullPolicy,
    /// Where replicas share weights, when they do.
    pub node_cache: Option<NodeCache>,
    /// The one namespace served; none: all.
    pub namespace: Option<String>,
    /// See [`Arguments::resource_claims`].
    pub resource_claims: bool,
    /// See [`Arguments::group_network_policies`].
    pub group_network_policies: bool,
    /// Base URL of Prometheus, when it is asked.
    pub prometheus_url: Option<String>,
    /// The lease to hold, when there is an election.
    pub lease: Option<LeaseName>,
    /// This process.
    pub identity: String,
    /// See [`Arguments::bind`].
    pub bind: SocketAddr,
    /// See [`Arguments::drain_poll`].
    pub drain_poll: Duration,
    /// See [`Arguments::scrape_period`].
    pub scrape_period: Duration,
    /// See [`Arguments::scrape_timeout`].
    pub scrape_timeout: Duration,
    /// See [`Arguments::workers`].
    pub workers: usize,
}

/// Which lease; an empty namespace means the client's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// An argument that cannot be meant.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("--{flag} is \"{value}\": {why}")]
pub struct Refused {
    flag: &'static str,
    value: String,
    why: &'static str,
}

fn refuse<T>(flag: &'static str, value: impl ToString, why: &'static str) -> Result<T, Refused> {
    Err(Refused {
        flag,
        value: value.to_string(),
        why,
    })
}

impl TryFrom<Arguments> for Config {
    type Error = Refused;

    fn try_from(arguments: Arguments) -> Result<Self, Refused> {
        let Arguments {
            engine_image,
            engine_image_pull_policy,
            node_cache,
            node_cache_limit,
            namespace,
            resource_claims,
            group_network_policies,
            prometheus_url,
            leader_elect,
            lease_name,
            lease_namespace,
            identity,
            bind,
            drain_poll,
            scrape_period,
            scrape_timeout,
            workers,
            log_level: _,
            log_format: _,
        } = arguments;
        if engine_image.trim().is_empty() || engine_image.contains(char::is_whitespace) {
            return refuse(
                "engine-image",
                engine_image,
                "give the name of an image, such as localhost/cachalot-engine:dev",
            );
        }
        let node_cache = read_node_cache(node_cache, node_cache_limit)?;
        if !namespace.is_empty() && !is_dns_label(&namespace) {
            return refuse(
                "namespace",
                namespace,
                "a namespace has lower case letters, digits and dashes, at most 63",
            );
        }
        if !prometheus_url.is_empty()
            && !prometheus_url.starts_with("http://")
            && !prometheus_url.starts_with("https://")
        {
            return refuse(
                "prometheus-url",
                prometheus_url,
                "give http://HOST:PORT or https://HOST:PORT, or nothing",
            );
        }
        if leader_elect && !is_dns_label(&lease_name) {
            return refuse(
                "lease-name",
                lease_name,
                "a lease has lower case letters, digits and dashes, at most 63",
            );
        }
        for (flag, value, least, most) in [
            ("drain-poll", drain_poll, 100, 60_000),
            ("scrape-period", scrape_period, 500, 300_000),
            ("scrape-timeout", scrape_timeout, 50, 30_000),
        ] {
            if value.as_millis() < least || value.as_millis() > most {
                let shown = format!("{}ms", value.as_millis());
                return match flag {
                    "drain-poll" => refuse(flag, shown, "choose between 100ms and 60s"),
                    "scrape-period" => refuse(flag, shown, "choose between 500ms and 5m"),
                    _ => refuse(flag, shown, "choose between 50ms and 30s"),
                };
            }
        }
        if workers == 0 || workers > 256 {
            return refuse("workers", workers, "choose between 1 and 256");
        }
        let identity = if identity.is_empty() {
            format!("operator-{}", std::process::id())
        } else {
            identity
        };
        Ok(Config {
            engine_image,
            engine_image_pull_policy,
            node_cache,
            namespace: (!namespace.is_empty()).then_some(namespace),
            resource_claims,
            group_network_policies,
            prometheus_url: (!prometheus_url.is_empty()).then_some(prometheus_url),
            lease: leader_elect.then_some(LeaseName {
                namespace: lease_namespace,
                name: lease_name,
            }),
            identity,
            bind,
            drain_poll,
            scrape_period,
            scrape_timeout,
            workers: usize::from(workers),
        })
    }
}

/// The directory for weights and its limit.
fn read_node_cache(path: String, limit: String) -> Result<Option<NodeCache>, Refused> {
    if path.is_empty() && limit.is_empty() {
        return Ok(None);
    }
    match NodeCache::new(&path, &limit) {
        Ok(cache) => Ok(Some(cache)),
        Err(NodeCacheRefused::Path) => refuse(
            "node-cache",
            path,
            "give the absolute path of a directory for nothing else, two levels deep or more, such as /var/lib/cachalot",
        ),
        Err(NodeCacheRefused::Limit) => refuse(
            "node-cache-limit",
            limit,
            "give a quantity above 0, such as 500Gi, or nothing for no limit",
        ),
    }
}

fn is_dns_label(text: &str) -> bool {
    let inner = text
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    inner && (1..=63).contains(&text.len()) && !text.starts_with('-') && !text.ends_with('-')
}

/// `500ms`, `5s`, `2m`, `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let scale_ms = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("give a whole number with a unit: 500ms, 5s, 2m, 1h".into()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "give a whole number with a unit: 500ms, 5s, 2m, 1h".to_string())?;
    number
        .checked_mul(scale_ms)
        .map(Duration::from_millis)
        .ok_or_else(|| "that is longer than time".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(more: &[&str]) -> Result<Config, String> {
        let image: &[&str] = match more {
            ["--engine-image", ..] => &[],
            _ => &["--engine-image", "engine:1"],
        };
        let given = ["operator"].iter().chain(image).chain(more);
        let cli = Cli::try_parse_from(given).map_err(|error| error.to_string())?;
        Config::try_from(cli.arguments).map_err(|error| error.to_string())
    }

    #[test]
    fn an_image_is_enough() {
        let config = parse(&[]).expect("accepted");
        assert_eq!(config.namespace, None);
        assert_eq!(config.prometheus_url, None);
        assert_eq!(config.lease.expect("an election").name, "cachalot");
        assert_eq!(config.drain_poll, Duration::from_secs(1));
    }

    #[test]
    fn the_election_can_be_switched_off_with_a_value() {
        assert!(
            parse(&["--leader-elect=false"])
                .expect("accepted")
                .lease
                .is_none()
        );
        assert!(
            parse(&["--leader-elect=true"])
                .expect("accepted")
                .lease
                .is_some()
        );
        assert!(
            parse(&["--leader-elect"])
                .expect("accepted")
                .lease
                .is_some()
        );
    }

    #[test]
    fn refusals_name_flag_value_and_way_out() {
        let table = [
            (
                &["--engine-image", "a b"][..],
                "--engine-image is \"a b\": give the name of an image",
            ),
            (&["--namespace", "No_Such"], "--namespace is \"No_Such\""),
            (
                &["--node-cache", "/etc"],
                "--node-cache is \"/etc\": give the absolute path",
            ),
            (
                &["--node-cache-limit", "500Gi"],
                "--node-cache is \"\": give the absolute path",
            ),
            (
                &["--node-cache", "/var/lib/c", "--node-cache-limit", "much"],
                "--node-cache-limit is \"much\": give a quantity",
            ),
            (&["--prometheus-url", "prom:9090"], "http://HOST:PORT"),
            (
                &["--drain-poll", "1ms"],
                "--drain-poll is \"1ms\": choose between 100ms and 60s",
            ),
            (&["--drain-poll", "5"], "500ms, 5s"),
            (
                &["--scrape-period", "999999999999999999h"],
                "longer than time",
            ),
            (
                &["--workers", "0"],
                "--workers is \"0\": choose between 1 and 256",
            ),
            (&["--bind", "8080"], "8080"),
            (&["--lease-name", ""], "--lease-name"),
        ];
        for (given, expected) in table {
            let refused = parse(given).expect_err("refused");
            assert!(refused.contains(expected), "{given:?}: {refused}");
        }
    }
}
