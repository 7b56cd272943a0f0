//! Files over HTTP into a directory: resumed, checked, and complete or not there.
//!
//! Invariant: a file under its final name is complete and has the size (and digest, where the server told one) that was
//! announced; whatever is unfinished is called `NAME.part` and is continued by the next attempt, also after a restart.
//! Everything is bounded: attempts, time of a request, files at once.
//!
//! Surprise: bodies are asked for in pieces of [`PIECE_BYTES`]. A stalled connection then costs one piece's time limit
//! and not a whole shard, and the limit can be a plain total instead of a watchdog on progress.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::http::Response;
use ureq::{Agent, Body};

use crate::cache::wait_for;
use crate::{LoadError, Progress};

/// Bytes of one range request.
const PIECE_BYTES: u64 = 64 << 20;
/// Bytes between two looks at progress.
const BUFFER_BYTES: usize = 256 << 10;
/// A piece that breaks off after this many bytes counts as progress, not as a failed attempt.
const PROGRESS_BYTES_MIN: u64 = 1 << 20;
/// Answers that describe a model (listings) are not larger.
const LISTING_BYTES_MAX: u64 = 64 << 20;
/// Held while a folder is filled.
const LOCK_FILE: &str = ".lock";
/// Files fetched at the same time.
const FILES_AT_ONCE: usize = 4;

/// How patient downloads are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Attempts in a row that may bring nothing new before a file is given up.
    pub attempts: u32,
    /// Wait before the second attempt; doubles with each further one, up to sixteen times this.
    pub first_wait: Duration,
    /// For connecting and for the response's head.
    pub head_timeout: Duration,
    /// For one piece of a body.
    pub piece_timeout: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            attempts: 6,
            first_wait: Duration::from_millis(500),
            head_timeout: Duration::from_secs(20),
            piece_timeout: Duration::from_secs(300),
        }
    }
}

/// A file to fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    /// Plain file name, remote and local.
    pub name: String,
    /// Announced size.
    pub bytes: u64,
    /// Announced SHA-256 in lowercase hex.
    pub sha256: Option<String>,
}

/// What a server must be told with each request; made anew for each, since signatures expire.
pub(crate) trait Origin: Sync {
    /// URL of a file.
    fn url(&self, file: &str) -> String;
    /// `Authorization` header.
    fn authorization(&self) -> Option<String>;
    /// For messages: the model and where it is.
    fn describe(&self) -> String;
}

/// A client with limits.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    agent: Agent,
    patience: Patience,
}

/// Why one attempt brought no answer.
enum Attempt {
    /// Trying again may help.
    Again(String),
    /// It will not.
    Never(LoadError),
}

