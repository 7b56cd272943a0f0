//! Instant queries to a Prometheus server (or anything that speaks `/api/v1/query`).
//!
//! The queries are fixed and documented, so that one can run them by hand and see what the autoscaler saw. Each sums
//! or averages over the engine pods of one ModelDeployment, found by the labels that a scrape of Kubernetes pods adds.

use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use kube::Client;
use kube::client::Body;
use serde::Deserialize;

use crate::error::{Call, Error};
use crate::http::chain;

/// Longest answer that is read.
const BODY_BYTES_MAX: usize = 1 << 20;
/// How long one query may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What the autoscaler asks for one ModelDeployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// Requests that wait, all replicas together.
    Waiting,
    /// Requests that run, all replicas together.
    Running,
    /// Share of the KV cache in use, mean of the replicas.
    KvUsage,
}

impl Query {
    /// The PromQL text for the engine pods of `name` in `namespace`. They are named `<name>-<replica>-<revision>-<attempt>`;
    /// the pattern is that narrow so that `m` does not count the pods of `m-big`. Of the characters of a Kubernetes name
    /// only the dot means something in a regular expression.
    pub fn promql(self, namespace: &str, name: &str) -> String {
        let name = name.replace('.', "[.]");
        let selector =
            format!("namespace=\"{namespace}\",pod=~\"{name}-[0-9]+-[0-9a-f]{{8}}-[0-9]+\"");
        match self {
            Query::Waiting => format!("sum(vllm:num_requests_waiting{{{selector}}})"),
            Query::Running => format!("sum(vllm:num_requests_running{{{selector}}})"),
            Query::KvUsage => format!("avg(vllm:kv_cache_usage_perc{{{selector}}})"),
        }
    }
}

/// A Prometheus server.
#[derive(Clone)]
pub struct Prometheus {
    client: Client,
    base: String,
}

/// The value of a query; none when no series matched, which is not zero.
pub type Value = Option<f64>;

#[derive(Deserialize)]
struct Envelope {
    status: String,
    #[serde(default)]
    error: String,
    data: Option<Data>,
}

#[derive(Deserialize)]
struct Data {
    #[serde(default)]
    result: Vec<Sample>,
}

#[derive(Deserialize)]
struct Sample {
    value: (f64, String),
}

impl Prometheus {
    /// A client for the server at `base`, such as `http://prometheus.monitoring.svc:9090`.
    ///
    /// # Errors
    /// When `base` is not an http or https URL, or TLS cannot be set up.
    pub fn new(base: &str) -> Result<Self, Error> {
        let call = Call {
            verb: "use",
            kind: "Prometheus",
            name: base.to_string(),
        };
        let failed = |message: String| Error::Http {
            call: call.clone(),
            message,
        };
        let uri: hyper::Uri = base
            .parse()
            .map_err(|error| failed(format!("not a URL: {error}")))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(failed(
                "expected http://HOST:PORT or https://HOST:PORT".into(),
            ));
        }
        let mut config = kube::Config::new(uri);
        config.default_retry = false;
        config.connect_timeout = Some(TIMEOUT);
        let client = Client::try_from(config).map_err(|source| Error::Api {
            call: call.clone(),
            source: Box::new(source),
        })?;
        Ok(Prometheus {
            client,
            base: base.trim_end_matches('/').to_string(),
        })
    }

    /// Runs one of the documented queries.
    ///
    /// # Errors
    /// No answer in time, a status other than 200, or an answer that is not of the query API.
    pub async fn query(&self, query: Query, namespace: &str, name: &str) -> Result<Value, Error> {
        let call = Call {
            verb: "query",
            kind: "Prometheus",
            name: format!("{} {}", self.base, query.promql(namespace, name)),
        };
        let failed = |message: String| Error::Http {
            call: call.clone(),
            message,
        };
        // The client puts the base URL, also its path, in front.
        let path = format!(
            "/api/v1/query?query={}",
            percent_encode(&query.promql(namespace, name))
        );
        let exchange = async {
            let request = hyper::Request::get(path)
                .body(Body::empty())
                .map_err(|error| failed(error.to_string()))?;
            let response = self
                .client
                .send(request)
                .await
                .map_err(|error| failed(chain(&error)))?;
            let status = response.status().as_u16();
            let body = Limited::new(response.into_body(), BODY_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| {
                    failed(format!(
                        "body: {error} (at most {BODY_BYTES_MAX} bytes are read)"
                    ))
                })?
                .to_bytes();
            parse(status, &body).map_err(failed)
        };
        tokio::time::timeout(TIMEOUT, exchange)
            .await
            .unwrap_or_else(|_| {
                Err(Error::Timeout {
                    call: call.clone(),
                    limit: TIMEOUT,
                })
            })
    }
}

