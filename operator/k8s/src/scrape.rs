//! What engine pods say about themselves: `/startupz` and `/load` (or `/metrics`), by HTTP to the pod's address.
//!
//! Answers are handed on as text; `operator-core` owns their meaning. Every scrape is bounded: in time, in size, in the
//! number under way at once. A pod that does not answer yields an error for that pod and delays no other for long.

use std::time::Duration;

use futures::StreamExt;

use crate::error::Error;
use crate::http::{Answer, HttpClient};

/// Scrapes under way at once.
const CONCURRENCY_MAX: usize = 32;
/// Longest answer of `/startupz` and `/load`.
const REPORT_BYTES_MAX: usize = 64 << 10;
/// Longest answer of `/metrics`; ours is about 40 KiB.
const METRICS_BYTES_MAX: usize = 4 << 20;

/// Where an engine listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Name of the pod.
    pub pod: String,
    /// Address of the pod.
    pub address: String,
    /// Port of the engine.
    pub port: u16,
    /// Whether it said that it has started and Kubernetes finds it ready: it is then not asked for its start again.
    pub serves: bool,
}

/// The answers of one pod.
#[derive(Debug)]
pub struct Scrape {
    /// Name of the pod.
    pub pod: String,
    /// `GET /startupz`: 200 once started, 503 before. Not asked of an engine that serves, unless its load is not told.
    pub startup: Option<Result<Answer, Error>>,
    /// `GET /load`; not asked while the engine has not started.
    pub load: Option<Result<Answer, Error>>,
}

/// Asks engine pods.
#[derive(Clone, Debug)]
pub struct Scraper {
    http: HttpClient,
    timeout: Duration,
}

impl Scrape {
    /// Whether the engine answered.
    pub fn is_answered(&self) -> bool {
        match &self.startup {
            Some(startup) => startup.is_ok(),
            None => self.load.as_ref().is_some_and(Result::is_ok),
        }
    }
}

impl Scraper {
    /// A scraper that waits at most `timeout` for each answer.
    pub fn new(timeout: Duration) -> Self {
        Scraper {
            http: HttpClient::new(timeout),
            timeout,
        }
    }

    /// Asks every target; the order of the answers is that of the targets.
    pub async fn scrape(&self, targets: Vec<Target>) -> Vec<Scrape> {
        futures::stream::iter(targets)
            .map(|target| self.one(target))
            .buffered(CONCURRENCY_MAX)
            .collect()
            .await
    }

    async fn one(&self, target: Target) -> Scrape {
        if target.serves {
            let load = self.get(&target, "load", REPORT_BYTES_MAX).await;
            if load.as_ref().is_ok_and(|answer| answer.status == 200) {
                return Scrape {
                    pod: target.pod,
                    startup: None,
                    load: Some(load),
                };
            }
        }
        let startup = self.get(&target, "startupz", REPORT_BYTES_MAX).await;
        let started = startup.as_ref().is_ok_and(|answer| answer.status == 200);
        let load = if started {
            Some(self.get(&target, "load", REPORT_BYTES_MAX).await)
        } else {
            None
        };
        Scrape {
            pod: target.pod,
            startup: Some(startup),
            load,
        }
    }

    /// The whole exposition of one engine.
    ///
    /// # Errors
    /// No answer in time, or one that is too long.
    pub async fn metrics(&self, target: &Target) -> Result<Answer, Error> {
        self.get(target, "metrics", METRICS_BYTES_MAX).await
    }

    async fn get(&self, target: &Target, path: &str, bytes_max: usize) -> Result<Answer, Error> {
        let host = if target.address.contains(':') {
            format!("[{}]", target.address)
        } else {
            target.address.clone()
        };
        let url = format!("http://{host}:{}/{path}", target.port);
        self.http.get("engine", &url, self.timeout, bytes_max).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::tests::{response, server};
    use std::time::Instant;

    async fn target(pod: &str, status: u16, body: &str, delay: Duration) -> Target {
        let url = server(response(status, body), delay).await;
        let (address, port) = url
            .trim_start_matches("http://")
            .split_once(':')
            .expect("host and port");
        Target {
            pod: pod.into(),
            address: address.into(),
            port: port.parse().expect("a port"),
            serves: false,
        }
    }

    #[tokio::test]
    async fn a_starting_engine_is_not_asked_for_its_load() {
        let loading = target("a", 503, r#"{"phase":"loading"}"#, Duration::ZERO).await;
        let scrapes = Scraper::new(Duration::from_millis(500))
            .scrape(vec![loading])
            .await;
        let startup = scrapes[0].startup.as_ref().expect("it was asked");
        assert_eq!(startup.as_ref().expect("an answer").status, 503);
        assert!(scrapes[0].load.is_none());
    }

    #[tokio::test]
    async fn an_engine_that_serves_is_asked_for_its_load_alone() {
        let serving = |status| async move {
            let target = target("a", status, r#"{"phase":"loading"}"#, Duration::ZERO).await;
            let target = Target {
                serves: true,
                ..target
            };
            let scraper = Scraper::new(Duration::from_millis(500));
            scraper.scrape(vec![target]).await.remove(0)
        };
        let scrape = serving(200).await;
        assert!(scrape.startup.is_none() && scrape.is_answered());
        assert_eq!(scrape.load.expect("asked").expect("an answer").status, 200);
        // It was started anew in its place, which Kubernetes has not noticed yet.
        let scrape = serving(503).await;
        assert!(scrape.startup.is_some() && scrape.load.is_none());
    }

    #[tokio::test]
    async fn pods_that_hang_delay_the_others_by_one_timeout_at_most() {
        let mut targets = Vec::new();
        for pod in 0..20 {
            targets.push(target(&format!("hung-{pod}"), 200, "{}", Duration::from_secs(60)).await);
        }
        targets.push(target("good", 200, "{}", Duration::ZERO).await);
        let began = Instant::now();
        let scrapes = Scraper::new(Duration::from_millis(300))
            .scrape(targets)
            .await;
        assert!(
            began.elapsed() < Duration::from_secs(3),
            "{:?}",
            began.elapsed()
        );
        assert_eq!(scrapes.len(), 21);
        assert!(
            scrapes[..20]
                .iter()
                .all(|scrape| matches!(scrape.startup, Some(Err(Error::Timeout { .. }))))
        );
        assert!(scrapes[20].load.as_ref().is_some_and(Result::is_ok));
    }
}
