//! A cluster as a user sees it: through kubectl.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

/// Access to a cluster's API by one kubeconfig.
#[derive(Clone, Debug)]
pub struct Cluster {
    kubectl: PathBuf,
    kubeconfig: PathBuf,
}

impl Cluster {
    /// The cluster of a kubeconfig.
    pub fn new(kubeconfig: impl Into<PathBuf>) -> Self {
        Self {
            kubectl: crate::tool("kubectl"),
            kubeconfig: kubeconfig.into(),
        }
    }

    /// The cluster of `$KUBECONFIG`, else of the lab that `make up` keeps.
    ///
    /// # Errors
    /// When neither exists; says how to get one.
    pub fn from_environment() -> Result<Self> {
        let path = std::env::var_os("KUBECONFIG").map_or_else(
            || crate::root().join(".lab/admin.kubeconfig"),
            PathBuf::from,
        );
        if !path.is_file() {
            bail!(
                "no kubeconfig at {}: run `make up`, or set KUBECONFIG",
                path.display()
            );
        }
        Ok(Self::new(path))
    }

    /// Where the kubeconfig lies.
    pub fn kubeconfig(&self) -> &std::path::Path {
        &self.kubeconfig
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.kubectl);
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--request-timeout=20s")
            .args(arguments);
        command
    }

    /// Runs kubectl and returns what it printed.
    ///
    /// # Errors
    /// With what kubectl wrote to standard error.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let output = self
            .command(arguments)
            .output()
            .context("kubectl does not start")?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            bail!("kubectl {}: {}", arguments.join(" "), error.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `kubectl apply --server-side` of YAML text in a namespace.
    ///
    /// # Errors
    /// With the API server's words.
    pub fn apply(&self, namespace: &str, yaml: &str) -> Result<String> {
        self.with_input(
            &["apply", "--server-side", "-n", namespace, "-f", "-"],
            yaml,
        )
    }

    /// Runs kubectl with text on standard input.
    ///
    /// # Errors
    /// With what kubectl wrote to standard error.
    pub fn with_input(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("kubectl does not start")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// One object, or `None` when it does not exist.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub fn get(&self, namespace: &str, kind: &str, name: &str) -> Result<Option<Value>> {
        let text = self.kubectl(&[
            "get",
            kind,
            name,
            "-n",
            namespace,
            "--ignore-not-found",
            "-o",
            "json",
        ])?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&text)?))
    }

    /// All objects of a kind with a label selector (empty = all).
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub fn list(&self, namespace: &str, kind: &str, selector: &str) -> Result<Vec<Value>> {
        let text = self.kubectl(&["get", kind, "-n", namespace, "-l", selector, "-o", "json"])?;
        let value: Value = serde_json::from_str(&text)?;
        match value {
            Value::Object(mut list) => match list.remove("items") {
                Some(Value::Array(items)) => Ok(items),
                _ => Err(anyhow!("kubectl printed no list of {kind}")),
            },
            _ => Err(anyhow!("kubectl printed no object for {kind}")),
        }
    }

    /// Pods of a ModelDeployment's engine that are not being deleted.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn engine_pods(&self, namespace: &str, model: &str) -> Result<Vec<Value>> {
        let selector =
            format!("cachalot.dev/model-deployment={model},cachalot.dev/component=engine");
        let mut pods = self.list(namespace, "pods", &selector)?;
        pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        Ok(pods)
    }

    /// A namespace for one test, removed when the guard is dropped.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn namespace(&self, prefix: &str) -> Result<Namespace> {
        let name = format!("{prefix}-{}", std::process::id());
        let manifest = format!(
            "{{\"apiVersion\":\"v1\",\"kind\":\"Namespace\",\"metadata\":{{\"name\":\"{name}\",\"labels\":\
             {{\"pod-security.kubernetes.io/enforce\":\"restricted\"}}}}}}"
        );
        self.with_input(&["apply", "-f", "-"], &manifest)?;
        Ok(Namespace {
            cluster: self.clone(),
            name,
        })
    }
}

/// Status of a condition in an object: `("True", reason, message)`, or `None` when it is not there.
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let conditions = object["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|c| c["type"] == kind)?;
    let text = |field: &str| found[field].as_str().unwrap_or_default();
    Some((text("status"), text("reason"), text("message")))
}

/// A namespace that ends with its test; it enforces the restricted pod security standard.
#[derive(Debug)]
pub struct Namespace {
    cluster: Cluster,
    /// Its name.
    pub name: String,
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let arguments = ["delete", "namespace", &self.name, "--wait=false"];
        if let Err(error) = self.cluster.kubectl(&arguments) {
            eprintln!("namespace {} stays: {error}", self.name);
        }
    }
}