/// The one number of an instant query's answer.
fn parse(status: u16, body: &[u8]) -> Result<Value, String> {
    let envelope: Envelope = serde_json::from_slice(body).map_err(|error| {
        let shown: String = String::from_utf8_lossy(body).chars().take(120).collect();
        format!("status {status}, not an answer of the query API ({error}): {shown}")
    })?;
    if status != 200 || envelope.status != "success" {
        return Err(format!("status {status}: {}", envelope.error));
    }
    let samples = envelope.data.map(|data| data.result).unwrap_or_default();
    match samples.as_slice() {
        [] => Ok(None),
        // avg() of no data is NaN; absent is not zero.
        [sample] => match sample.value.1.parse::<f64>() {
            Ok(value) if value.is_finite() => Ok(Some(value)),
            Ok(_) => Ok(None),
            Err(_) => Err(format!("\"{}\" is not a number", sample.value.1)),
        },
        many => Err(format!("{} series where one was expected", many.len())),
    }
}

fn percent_encode(text: &str) -> String {
    text.bytes().fold(
        String::with_capacity(text.len() * 2),
        |mut encoded, byte| {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                    encoded.push(char::from(byte))
                }
                other => encoded.push_str(&format!("%{other:02X}")),
            }
            encoded
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::tests::{response, server};

    #[test]
    fn queries_name_the_pods_of_one_model() {
        assert_eq!(
            Query::Waiting.promql("default", "tiny-r1"),
            "sum(vllm:num_requests_waiting{namespace=\"default\",pod=~\"tiny-r1-[0-9]+-[0-9a-f]{8}-[0-9]+\"})"
        );
        assert_eq!(
            Query::KvUsage.promql("ml", "r1.v2"),
            "avg(vllm:kv_cache_usage_perc{namespace=\"ml\",pod=~\"r1[.]v2-[0-9]+-[0-9a-f]{8}-[0-9]+\"})"
        );
    }

    #[test]
    fn absent_is_not_zero() {
        let none = br#"{"status":"success","data":{"resultType":"vector","result":[]}}"#;
        assert_eq!(parse(200, none), Ok(None));
        let nan = br#"{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1.5,"NaN"]}]}}"#;
        assert_eq!(parse(200, nan), Ok(None));
        let zero = br#"{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1.5,"0"]}]}}"#;
        assert_eq!(parse(200, zero), Ok(Some(0.0)));
    }

    #[test]
    fn errors_of_the_server_and_strangers_are_named() {
        let bad = br#"{"status":"error","errorType":"bad_data","error":"parse error"}"#;
        assert_eq!(parse(400, bad), Err("status 400: parse error".into()));
        let html = parse(200, b"<html>login</html>").expect_err("not JSON");
        assert!(html.contains("<html>login</html>"), "{html}");
    }

    #[tokio::test]
    async fn a_query_goes_over_the_wire() {
        let body = r#"{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1.5,"7"]}]}}"#;
        let url = server(response(200, body), Duration::ZERO).await;
        let value = Prometheus::new(&url)
            .expect("a client")
            .query(Query::Waiting, "default", "m")
            .await;
        assert_eq!(value.expect("an answer"), Some(7.0));
    }

    #[test]
    fn a_url_without_scheme_is_refused() {
        let error = Prometheus::new("prometheus:9090").err().expect("refused");
        assert!(error.to_string().contains("http://HOST:PORT"), "{error}");
    }
}
