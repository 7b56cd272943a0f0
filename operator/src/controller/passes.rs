//! The whole loop before an API server that keeps objects in memory, loses answers and lets watches lag.

use std::collections::BTreeMap;
use std::sync::Mutex as Lock;

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::response::Response;
use operator_k8s::Client;
use operator_k8s::events;
use operator_k8s::lease::Election;
use operator_k8s::sampling::Periods;
use operator_k8s::scrape::Scraper;
use operator_k8s::write::Writer;
use serde_json::{Value, json};

use super::*;

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// What the API server makes of a request before it looks at it.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Refuse(u16),
    /// It carries it out and does not say so.
    LoseAnswer,
    /// It never answers and does nothing.
    Silence,
}

#[derive(Default)]
struct Kept {
    /// By plural, namespace and name.
    objects: BTreeMap<(String, String, String), Value>,
    /// What watches tell: the plural and the event.
    told: Vec<(String, Value)>,
    asked: Vec<String>,
    /// By method and plural, such as `POST pods`.
    faults: BTreeMap<&'static str, Fault>,
    /// A plural whose watch tells nothing for now.
    lagging: &'static str,
    /// Replicas that someone asks for just before a status is written.
    edit: Option<u32>,
}

fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        return *target = patch.clone();
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in patch {
        if value.is_null() {
            target.as_object_mut().expect("an object").remove(name);
        } else {
            merge(&mut target[name.as_str()], value);
        }
    }
}

impl Kept {
    fn keep(&mut self, key: (String, String, String), kind: &str, mut object: Value) -> Value {
        let version = json!((self.told.len() + 1).to_string());
        object["metadata"]["resourceVersion"] = version;
        object["metadata"]["uid"] = json!(format!("uid-{}", key.2));
        let event = json!({"type": kind, "object": object});
        self.told.push((key.0.clone(), event));
        if kind == "DELETED" {
            self.objects.remove(&key);
        } else {
            self.objects.insert(key, object.clone());
        }
        object
    }

