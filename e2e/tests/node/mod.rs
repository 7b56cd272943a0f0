//! What the tests on a real node share.
#![allow(dead_code)] // each test binary uses its own part

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use e2e::chat::{self, Answer};
use e2e::cluster::condition;
use e2e::{Cluster, eventually};

/// A small ModelDeployment on the CPU; `scale` is its `replicas` or `autoscaling` part as YAML.
pub fn manifest(name: &str, scale: &str) -> String {
    let scale = scale.replace('\n', "\n  ");
    format!(
        "apiVersion: cachalot.dev/v1alpha1
kind: ModelDeployment
metadata:
  name: {name}
spec:
  model:
    source: file:///models/tiny-r1
    servedName: {name}
  accelerator:
    type: cpu
  context:
    maxTokens: 512
    maxConcurrentSequences: 4
  rollout:
    drainTimeoutSeconds: 30
  {scale}
"
    )
}

/// Where a model answers, from this machine.
pub struct Model {
    /// `http://address`.
    pub root_url: String,
    /// `http://address/v1`.
    pub base_url: String,
}

impl Model {
    /// Through the model's Service.
    pub fn of(cluster: &Cluster, namespace: &str, name: &str) -> Self {
        let service = cluster
            .get(namespace, "service", name)
            .expect("the API answers")
            .expect("the model has a Service");
        let address = service["spec"]["clusterIP"].as_str().expect("a cluster IP");
        let root_url = format!("http://{address}");
        Self {
            base_url: format!("{root_url}/v1"),
            root_url,
        }
    }
}

/// Waits for the condition Ready.
pub fn wait_ready(cluster: &Cluster, namespace: &str, name: &str) {
    eventually(
        &format!("{name} is Ready"),
        Duration::from_secs(180),
        || {
            let object = cluster
                .get(namespace, "mdep", name)
                .map_err(|e| e.to_string())?
                .ok_or("no object")?;
            let generation =
                object["metadata"]["generation"] == object["status"]["observedGeneration"];
            match condition(&object, "Ready") {
                Some(("True", ..)) if generation => Ok(()),
                other => Err(format!("{other:?}, status {}", object["status"])),
            }
        },
    );
}

/// Waits until exactly so many engine pods are ready and none other is left.
pub fn wait_ready_pods(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    wanted: usize,
    within: Duration,
) {
    eventually(&format!("{name} has {wanted} ready pods"), within, || {
        let pods = cluster
            .engine_pods(namespace, name)
            .map_err(|e| e.to_string())?;
        let ready = pods.iter().filter(|pod| is_ready(pod)).count();
        if ready == wanted && pods.len() == wanted {
            Ok(())
        } else {
            Err(format!("{ready} ready of {} pods", pods.len()))
        }
    });
}

/// The pod's Ready condition.
pub fn is_ready(pod: &serde_json::Value) -> bool {
    condition(pod, "Ready").is_some_and(|(status, ..)| status == "True")
}

/// A Python that has the official OpenAI client, made by `make test`.
pub fn python_with_openai() -> PathBuf {
    let python = std::env::var_os("CACHALOT_PYTHON")
        .map_or_else(|| e2e::root().join(".lab/venv/bin/python"), PathBuf::from);
    assert!(
        python.is_file(),
        "no {}: `make test` makes it, or set CACHALOT_PYTHON",
        python.display()
    );
    python
}

/// Whether a failed request is sent again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Retries {
    /// A failure counts at once.
    None,
    /// A failure is tried again for up to a minute.
    UntilAnswered,
}

/// Clients that ask sums all the time and check every answer against the one the model gave alone.
///
/// The engine is batch-invariant, so every replica gives the same question the same answer, to the
/// byte, whatever else it computes. Whether the model adds correctly is another test's question.
pub struct Load {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    workers: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    /// Asks each question once alone, then starts so many clients.
    pub fn start(base_url: &str, model: &str, clients: usize, retries: Retries) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::new(AtomicU64::new(0));
        let expected: Arc<Vec<(String, Answer)>> = Arc::new(
            (0..20)
                .map(|turn| {
                    let (a, b) = (100 + turn * 37 % 400, 100 + turn * 53 % 400);
                    let question = format!("What is {a} + {b}?");
                    let answer =
                        chat::ask(base_url, model, &question).expect("an idle model answers");
                    (question, answer)
                })
                .collect(),
        );
        let workers = (0..clients)
            .map(|client| {
                let (stop, asked) = (Arc::clone(&stop), Arc::clone(&asked));
                let expected = Arc::clone(&expected);
                let (base_url, model) = (base_url.to_owned(), model.to_owned());
                std::thread::spawn(move || {
                    let questions = expected.iter().cycle().skip(client * 7);
                    ask_until(&stop, &asked, &base_url, &model, questions, retries)
                })
            })
            .collect();
        Self {
            stop,
            asked,
            workers,
        }
    }

    /// Answers so far.
    pub fn answered(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Stops; panics with every failure seen.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let failures: Vec<String> = self
            .workers
            .into_iter()
            .flat_map(|worker| worker.join().expect("a client panicked"))
            .collect();
        let answered = self.asked.load(Ordering::Relaxed);
        assert!(
            failures.is_empty(),
            "{} failures beside {answered} answers:\n{}",
            failures.len(),
            failures.join("\n")
        );
        answered
    }
}

fn ask_until<'a>(
    stop: &AtomicBool,
    asked: &AtomicU64,
    base_url: &str,
    model: &str,
    questions: impl Iterator<Item = &'a (String, Answer)>,
    retries: Retries,
) -> Vec<String> {
    let mut failures = Vec::new();
    for (question, expected) in questions {
        if stop.load(Ordering::Relaxed) || failures.len() >= 20 {
            break;
        }
        match one_answer(base_url, model, question, expected, retries) {
            Ok(()) => {
                asked.fetch_add(1, Ordering::Relaxed);
            }
            Err(failure) => failures.push(failure),
        }
    }
    failures
}

fn one_answer(
    base_url: &str,
    model: &str,
    question: &str,
    expected: &Answer,
    retries: Retries,
) -> Result<(), String> {
    let start = std::time::Instant::now();
    loop {
        match chat::ask(base_url, model, question) {
            Ok(answer) if answer == *expected => return Ok(()),
            // Another answer is a failure in every mode.
            Ok(answer) => return Err(format!("{question} got {answer:?}, alone {expected:?}")),
            Err(error) if retries == Retries::None || start.elapsed() > Duration::from_secs(60) => {
                return Err(format!("{question}: {error:#}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(300)),
        }
    }
}
