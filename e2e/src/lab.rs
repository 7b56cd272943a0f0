//! A control plane for one test: started by kubelab on free loopback ports, stopped with the test.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::Cluster;

/// A running lab without a real node; needs no root.
#[derive(Debug)]
pub struct Lab {
    dir: tempfile::TempDir,
    kubelab: PathBuf,
}

impl Lab {
    /// Starts a control plane.
    ///
    /// # Errors
    /// When kubelab is not built (says how) or the lab does not come up (with its own words).
    pub fn start() -> Result<Self> {
        let kubelab = crate::tool("kubelab");
        let dir = tempfile::tempdir().context("no folder for the lab")?;
        let output = Command::new(&kubelab)
            .args(["up", "--detach", "--dir"])
            .arg(dir.path())
            .output()
            .with_context(|| {
                format!(
                    "{} does not start; `make tools` builds it",
                    kubelab.display()
                )
            })?;
        let lab = Self { dir, kubelab };
        if !output.status.success() {
            bail!(
                "the lab did not start: {}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(lab)
    }

    /// Its administrator's access.
    pub fn cluster(&self) -> Cluster {
        Cluster::new(self.dir.path().join("admin.kubeconfig"))
    }

    /// Runs another kubelab command on this lab.
    ///
    /// # Errors
    /// With what it printed.
    pub fn kubelab(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new(&self.kubelab)
            .args(arguments)
            .arg("--dir")
            .arg(self.dir.path())
            .output()?;
        if !output.status.success() {
            bail!(
                "kubelab {}: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.kubelab(&["down"]) {
            eprintln!(
                "the lab in {} may still run: {error}",
                self.dir.path().display()
            );
        }
    }
}
