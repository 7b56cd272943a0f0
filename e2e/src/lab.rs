//! A control plane for one test: started by kubelab on free loopback ports, stopped with the test, also when that is
//! killed.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{Cluster, Ending};

/// A running lab without a real node; needs no root.
#[derive(Debug)]
pub struct Lab {
    /// Before the folder, which it needs.
    _ending: Ending,
    dir: tempfile::TempDir,
    kubelab: PathBuf,
}

impl Lab {
    /// Starts a control plane.
    ///
    /// # Errors
    /// When kubelab is not built (says how) or the lab does not come up (with its own words).
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// Starts a control plane with more flags of `kubelab up`.
    ///
    /// # Errors
    /// As [`Lab::start`].
    pub fn start_with(flags: &[&str]) -> Result<Self> {
        let kubelab = crate::tool("kubelab");
        let dir = tempfile::tempdir().context("no folder for the lab")?;
        // Made before the lab, so that one that is killed while it starts is ended as well.
        let ending = Ending::new(
            "\"$1\" down --dir \"$2\" && rm -rf \"$2\"",
            &[&kubelab.to_string_lossy(), &dir.path().to_string_lossy()],
        )?;
        let output = Command::new(&kubelab)
            .args(["up", "--detach", "--dir"])
            .arg(dir.path())
            .args(flags)
            .output()
            .with_context(|| {
                format!(
                    "{} does not start; `make tools` builds it",
                    kubelab.display()
                )
            })?;
        if !output.status.success() {
            bail!(
                "the lab did not start: {}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(Self {
            _ending: ending,
            dir,
            kubelab,
        })
    }

    /// Its administrator's access.
    pub fn cluster(&self) -> Cluster {
        Cluster::new(self.dir.path().join("admin.kubeconfig"))
    }

    /// What the API server logs of writes, if started with `--audit`.
    pub fn audit_log(&self) -> PathBuf {
        self.dir.path().join("audit.log")
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
