//! What the control-plane tests share: a lab with the CRD and the chart's rights, and the real operator binary run with
//! the chart's ServiceAccount, never as an administrator.
#![allow(dead_code)] // Each test binary uses a part of it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use e2e::{Cluster, Lab, eventually};
use serde_json::{Value, json};

pub const SYSTEM: &str = "cachalot-system";
pub const SOON: Duration = Duration::from_secs(30);

/// A lab that knows ModelDeployments and has the operator's ServiceAccount with its rights.
pub struct Stand {
    pub lab: Lab,
    pub cluster: Cluster,
    folder: tempfile::TempDir,
}

impl Stand {
    pub fn start() -> Self {
        let lab = Lab::start().expect("a lab");
        let cluster = lab.cluster();
        let stand = Stand {
            lab,
            cluster,
            folder: tempfile::tempdir().expect("a folder"),
        };
        stand
            .cluster
            .kubectl(&["create", "namespace", SYSTEM])
            .expect("a namespace");
        stand.apply_crd();
        stand.apply_rights(&read("charts/tests/golden/default.yaml"));
        stand
    }

    /// Gives the operator the rights of a render of the chart. The goldens are what it renders; a test of their own
    /// proves that.
    pub fn apply_rights(&self, chart: &str) {
        let rights: Vec<&str> = chart
            .split("\n---\n")
            .filter(|document| {
                [
                    "ServiceAccount",
                    "Role",
                    "RoleBinding",
                    "ClusterRole",
                    "ClusterRoleBinding",
                ]
                .iter()
                .any(|kind| document.contains(&format!("kind: {kind}\n")))
            })
            .collect();
        assert!(rights.len() >= 5, "{rights:?}");
        self.cluster
            .with_input(
                &["apply", "--server-side", "-f", "-"],
                &rights.join("\n---\n"),
            )
            .expect("rights");
    }

    fn apply_crd(&self) {
        let folder = e2e::root().join("charts/cachalot-crds/templates");
        let crd = std::fs::read_dir(folder)
            .expect("the chart's templates")
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "yaml")
            })
            .expect("the generated CRD");
        let path = crd.to_str().expect("UTF-8").to_string();
        self.cluster
            .kubectl(&["apply", "--server-side", "-f", &path])
            .expect("the CRD is accepted");
        self.cluster
            .kubectl(&[
                "wait",
                "--for=condition=Established",
                "crd/modeldeployments.cachalot.dev",
                "--timeout=30s",
            ])
            .expect("the CRD is established");
    }

    /// Access with the ServiceAccount's token.
    pub fn service_account(&self) -> PathBuf {
        let token = self
            .cluster
            .kubectl(&["create", "token", "cachalot", "-n", SYSTEM, "--duration=2h"])
            .expect("a token");
        let admin = self
            .cluster
            .kubectl(&["config", "view", "--raw", "-o", "json"])
            .expect("the kubeconfig");
        let mut config: Value = serde_json::from_str(&admin).expect("JSON");
        let user = config["contexts"][0]["context"]["user"].clone();
        config["users"] = json!([{ "name": user, "user": { "token": token.trim() } }]);
        let path = self.folder.path().join("operator.kubeconfig");
        std::fs::write(&path, config.to_string()).expect("written");
        path
    }

    /// Simulated nodes with eight H200 each, called `<prefix>-0001` and so on.
    pub fn simulate(&self, prefix: &str, nodes: usize) {
        let count = nodes.to_string();
        let kind = [
            "--gpus",
            "8",
            "--product",
            "NVIDIA-H200",
            "--memory-mib",
            "143771",
        ];
        let mut arguments = vec!["simulate", "--prefix", prefix, "--count", &count];
        arguments.extend(kind);
        self.lab.kubelab(&arguments).expect("simulated nodes");
        eventually("simulated nodes are ready", Duration::from_secs(60), || {
            let all = self
                .cluster
                .list("", "nodes", "type=kwok")
                .map_err(|error| error.to_string())?;
            let named = |node: &&Value| {
                node["metadata"]["name"]
                    .as_str()
                    .is_some_and(|name| name.starts_with(prefix))
            };
            let ready = all
                .iter()
                .filter(named)
                .filter(|node| is_true(node, "Ready"))
                .count();
            if ready == nodes {
                Ok(())
            } else {
                Err(format!("{ready} of {nodes}"))
            }
        });
    }

    /// Starts the operator; `name` tells several apart.
    pub fn operator(&self, name: &str, more: &[&str]) -> Operator {
        Operator::start(self, name, more)
    }
}

/// A running operator; killed when dropped.
pub struct Operator {
    child: Child,
    pub log: PathBuf,
    pub admin: String,
}

/// The operator's binary: given by `$CACHALOT_OPERATOR`, else the newest that cargo built.
fn binary() -> PathBuf {
    if let Some(given) = std::env::var_os("CACHALOT_OPERATOR") {
        return given.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| e2e::root().join("target"), PathBuf::from);
    let built = ["release", "debug"].map(|profile| target.join(profile).join("operator"));
    let age = |path: &Path| path.metadata().and_then(|data| data.modified()).ok();
    built
        .into_iter()
        .filter(|path| path.is_file())
        .max_by_key(|path| age(path))
        .expect("the operator is not built: cargo build -p operator, or set CACHALOT_OPERATOR")
}

