//! The operator as a process: started for a run, asked through its metrics, stopped with the run.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use e2e::Ending;

use crate::cluster::Place;

/// In whose name it comes to the API server.
pub const USER: &str = "bench-cachalot";

/// The newest operator that cargo built.
pub fn newest_operator() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| e2e::root().join("target"), PathBuf::from);
    let built = target.join("release/operator");
    if built.is_file() {
        return Ok(built);
    }
    bail!(
        "{}: build it with cargo build --release -p operator, or give --operator",
        built.display()
    )
}

/// A process that ends when dropped, and with this process.
pub struct Ended {
    child: Child,
    ending: Option<Ending>,
}

impl Ended {
    /// Starts it.
    pub fn start(command: &mut Command) -> Result<Self> {
        let child = command
            .spawn()
            .with_context(|| command.get_program().to_string_lossy().into_owned())?;
        let ending = Ending::new("kill -9 \"$1\"", &[&child.id().to_string()])?;
        Ok(Self {
            child,
            ending: Some(ending),
        })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // In this order: until it is waited for, its number is nobody else's.
        drop(self.ending.take());
        let _ = self.child.wait();
    }
}

/// A running operator; stopped when dropped.
pub struct Operator {
    process: Ended,
    log: PathBuf,
}

impl Operator {
    /// Starts it without leader election, on a port of its own.
    pub fn start(place: &Place<'_>) -> Result<Self> {
        let log = place.log;
        let mut command = Command::new(place.binary);
        command
            .args(["run", "--engine-image=localhost/cachalot-engine:dev"])
            .args([
                "--bind=127.0.0.1:0",
                "--leader-elect=false",
                "--scrape-timeout=200ms",
            ])
            .env("KUBECONFIG", place.kubeconfig(USER)?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(log)?);
        Ok(Self {
            process: Ended::start(&mut command)?,
            log: log.to_path_buf(),
        })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    fn text(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until it acts.
    pub async fn wait_leading(&self) -> Result<()> {
        let start = Instant::now();
        while !self.text().contains("leading") {
            if start.elapsed() > Duration::from_secs(60) {
                bail!("the operator does not lead: {}", self.text());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Sum of a metric over its labels; 0 while there is none.
    pub fn sum(metrics: &str, name: &str) -> f64 {
        Self::sum_where(metrics, name, "")
    }

    /// Sum of those series of a metric that have a label, given as `name="value"`; 0 while there is none.
    pub fn sum_where(metrics: &str, name: &str, label: &str) -> f64 {
        metrics
            .lines()
            .filter(|line| {
                line.strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with(['{', ' ']) && rest.contains(label))
            })
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Processor seconds that it has used so far.
    pub fn processor_seconds(&self) -> Result<f64> {
        processor_seconds(self.id())
    }

    /// Resident megabytes, as it says itself.
    pub fn resident_megabytes(metrics: &str) -> Result<f64> {
        match Self::sum(metrics, "process_resident_memory_bytes") {
            bytes if bytes > 0.0 => Ok(bytes / 1e6),
            _ => bail!("the operator does not say how much memory it takes"),
        }
    }

    /// The most megabytes that were resident at once.
    pub fn peak_megabytes(&self) -> Result<f64> {
        megabytes(self.id(), "VmHWM")
    }

    /// Its exposition.
    pub fn metrics(&self) -> Result<String> {
        let text = self.text();
        let address = text
            .lines()
            .find(|line| line.contains("operator started"))
            .and_then(|line| line.split("127.0.0.1:").nth(1))
            .map(|rest| {
                rest.chars()
                    .take_while(char::is_ascii_digit)
                    .collect::<String>()
            })
            .context("the operator does not say where it listens")?;
        let mut answer = ureq::get(format!("http://127.0.0.1:{address}/metrics")).call()?;
        Ok(answer.body_mut().read_to_string()?)
    }
}

/// Megabytes of a process by a field of its `/proc/PROCESS/status`.
pub fn megabytes(process: u32, field: &str) -> Result<f64> {
    let path = format!("/proc/{process}/status");
    let text = std::fs::read_to_string(&path).context("it has ended")?;
    let kibibytes = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    Ok(kibibytes.with_context(|| format!("{path} has no {field}"))? * 1024.0 / 1e6)
}

/// Processor seconds that a process has used so far, from `/proc`.
pub fn processor_seconds(process: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // Fields 14 and 15, counted after the name, which may hold spaces; in hundredths of a second on Linux.
    let fields = stat.rsplit(") ").next().unwrap_or_default();
    let ticks: Vec<f64> = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse().ok())
        .collect();
    if ticks.len() < 2 {
        bail!("/proc/{process}/stat holds no processor times: {stat}");
    }
    Ok(ticks.iter().sum::<f64>() / 100.0)
}