    fn put(&mut self, plural: &str, object: Value) {
        let part = |name: &str| {
            object["metadata"][name]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        let key = (plural.to_owned(), part("namespace"), part("name"));
        self.keep(key, "ADDED", object);
    }

    fn answer(&mut self, method: &str, path: &str, query: &str, body: &Value) -> (u16, String) {
        let mut parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        parts.drain(..if parts[0] == "api" { 2 } else { 3 });
        let namespace = if parts[0] == "namespaces" && parts.len() > 2 {
            parts.drain(..2).nth(1).unwrap_or_default().to_owned()
        } else {
            String::new()
        };
        let plural = parts[0].to_owned();
        if plural == "pods" && query.contains("managed-by%21%3D") && method == "GET" {
            // There are no pods of others.
            let none = json!({"metadata": {"resourceVersion": "1"}, "items": []});
            let watched = query.contains("watch=true");
            return (
                200,
                if watched {
                    String::new()
                } else {
                    none.to_string()
                },
            );
        }
        if query.contains("watch=true") {
            if self.lagging == plural {
                return (200, String::new());
            }
            let from = query.split("resourceVersion=").nth(1).unwrap_or_default();
            let from: usize = from
                .split('&')
                .next()
                .unwrap_or_default()
                .parse()
                .unwrap_or(0);
            let news = self.told.iter().skip(from).filter(|(of, _)| *of == plural);
            return (200, news.map(|(_, event)| format!("{event}\n")).collect());
        }
        let name = match (parts.get(1), method) {
            (Some(name), _) => (*name).to_owned(),
            (None, "POST") => body["metadata"]["name"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            (None, _) => {
                let only = query.split("metadata.name%3D").nth(1);
                let items = self.objects.iter().filter(|((of, within, name), _)| {
                    *of == plural
                        && (namespace.is_empty() || *within == namespace)
                        && only.is_none_or(|only| only.split('&').next() == Some(name))
                });
                let items: Vec<&Value> = items.map(|(_, object)| object).collect();
                let version = self.told.len().max(1).to_string();
                let list = json!({"metadata": {"resourceVersion": version}, "items": items});
                return (200, list.to_string());
            }
        };
        let key = (plural, namespace, name);
        let found = self.objects.get(&key).cloned();
        let refusal = |code: u16, reason: &str| {
            (
                code,
                json!({"kind": "Status", "status": "Failure", "code": code,
            "reason": reason, "message": "no"})
                .to_string(),
            )
        };
        let kept = match (method, found) {
            ("GET", Some(object)) => object,
            ("POST", Some(_)) => return refusal(409, "AlreadyExists"),
            ("POST", None) => self.keep(key, "ADDED", body.clone()),
            ("PATCH", Some(mut object)) => {
                if let Some(replicas) = self.edit.filter(|_| parts.get(2) == Some(&"status")) {
                    object["spec"]["replicas"] = json!(replicas);
                    object["metadata"]["generation"] = json!(2);
                    object = self.keep(key.clone(), "MODIFIED", object);
                    self.edit = None;
                }
                merge(&mut object, body);
                self.keep(key, "MODIFIED", object)
            }
            ("DELETE", Some(object)) => self.keep(key, "DELETED", object),
            _ => return refusal(404, "NotFound"),
        };
        (200, kept.to_string())
    }
}

fn client(kept: &Arc<Lock<Kept>>) -> Client {
    let kept = Arc::clone(kept);
    let answer = move |request: Request| {
        let kept = Arc::clone(&kept);
        async move {
            let (head, body) = request.into_parts();
            let body = to_bytes(Body::new(body), usize::MAX).await.expect("a body");
            let body = serde_json::from_slice(&body).unwrap_or_default();
            let (path, query) = (head.uri.path(), head.uri.query().unwrap_or_default());
            if query.contains("watch=true") {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            let plural = path
                .split('/')
                .rev()
                .find(|part| part.ends_with('s') && *part != "status");
            let asked = format!("{} {}", head.method, plural.unwrap_or_default());
            let fault = {
                let mut kept = kept.lock().expect("a lock");
                kept.asked.push(format!("{} {path}?{query}", head.method));
                kept.faults.get(&*asked).copied()
            };
            let (status, text) = match fault {
                Some(Fault::Silence) => std::future::pending().await,
                Some(Fault::Refuse(code)) => {
                    let status = json!({"kind": "Status", "status": "Failure", "code": code, "reason": "x",
                        "message": "no"});
                    (code, status.to_string())
                }
                Some(Fault::LoseAnswer) => {
                    kept.lock()
                        .expect("a lock")
                        .answer(head.method.as_str(), path, query, &body);
                    std::future::pending().await
                }
                None => {
                    kept.lock()
                        .expect("a lock")
                        .answer(head.method.as_str(), path, query, &body)
                }
            };
            let response = Response::builder().status(status).body(Body::from(text));
            response.expect("a response")
        }
    };
    Client::new(axum::Router::new().fallback(answer), "d")
}

fn wish(name: &str, replicas: u32) -> Value {
    json!({"apiVersion": "cachalot.dev/v1alpha1", "kind": "ModelDeployment",
    "metadata": {"name": name, "namespace": "d", "generation": 1, "creationTimestamp": "2026-11-24T00:00:00Z"},
    "spec": {
        "model": {"source": "hf://cachalot/bench", "configMapRef": {"name": "config"}},
        "context": {"maxTokens": 32768, "maxConcurrentSequences": 16},
        "replicas": replicas,
    }})
}

fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"nvidia.com/gpu.product": "NVIDIA-H200", "nvidia.com/gpu.memory": "143771",
            "nvidia.com/gpu.count": "8", "nvidia.com/gpu.compute.major": "9", "nvidia.com/gpu.compute.minor": "0",
            "nvidia.com/cuda.driver-version.full": "580.65.06", "kubernetes.io/arch": "amd64"}},
        "status": {"allocatable": {"cpu": "192", "memory": "2048Gi", "pods": "110", "nvidia.com/gpu": "8"},
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-24T00:00:00Z"}]}})
}

/// A controller at work, and the API server it works on.
struct Works {
    kept: Arc<Lock<Kept>>,
    tasks: JoinSet<()>,
}

impl Works {
    fn on(objects: impl IntoIterator<Item = Value>) -> Self {
        let config = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../engine/bench/model/config.json"
        );
        let config = std::fs::read_to_string(config).expect("the config of a model");
        let mut kept = Kept::default();
        kept.put(
            "configmaps",
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config", "namespace": "d"},
                "data": {"config.json": config}}),
        );
        for object in objects {
            let is_node = object["kind"] == "Node";
            kept.put(if is_node { "nodes" } else { "modeldeployments" }, object);
        }
        Works {
            kept: Arc::new(Lock::new(kept)),
            tasks: JoinSet::new(),
        }
    }

    fn with(self, change: impl FnOnce(&mut Kept)) -> Self {
        change(&mut self.kept());
        self
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().expect("a lock")
    }

    async fn begin(mut self, leads: bool) -> Self {
        let (world, client) = (World::new(), client(&self.kept));
        let leadership = if leads {
            Leadership::alone()
        } else {
            Election::new(client.clone(), "d", "l", "me").1
        };
        world.follow(&mut self.tasks, &client, None);
        let seen = Arc::clone(&world);
        let periods = Periods {
            serving: s(5),
            draining: s(1),
        };
        let scraper = Scraper::new(s(1));
        let controller = Controller {
            applier: Applier::new(
                Writer::new(client.clone(), leadership.clone()),
                Arc::clone(&world),
            ),
            reader: Reader::new(client.clone()),
            sampler: Sampler::new(Arc::clone(&world), scraper, None, periods, Box::new(|_| ())),
            recorder: events::recorder(client, "me").0,
            leadership,
            metrics: Metrics::new(),
            health: Health::new(move || seen.waiting_for()),
            memory: Memory::default(),
            workers: 4,
            settings: Settings {
                network_policies: false,
                engine_image: "registry.example/cachalot-engine:1.0.0".into(),
                image_pull_policy: "IfNotPresent".into(),
                node_cache: None,
            },
            world,
        };
        self.tasks
            .spawn(controller.run(std::future::pending(), s(1)));
        tokio::time::sleep(s(10)).await;
        self
    }

    /// How many objects of that plural there are.
    fn count(&self, plural: &str) -> usize {
        let kept = self.kept();
        kept.objects.keys().filter(|(of, ..)| of == plural).count()
    }

    /// What was asked that changes something.
    fn writes(&self) -> usize {
        let kept = self.kept();
        kept.asked
            .iter()
            .filter(|asked| !asked.starts_with("GET"))
            .count()
    }

    fn asked(&self, what: &str) -> usize {
        let kept = self.kept();
        kept.asked
            .iter()
            .filter(|asked| asked.starts_with(what))
            .count()
    }
}

