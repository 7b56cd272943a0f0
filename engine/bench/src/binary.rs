//! The engine's binary from outside: its size, and the time from its start to its first token.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bench_report::{Row, median};

use crate::RUNS;

/// An engine that is not ready by then will not be.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pause between two looks at a port that is not open yet.
const PAUSE: Duration = Duration::from_millis(2);
/// A tokenizer that fits every model: its ids are below those of any real one.
const TOKENIZER: &str = include_str!("../../../e2e/models/tiny-r1/tokenizer.json");

/// Ends the process it holds.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Rows of `program`; `weight_bytes` of the checkpoint in `dir` are read at `bytes_per_second` at best.
///
/// # Errors
/// When the program is not there or gives no token.
pub(crate) fn rows(
    program: &Path,
    dir: &Path,
    weight_bytes: u64,
    bytes_per_second: f64,
) -> anyhow::Result<[Row; 2]> {
    let size = std::fs::metadata(program)
        .with_context(|| format!("--engine {}", program.display()))?
        .len();
    std::fs::write(dir.join("tokenizer.json"), TOKENIZER)?;
    let runs: anyhow::Result<Vec<f64>> = (0..RUNS).map(|_| first_token(program, dir)).collect();
    let bound = 1.0 + weight_bytes as f64 / bytes_per_second;
    let name = "start of the process to its first token, against 1 s plus bytes over bandwidth";
    Ok([
        Row::below("engine binary", size as f64 / 1e6, "MB", 40.0),
        Row::within(name, median(runs?), "s", bound),
    ])
}

/// Seconds from the start of the process to the answer of one token.
fn first_token(program: &Path, dir: &Path) -> anyhow::Result<f64> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let began = Instant::now();
    let child = Command::new(program)
        .args([
            "serve",
            "--device",
            "cpu",
            "--host",
            "127.0.0.1",
            "--max-model-len",
            "512",
        ])
        .args([
            "--served-model-name",
            "bench",
            "--port",
            &port.to_string(),
            "--model",
        ])
        .arg(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("--engine {}", program.display()))?;
    let mut running = Running(child);
    let body =
        r#"{"model":"bench","prompt":[1,2,3,4],"max_tokens":1,"temperature":0,"ignore_eos":true}"#;
    loop {
        if let Some(status) = running.0.try_wait()? {
            bail!("the engine ended before its first token: {status}");
        }
        if began.elapsed() > PATIENCE {
            bail!("the engine gave no token within {} s", PATIENCE.as_secs());
        }
        match ask(port, body) {
            Ok(answer) if answer.starts_with("HTTP/1.1 200") => {
                return Ok(began.elapsed().as_secs_f64());
            }
            // Not listening or not ready yet.
            Ok(answer) if !answer.starts_with("HTTP/1.1 503") => {
                bail!(
                    "the engine answered: {}",
                    answer.lines().next().unwrap_or_default()
                );
            }
            _ => std::thread::sleep(PAUSE),
        }
    }
}

/// One request and its whole answer.
fn ask(port: u16, body: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