impl Client {
    pub fn new(patience: Patience) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(5)
            .timeout_resolve(Some(patience.head_timeout))
            .timeout_connect(Some(patience.head_timeout))
            .timeout_recv_response(Some(patience.head_timeout))
            .timeout_recv_body(Some(patience.piece_timeout))
            .user_agent(concat!("cachalot/", env!("CARGO_PKG_VERSION")))
            .build();
        Self {
            agent: config.into(),
            patience,
        }
    }

    /// A small document.
    ///
    /// # Errors
    /// After the last attempt, or at once when the server refuses.
    pub fn text(
        &self,
        url: &dyn Fn() -> String,
        authorization: Option<&str>,
        what: &str,
    ) -> Result<String, LoadError> {
        self.retry(what, || {
            let mut response = self.get(&url(), authorization, None, what)?;
            response
                .body_mut()
                .with_config()
                .limit(LISTING_BYTES_MAX)
                .read_to_string()
                .map_err(|error| Attempt::Again(error.to_string()))
        })
    }

    /// The bytes of a file from `start` to `end`, or as many as it has.
    ///
    /// # Errors
    /// As [`Client::text`].
    pub fn range(
        &self,
        origin: &dyn Origin,
        file: &str,
        start: u64,
        end: u64,
    ) -> Result<Vec<u8>, LoadError> {
        let what = format!("{file} of {}", origin.describe());
        let header = format!("bytes={start}-{}", end.saturating_sub(1));
        self.retry(&what, || {
            let authorization = origin.authorization();
            let response = self.get(
                &origin.url(file),
                authorization.as_deref(),
                Some(&header),
                &what,
            )?;
            let skip = if response.status() == 206 { 0 } else { start };
            let again = |error: std::io::Error| Attempt::Again(error.to_string());
            let mut body = response.into_body().into_reader();
            std::io::copy(&mut body.by_ref().take(skip), &mut std::io::sink()).map_err(again)?;
            let mut bytes = Vec::new();
            body.take(end - start)
                .read_to_end(&mut bytes)
                .map_err(again)?;
            Ok(bytes)
        })
    }

    /// Fetches `files` into `dir`, skipping what is complete.
    ///
    /// # Errors
    /// The first file's that could not be fetched; the others stop at their next buffer.
    pub fn fetch_all(
        &self,
        origin: &dyn Origin,
        files: &[RemoteFile],
        dir: &Path,
        progress: &Progress,
    ) -> Result<(), LoadError> {
        // Two writers of one unfinished file would mix their bytes. The lock goes with the process, and the next one
        // continues where it ended.
        let lock_path = dir.join(LOCK_FILE);
        let lock = File::create(&lock_path).map_err(|source| write_error(&lock_path, 0, source))?;
        let total = files.iter().map(|file| file.bytes).sum();
        let Patience {
            attempts,
            piece_timeout,
            ..
        } = self.patience;
        wait_for(&lock, &lock_path, piece_timeout * attempts, || {
            let done = files.iter().map(|file| bytes_there(dir, file)).sum();
            progress.begin(total);
            progress.add(done);
            done
        })?;
        progress.begin(total);
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let first_error = Mutex::new(None);
        let work = || {
            while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = self.fetch(origin, file, dir, progress, &stop) {
                    stop.store(true, Ordering::Relaxed);
                    if let Ok(mut slot) = first_error.lock() {
                        slot.get_or_insert(error);
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..FILES_AT_ONCE.min(files.len()) {
                scope.spawn(work);
            }
            work();
        });
        match first_error.into_inner() {
            Ok(None) => Ok(()),
            Ok(Some(error)) => Err(error),
            Err(_) => Err(LoadError::Backend("a download thread panicked".into())),
        }
    }

    fn fetch(
        &self,
        origin: &dyn Origin,
        file: &RemoteFile,
        dir: &Path,
        progress: &Progress,
        stop: &AtomicBool,
    ) -> Result<(), LoadError> {
        let path = dir.join(&file.name);
        if path.metadata().is_ok_and(|found| found.len() == file.bytes) {
            progress.add(file.bytes);
            return Ok(());
        }
        let part = part_path(dir, file);
        let mut download = Download::resume(&part, file)?;
        progress.add(download.done);
        let what = format!("{} of {}", file.name, origin.describe());
        // A piece is retried with patience; each one that arrives starts the count anew.
        while download.done < file.bytes && !stop.load(Ordering::Relaxed) {
            self.retry(&what, || {
                self.piece(origin, file, &mut download, progress, stop, &what)
            })?;
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        download.finish(&path)
    }

    /// Appends at most one piece to the download.
    fn piece(
        &self,
        origin: &dyn Origin,
        file: &RemoteFile,
        download: &mut Download,
        progress: &Progress,
        stop: &AtomicBool,
        what: &str,
    ) -> Result<(), Attempt> {
        let range = download.done..file.bytes.min(download.done + PIECE_BYTES);
        let header = format!("bytes={}-{}", range.start, range.end - 1);
        let authorization = origin.authorization();
        let response = self.get(
            &origin.url(&file.name),
            authorization.as_deref(),
            Some(&header),
            what,
        )?;
        let whole = response.status() != 206;
        check_total(&response, file, whole).map_err(Attempt::Never)?;
        let mut body = response.into_body().into_reader();
        if whole && range.start > 0 {
            // The server ignores ranges: skip what is already there.
            let skipped = std::io::copy(&mut body.by_ref().take(range.start), &mut std::io::sink())
                .map_err(|error| Attempt::Again(error.to_string()))?;
            if skipped != range.start {
                return Err(Attempt::Again("the answer was cut short".into()));
            }
        }
        let end = if whole { file.bytes } else { range.end };
        let mut buffer = vec![0; BUFFER_BYTES];
        while download.done < end && !stop.load(Ordering::Relaxed) {
            let room = BUFFER_BYTES.min((end - download.done) as usize);
            let problem = match body.read(&mut buffer[..room]) {
                Ok(0) => "the answer was cut short".into(),
                Ok(count) => {
                    download.append(&buffer[..count]).map_err(Attempt::Never)?;
                    progress.add(count as u64);
                    continue;
                }
                Err(error) => error.to_string(),
            };
            if download.done >= range.start + PROGRESS_BYTES_MIN {
                return Ok(());
            }
            return Err(Attempt::Again(problem));
        }
        Ok(())
    }

    fn get(
        &self,
        url: &str,
        authorization: Option<&str>,
        range: Option<&str>,
        what: &str,
    ) -> Result<Response<Body>, Attempt> {
        let mut request = self.agent.get(url);
        for (name, value) in [("authorization", authorization), ("range", range)] {
            if let Some(value) = value {
                request = request.header(name, value);
            }
        }
        let response = request
            .call()
            .map_err(|error| Attempt::Again(error.to_string()))?;
        match response.status().as_u16() {
            200 | 206 => Ok(response),
            401 | 403 => Err(Attempt::Never(LoadError::AccessDenied(format!(
                "{what}: the server answered {}; check the credentials in the model's secretRef, and that they may read it",
                response.status()
            )))),
            404 | 410 => Err(Attempt::Never(LoadError::NotFound(format!(
                "{what}: the server answered {}; check name and revision",
                response.status()
            )))),
            408 | 425 | 429 | 500..=599 => Err(Attempt::Again(format!(
                "the server answered {}",
                response.status()
            ))),
            _ => Err(Attempt::Never(LoadError::Unreachable(format!(
                "{what}: the server answered {}",
                response.status()
            )))),
        }
    }

    fn retry<T>(
        &self,
        what: &str,
        mut attempt: impl FnMut() -> Result<T, Attempt>,
    ) -> Result<T, LoadError> {
        let mut wait = self.patience.first_wait;
        let mut tried = 1;
        loop {
            let problem = match attempt() {
                Ok(value) => return Ok(value),
                Err(Attempt::Never(error)) => return Err(error),
                Err(Attempt::Again(problem)) => problem,
            };
            if tried >= self.patience.attempts {
                return Err(LoadError::Unreachable(format!(
                    "{what}: {problem} ({tried} attempts)"
                )));
            }
            tracing::warn!(what, problem, attempt = tried, "download attempt failed");
            std::thread::sleep(wait);
            tried += 1;
            wait = (wait * 2).min(self.patience.first_wait * 16);
        }
    }
}

fn part_path(dir: &Path, file: &RemoteFile) -> PathBuf {
    dir.join(format!("{}.part", file.name))
}

/// Bytes of a file that are there, finished or not.
fn bytes_there(dir: &Path, file: &RemoteFile) -> u64 {
    let part = || part_path(dir, file).metadata();
    let found = dir.join(&file.name).metadata().or_else(|_| part());
    found.map_or(0, |found| found.len())
}

/// The size the server now states must be the announced one.
fn check_total(response: &Response<Body>, file: &RemoteFile, whole: bool) -> Result<(), LoadError> {
    let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
    let total: Option<u64> = if whole {
        header("content-length").and_then(|length| length.parse().ok())
    } else {
        header("content-range")
            .and_then(|range| range.rsplit('/').next())
            .and_then(|total| total.parse().ok())
    };
    match total {
        Some(total) if total != file.bytes => Err(LoadError::Corrupt {
            file: file.name.clone(),
            problem: format!(
                "the server has {total} bytes, announced were {}",
                file.bytes
            ),
        }),
        _ => Ok(()),
    }
}

/// A file being written.
struct Download {
    path: PathBuf,
    file: File,
    hash: Option<Sha256>,
    expected: RemoteFile,
    done: u64,
}

impl Download {
    /// Continues `part`, hashing what is there.
    fn resume(part: &Path, expected: &RemoteFile) -> Result<Self, LoadError> {
        let failed = |source| write_error(part, expected.bytes, source);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(part)
            .map_err(failed)?;
        let found = file.metadata().map_err(failed)?.len();
        if found > expected.bytes {
            file.set_len(0).map_err(failed)?;
        }
        let mut hash = expected.sha256.is_some().then(Sha256::new);
        let mut done = 0;
        let mut buffer = vec![0; BUFFER_BYTES];
        // Also moves the write position to the end.
        while done < found.min(expected.bytes) {
            let count = file.read(&mut buffer).map_err(failed)?;
            if count == 0 {
                break;
            }
            if let Some(hash) = &mut hash {
                hash.update(&buffer[..count]);
            }
            done += count as u64;
        }
        Ok(Self {
            path: part.into(),
            file,
            hash,
            expected: expected.clone(),
            done,
        })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        let missing = self.expected.bytes - self.done;
        self.file
            .write_all(bytes)
            .map_err(|source| write_error(&self.path, missing, source))?;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        self.done += bytes.len() as u64;
        Ok(())
    }

    fn finish(self, path: &Path) -> Result<(), LoadError> {
        let failed = |source| write_error(&self.path, 0, source);
        self.file.sync_all().map_err(failed)?;
        let found = self.hash.map(|hash| hex(&hash.finalize()));
        if let (Some(found), Some(expected)) = (&found, &self.expected.sha256)
            && found != expected
        {
            // Continuing a wrong file would fail for ever.
            std::fs::remove_file(&self.path).map_err(failed)?;
            return Err(LoadError::Corrupt {
                file: self.expected.name,
                problem: format!("sha256 is {found}, announced was {expected}; fetch it again"),
            });
        }
        std::fs::rename(&self.path, path).map_err(failed)
    }
}

/// A failed write as the fault it is.
pub(crate) fn write_error(path: &Path, needed_bytes: u64, source: std::io::Error) -> LoadError {
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => LoadError::DiskFull {
            path: path.into(),
            needed_bytes,
        },
        _ => LoadError::Write {
            path: path.into(),
            source,
        },
    }
}

/// Lowercase hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