const PODS: &str = "POST /api/v1/namespaces/d/pods";

#[tokio::test(start_paused = true)]
async fn a_model_is_made_and_then_left_alone() {
    let works = Works::on([node("a"), wish("m", 3)]).begin(true).await;
    assert_eq!(works.count("pods"), 3);
    let told = |kept: &Kept| {
        let key = ("modeldeployments".into(), "d".into(), "m".into());
        kept.objects[&key]["status"]["observedGeneration"].clone()
    };
    assert_eq!(told(&works.kept()), 1);
    tokio::time::sleep(s(60)).await;
    let before = works.writes();
    tokio::time::sleep(s(60)).await;
    assert!(
        works.writes() - before < 5,
        "{} writes in a minute",
        works.writes() - before
    );
}

#[tokio::test(start_paused = true)]
async fn two_models_that_are_planned_at_once_never_take_the_same_gpu() {
    // Only what each pass counts in advance tells the other.
    let works = Works::on([node("a"), wish("m", 6), wish("n", 6)]);
    let works = works.with(|kept| kept.lagging = "pods").begin(true).await;
    assert_eq!(works.count("pods"), 8);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_without_the_lease_or_before_the_lists() {
    let works = Works::on([node("a"), wish("m", 3)]).begin(false).await;
    tokio::time::sleep(s(60)).await;
    assert_eq!(works.writes(), 0);
    let works = Works::on([node("a"), wish("m", 3)]);
    let silence = |kept: &mut Kept| {
        kept.faults.insert("GET resourcequotas", Fault::Silence);
    };
    let works = works.with(silence).begin(true).await;
    assert_eq!(works.writes(), 0);
}

#[tokio::test(start_paused = true)]
async fn pods_of_which_nothing_was_said_are_found_before_the_next_plan() {
    let works = Works::on([node("a"), wish("m", 3)]);
    let lose = |kept: &mut Kept| {
        kept.lagging = "pods";
        kept.faults.insert("POST pods", Fault::LoseAnswer);
    };
    let works = works.with(lose).begin(true).await;
    assert_eq!(works.count("pods"), 1, "the first is waited for");
    tokio::time::sleep(s(45)).await;
    works.kept().faults.clear();
    tokio::time::sleep(s(30)).await;
    assert_eq!(works.count("pods"), 3);
    let reads = works.asked("GET /api/v1/namespaces/d/pods?");
    assert!(reads >= 1, "it was read back");
}

#[tokio::test(start_paused = true)]
async fn one_that_is_refused_backs_off_and_leaves_the_room_to_others() {
    let works = Works::on([node("a"), wish("m", 8)]);
    let refuse = |kept: &mut Kept| {
        kept.faults.insert("POST pods", Fault::Refuse(403));
    };
    let works = works.with(refuse).begin(true).await;
    tokio::time::sleep(s(600)).await;
    let tried = works.asked(PODS);
    assert!((8..30).contains(&tried), "{tried} times in ten minutes");
    works.kept().faults.clear();
    works.kept().put("modeldeployments", wish("n", 8));
    tokio::time::sleep(s(3)).await;
    assert_eq!(works.count("pods"), 8, "of the other one");
}

#[tokio::test(start_paused = true)]
async fn a_spec_that_is_edited_while_its_status_is_written_is_carried_out() {
    let works = Works::on([node("a"), wish("m", 2)]);
    let works = works.with(|kept| kept.edit = Some(5)).begin(true).await;
    assert_eq!(works.count("pods"), 5);
}

impl Works {
    /// Status and reason of a condition, and the message.
    fn condition(&self, name: &str, kind: &str) -> Option<(String, String)> {
        let kept = self.kept();
        let key = ("modeldeployments".into(), "d".into(), name.into());
        let conditions = kept.objects.get(&key)?["status"]["conditions"].as_array()?;
        let found = conditions.iter().find(|found| found["type"] == kind)?;
        let text = |field: &str| found[field].as_str().unwrap_or_default();
        let verdict = format!("{} {}", text("status"), text("reason"));
        Some((verdict, text("message").into()))
    }

    /// How often the status of one was written.
    fn reports(&self, name: &str) -> usize {
        let path = format!("/modeldeployments/{name}/status");
        let kept = self.kept();
        let all = kept.asked.iter();
        all.filter(|asked| asked.starts_with("PATCH") && asked.contains(&path))
            .count()
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_is_told_in_the_status_until_it_is_allowed() {
    let works = Works::on([node("a"), wish("m", 2)]);
    let refuse = |kept: &mut Kept| {
        kept.faults.insert("POST pods", Fault::Refuse(403));
    };
    let works = works.with(refuse).begin(true).await;
    tokio::time::sleep(s(120)).await;
    let (verdict, message) = works.condition("m", "Degraded").expect("it is told");
    assert_eq!(verdict, "True CallRefused");
    assert!(message.starts_with("create Pod d/m-0-"), "{message}");
    assert!(message.contains("No right is missing"), "{message}");
    assert_eq!(
        works.condition("m", "Planned").expect("it is planned").0,
        "True FitFound"
    );
    let told = works.reports("m");
    assert!(works.asked(PODS) > 5, "it is tried again");
    tokio::time::sleep(s(600)).await;
    assert_eq!(works.reports("m"), told, "told again though nothing is new");

    works.kept().faults.clear();
    tokio::time::sleep(s(90)).await;
    assert_eq!(works.count("pods"), 2);
    assert_eq!(
        works.condition("m", "Degraded").expect("it is told").0,
        "False AsExpected"
    );
}

/// One whose spec has a form that nobody knows.
fn malformed(name: &str) -> Value {
    let mut wish = wish(name, 1);
    wish["spec"]["replicas"] = json!("two");
    wish
}

#[tokio::test(start_paused = true)]
async fn one_that_is_not_understood_is_told_so_once_beside_what_was_known_of_it() {
    let mut bad = malformed("m");
    let ready = json!({"type": "Ready", "status": "True", "reason": "AllReplicasReady", "message": "",
        "lastTransitionTime": "2026-11-24T00:00:00Z"});
    bad["status"] = json!({"phase": "Running", "conditions": [ready]});
    let works = Works::on([node("a"), bad]).begin(true).await;
    let (verdict, message) = works.condition("m", "Valid").expect("it is told");
    assert_eq!(verdict, "False SpecNotUnderstood");
    assert!(
        message.starts_with("spec.replicas: invalid type"),
        "{message}"
    );
    let ready = works.condition("m", "Ready").expect("it is kept");
    assert_eq!(ready.0, "True AllReplicasReady");
    tokio::time::sleep(s(1300)).await;
    assert_eq!(works.reports("m"), 1);

    let mut good = wish("m", 1);
    good["metadata"]["generation"] = json!(2);
    works.kept().put("modeldeployments", good);
    tokio::time::sleep(s(5)).await;
    let valid = works.condition("m", "Valid").expect("it is told");
    assert_eq!(valid.0, "True SpecValid");
    assert_eq!(works.count("pods"), 1);
}

#[tokio::test(start_paused = true)]
async fn of_a_thousand_one_that_is_malformed_holds_up_none_of_the_others() {
    let nodes = (0..125).map(|number| node(&format!("n{number}")));
    let wishes = (0..1000).map(|number| match number {
        500 => malformed("m500"),
        _ => wish(&format!("m{number}"), 1),
    });
    let works = Works::on(nodes.chain(wishes)).begin(true).await;
    tokio::time::sleep(s(60)).await;
    let planned = |name: &str| {
        let planned = works.condition(name, "Planned");
        planned.is_some_and(|(verdict, _)| verdict == "True FitFound")
    };
    let names: Vec<String> = (0..1000).map(|number| format!("m{number}")).collect();
    let without: Vec<&String> = names.iter().filter(|name| !planned(name)).collect();
    assert_eq!(without, ["m500"]);
    assert_eq!(works.count("pods"), 999);
    let (verdict, message) = works.condition("m500", "Valid").expect("it is told");
    assert_eq!(verdict, "False SpecNotUnderstood");
    assert!(message.starts_with("spec.replicas: "), "{message}");
    assert_eq!(works.reports("m500"), 1);
}

#[tokio::test(start_paused = true)]
async fn of_many_applied_in_three_seconds_each_is_told_of_its_plan_before_pods_are_made() {
    let nodes = (0..20).map(|number| node(&format!("n{number}")));
    let works = Works::on(nodes).begin(true).await;
    for batch in 0..10 {
        for number in 0..12 {
            let name = format!("m{}", batch * 12 + number);
            works.kept().put("modeldeployments", wish(&name, 1));
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    tokio::time::sleep(s(10)).await;
    assert_eq!(works.count("pods"), 120);
    let kept = works.kept();
    let mut told = BTreeSet::new();
    let before = kept.asked.iter().take_while(|asked| {
        if asked.starts_with("PATCH") && asked.contains("/status?") {
            told.insert((*asked).clone());
        }
        told.len() < 110
    });
    // The last of a batch may find nobody beside it, and makes its pod at once.
    let made = before.filter(|asked| asked.starts_with(PODS)).count();
    assert!(made <= 20, "{made} pods were made before 110 were told");
}