impl Operator {
    fn start(stand: &Stand, name: &str, more: &[&str]) -> Self {
        let log = stand.folder.path().join(format!("{name}.log"));
        let output = File::create(&log).expect("a log");
        let child = Command::new(binary())
            .args([
                "run",
                "--engine-image=localhost/cachalot-engine:dev",
                "--bind=127.0.0.1:0",
                "--lease-namespace",
                SYSTEM,
            ])
            .args([
                "--identity",
                name,
                "--log-level=info,operator=debug,operator_k8s=debug",
                "--scrape-timeout=200ms",
            ])
            .args(more)
            .env("KUBECONFIG", stand.service_account())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .spawn()
            .expect("the operator starts");
        let mut operator = Operator {
            child,
            log,
            admin: String::new(),
        };
        operator.admin = eventually("the operator says where it listens", SOON, || {
            let log = operator.log();
            let started = log
                .lines()
                .find(|line| line.contains("operator started"))
                .ok_or(log.clone())?;
            let address = started
                .split("admin=")
                .nth(1)
                .and_then(|rest| rest.split_whitespace().next());
            address.map(str::to_string).ok_or(started.to_string())
        });
        operator
    }

    pub fn log(&self) -> String {
        let text = std::fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default();
        strip_colour(&text)
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(5)))
            .http_status_as_error(false)
            .build()
            .into();
        match agent.get(format!("http://{}{path}", self.admin)).call() {
            Ok(mut response) => (
                response.status().as_u16(),
                response.body_mut().read_to_string().unwrap_or_default(),
            ),
            Err(error) => (0, error.to_string()),
        }
    }

    /// The value of a metric without labels, or with exactly those given.
    pub fn metric(&self, series: &str) -> Option<f64> {
        let (_, text) = self.get("/metrics");
        let line = text.lines().find(|line| {
            line.strip_prefix(series)
                .is_some_and(|rest| rest.starts_with(' '))
        })?;
        line.rsplit(' ').next()?.parse().ok()
    }

    pub fn wait_leading(&self) {
        eventually("the operator leads", SOON, || {
            if self.log().contains("leading") && self.get("/readyz").0 == 200 {
                Ok(())
            } else {
                Err(self.log())
            }
        });
    }

    /// SIGTERM, as Kubernetes stops a pod.
    pub fn terminate(mut self) -> String {
        let pid = self.child.id().to_string();
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .expect("a signal");
        eventually("the operator stops", SOON, || match self.child.try_wait() {
            Ok(Some(status)) if status.success() => Ok(()),
            other => Err(format!("{other:?}")),
        });
        self.log()
    }

    /// SIGKILL, as a node that dies.
    pub fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("gone");
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the operator ---\n{}", tail(&self.log(), 80));
        }
    }
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn strip_colour(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('\u{1b}') {
        plain.push_str(&rest[..start]);
        rest = rest[start..].split_once('m').map_or("", |(_, after)| after);
    }
    plain.push_str(rest);
    plain
}

pub fn read(path: &str) -> String {
    std::fs::read_to_string(e2e::root().join(path)).expect("a file of the repository")
}

pub fn is_true(object: &Value, kind: &str) -> bool {
    e2e::cluster::condition(object, kind).is_some_and(|(status, ..)| status == "True")
}

/// Waits for a condition of a ModelDeployment and returns its message.
pub fn wait_condition(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    kind: &str,
    status: &str,
    within: Duration,
) -> String {
    eventually(&format!("{name} {kind}={status}"), within, || {
        let object = cluster
            .get(namespace, "mdep", name)
            .map_err(|error| error.to_string())?
            .ok_or("it is not there")?;
        match e2e::cluster::condition(&object, kind) {
            Some((seen, _, message)) if seen == status => Ok(message.to_string()),
            _ => Err(object["status"].to_string()),
        }
    })
}

/// `kind/name uid` of every object that carries the ModelDeployment's label.
pub fn children(cluster: &Cluster, namespace: &str, name: &str) -> Vec<String> {
    let selector = format!("cachalot.dev/model-deployment={name}");
    let mut found = Vec::new();
    for kind in ["pods", "configmaps", "services", "poddisruptionbudgets"] {
        for object in cluster.list(namespace, kind, &selector).expect("a list") {
            let metadata = &object["metadata"];
            found.push(format!(
                "{kind}/{} {}",
                metadata["name"].as_str().unwrap_or("?"),
                metadata["uid"].as_str().unwrap_or("?")
            ));
        }
    }
    found.sort();
    found
}

/// DeepSeek-R1 on simulated nodes, planned from its published config.
pub fn fleet(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: cachalot.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: {name}}}\nspec:\n  model:\n    source: \
         hf://deepseek-ai/DeepSeek-R1\n    configMapRef: {{name: deepseek-r1-config}}\n  context: {{maxTokens: 32768, \
         maxConcurrentSequences: 16}}\n  placement:\n    tolerations: [{{key: kwok.x-k8s.io/node, operator: Exists}}]\n{spec}"
    )
}

/// The config map of the guide.
pub fn config_of_r1() -> String {
    read("docs/guide/gpu-fleet.yaml")
        .split("\n---\n")
        .next()
        .expect("a first document")
        .to_string()
}
