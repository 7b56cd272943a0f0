//! Fetching from a hub and from an object store that misbehave, over a real HTTP server on loopback.

// Helpers of tests are no tests to clippy.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine_load::{FetchSettings, LoadError, Patience, Progress, inspect, inspect_source, resolve};
use engine_spec::ModelFault;
use serde_json::json;
use sha2::{Digest, Sha256};
use support::{config, file, tensors};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef";

/// What the server does to requests for the weight file.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Good,
    /// The first so many answers break off after 100 bytes.
    Breaks(usize),
    /// The first so many answers are 503.
    Busy(usize),
    /// Ignores ranges, and breaks off once.
    NoRanges,
    /// Other bytes than announced.
    Wrong,
    /// 403 for everything.
    Denies,
    /// 404 for everything.
    KnowsNothing,
}

struct Server {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

struct State {
    files: HashMap<String, Vec<u8>>,
    mood: Mood,
    answered: AtomicUsize,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(mood: Mood) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let files = HashMap::from([
            ("config.json".to_owned(), config().to_string().into_bytes()),
            ("model.safetensors".to_owned(), file(&tensors(&config()))),
            ("README.md".to_owned(), b"not for serving".to_vec()),
        ]);
        let state = Arc::new(State {
            files,
            mood,
            answered: AtomicUsize::new(0),
            requests: Arc::clone(&requests),
        });
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&state);
                std::thread::spawn(move || state.answer(stream));
            }
        });
        Self { address, requests }
    }

    fn count(&self, part: &str) -> usize {
        let requests = self.requests.lock().unwrap();
        requests.iter().filter(|line| line.contains(part)).count()
    }
}

impl State {
    fn answer(&self, mut stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut head = String::new();
        while reader.read_line(&mut head).ok()? > 2 {}
        self.requests.lock().ok()?.push(head.clone());
        let path = head.split_whitespace().nth(1)?.to_owned();
        let name = path.split('?').next()?.rsplit('/').next()?.to_owned();
        match self.mood {
            Mood::Denies => return plain(&mut stream, "403 Forbidden", ""),
            Mood::KnowsNothing => return plain(&mut stream, "404 Not Found", ""),
            _ => (),
        }
        if path.starts_with("/api/models/") {
            return plain(&mut stream, "200 OK", &self.hub_listing());
        }
        if path.contains("list-type=2") {
            return plain(&mut stream, "200 OK", &self.store_listing());
        }
        let Some(mut body) = self.files.get(&name).cloned() else {
            return plain(&mut stream, "404 Not Found", "");
        };
        let range = head
            .lines()
            .find_map(|line| {
                line.to_ascii_lowercase()
                    .strip_prefix("range: bytes=")
                    .map(str::to_owned)
            })
            .and_then(|range| {
                let (start, end) = range.trim().split_once('-')?;
                Some(start.parse::<usize>().ok()?..end.parse::<usize>().ok()? + 1)
            })
            .unwrap_or(0..body.len());
        let mut sent = usize::MAX;
        if name == "model.safetensors" {
            let earlier = self.answered.fetch_add(1, Ordering::SeqCst);
            match self.mood {
                Mood::Busy(times) if earlier < times => {
                    return plain(&mut stream, "503 Service Unavailable", "");
                }
                Mood::Breaks(times) if earlier < times => sent = 100,
                Mood::NoRanges if earlier == 0 => sent = 100,
                Mood::Wrong => *body.last_mut()? ^= 1,
                _ => (),
            }
        }
        let total = body.len();
        let (status, part) = if self.mood == Mood::NoRanges {
            ("200 OK".to_owned(), &body[..])
        } else {
            let [start, end] = [range.start, range.end];
            let status = format!(
                "206 Partial Content\r\nContent-Range: bytes {start}-{}/{total}",
                end - 1
            );
            (status, &body[range])
        };
        let length = part.len();
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        )
        .ok()?;
        stream.write_all(&part[..length.min(sent)]).ok()
    }

    fn hub_listing(&self) -> String {
        let siblings: Vec<_> = self
            .files
            .iter()
            .map(|(name, bytes)| {
                let hash: String = Sha256::digest(bytes)
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect();
                let lfs = name
                    .ends_with(".safetensors")
                    .then(|| json!({"sha256": hash}));
                json!({"rfilename": name, "size": bytes.len(), "lfs": lfs})
            })
            .collect();
        json!({"sha": COMMIT, "siblings": siblings}).to_string()
    }

    fn store_listing(&self) -> String {
        let objects: String = self
            .files
            .iter()
            .map(|(name, bytes)| {
                format!(
                    "<Contents><Key>models/tiny/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                     <ETag>\"tag\"</ETag><Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>",
                    bytes.len()
                )
            })
            .collect();
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\
             <ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>bucket</Name>\
             <Prefix>models/tiny/</Prefix><KeyCount>3</KeyCount><MaxKeys>1000</MaxKeys><Delimiter>/</Delimiter>\
             <EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>"
        )
    }
}

fn plain(stream: &mut TcpStream, status: &str, body: &str) -> Option<()> {
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .ok()
}

fn settings(server: &Server, cache: &Path) -> FetchSettings {
    FetchSettings {
        cache_dir: cache.into(),
        hf_endpoint: Some(server.address.clone()),
        hf_token: Some("secret-token".into()),
        s3_endpoint: Some(server.address.clone()),
        s3_access_key: Some("key".into()),
        s3_secret_key: Some("secret".into()),
        patience: Patience {
            attempts: 4,
            first_wait: Duration::from_millis(5),
            head_timeout: Duration::from_secs(5),
            piece_timeout: Duration::from_secs(5),
        },
        ..FetchSettings::default()
    }
}

fn fetch(server: &Server, cache: &TempDir) -> Result<std::path::PathBuf, LoadError> {
    let progress = Progress::default();
    let outcome = resolve(
        "hf://org/tiny",
        None,
        &settings(server, cache.path()),
        &progress,
    );
    if outcome.is_ok() {
        assert_eq!(progress.done(), progress.total());
        assert!(progress.total() > 0);
    }
    outcome
}

fn cache() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_model_comes_whole_from_a_hub_whatever_breaks_on_the_way() {
    for mood in [Mood::Good, Mood::Breaks(3), Mood::Busy(3), Mood::NoRanges] {
        let (server, cache) = (Server::start(mood), cache());
        let dir = fetch(&server, &cache).unwrap_or_else(|e| panic!("{}", e.chain()));
        assert!(dir.ends_with(format!("hf--org--tiny--{COMMIT}")));
        inspect(&dir).unwrap();
        assert!(
            !dir.join("README.md").exists(),
            "only what serving reads is fetched"
        );
        assert!(!dir.join("model.safetensors.part").exists());
        assert_eq!(
            server.count("Bearer secret-token"),
            server.count("HTTP/1.1")
        );
    }
}

#[test]
fn a_second_start_fetches_nothing_again_and_an_interrupted_one_continues() {
    let (server, cache) = (Server::start(Mood::Good), cache());
    let dir = fetch(&server, &cache).unwrap();
    fetch(&server, &cache).unwrap();
    assert_eq!(server.count("/model.safetensors"), 1);
    // What a killed process leaves behind.
    let whole = std::fs::read(dir.join("model.safetensors")).unwrap();
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    std::fs::write(dir.join("model.safetensors.part"), &whole[..1000]).unwrap();
    fetch(&server, &cache).unwrap();
    assert_eq!(server.count("bytes=1000-"), 1);
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), whole);
}

#[test]
fn faults_of_a_hub_have_their_reasons() {
    let cases = [
        (Mood::Denies, ModelFault::AccessDenied, "403"),
        (Mood::KnowsNothing, ModelFault::ModelNotFound, "404"),
        (Mood::Busy(100), ModelFault::SourceUnreachable, "4 attempts"),
        (
            Mood::Breaks(100),
            ModelFault::SourceUnreachable,
            "4 attempts",
        ),
        (Mood::Wrong, ModelFault::WeightsMismatch, "sha256"),
    ];
    for (mood, fault, word) in cases {
        let (server, cache) = (Server::start(mood), cache());
        let error = fetch(&server, &cache).unwrap_err();
        let text = error.chain();
        assert_eq!(error.fault(), Some(fault), "{text}");
        assert!(text.contains(word), "\"{word}\" is not in: {text}");
        assert!(!text.contains("secret-token"), "{text}");
    }
}

#[test]
fn a_hub_that_is_not_there_is_unreachable() {
    // Bound and dropped: nothing listens there.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let server = Server {
        address: format!("http://127.0.0.1:{port}"),
        requests: Arc::default(),
    };
    let error = fetch(&server, &cache()).unwrap_err();
    assert_eq!(
        error.fault(),
        Some(ModelFault::SourceUnreachable),
        "{}",
        error.chain()
    );
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_said_to_be_full() {
    let (server, cache) = (Server::start(Mood::Good), cache());
    let dir = cache.path().join(format!("hf--org--tiny--{COMMIT}"));
    std::fs::create_dir_all(&dir).unwrap();
    // Every write to /dev/full fails the way a full file system does.
    std::os::unix::fs::symlink("/dev/full", dir.join("model.safetensors.part")).unwrap();
    let error = fetch(&server, &cache).unwrap_err();
    assert_eq!(
        error.fault(),
        Some(ModelFault::DiskFull),
        "{}",
        error.chain()
    );
    assert!(
        error.to_string().contains("model.safetensors.part"),
        "{error}"
    );
}

#[test]
fn two_processes_do_not_fill_the_same_folder() {
    let (server, cache) = (Server::start(Mood::Good), cache());
    let dir = fetch(&server, &cache).unwrap();
    let lock = std::fs::File::create(dir.join(".lock")).unwrap();
    lock.try_lock().unwrap();
    let error = fetch(&server, &cache).unwrap_err();
    assert!(error.to_string().contains("another process"), "{error}");
    drop(lock);
    fetch(&server, &cache).unwrap();
}

#[test]
fn a_model_comes_from_an_object_store_with_signed_urls() {
    let (server, cache) = (Server::start(Mood::Breaks(1)), cache());
    let progress = Progress::default();
    let settings = settings(&server, cache.path());
    let dir = resolve("s3://bucket/models/tiny", None, &settings, &progress)
        .unwrap_or_else(|e| panic!("{}", e.chain()));
    inspect(&dir).unwrap();
    assert_eq!(server.count("X-Amz-Signature="), server.count("HTTP/1.1"));
    assert!(server.count("/bucket/models/tiny/model.safetensors") >= 2);
}

#[test]
fn a_remote_model_is_inspected_without_its_weights() {
    let local = tempfile::tempdir().unwrap();
    support::write(local.path(), &config(), &tensors(&config()));
    let expected = inspect(local.path()).unwrap();
    let (server, cache) = (Server::start(Mood::Good), cache());
    let settings = settings(&server, cache.path());
    for source in ["hf://org/tiny", "s3://bucket/models/tiny"] {
        let found = inspect_source(source, None, &settings)
            .unwrap_or_else(|error| panic!("{source}: {}", error.chain()));
        assert_eq!(found, expected, "{source}");
    }
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);

    for (mood, fault) in [
        (Mood::Denies, ModelFault::AccessDenied),
        (Mood::KnowsNothing, ModelFault::ModelNotFound),
        (Mood::Busy(100), ModelFault::SourceUnreachable),
    ] {
        let server = Server::start(mood);
        let settings = self::settings(&server, cache.path());
        let error = inspect_source("hf://org/tiny", None, &settings).unwrap_err();
        assert_eq!(error.fault(), Some(fault), "{}", error.chain());
    }
}

#[test]
fn sources_that_cannot_be_are_refused_before_any_request() {
    let (server, cache) = (Server::start(Mood::Good), cache());
    let settings = settings(&server, cache.path());
    for (source, revision) in [
        ("hf://org", None),
        ("hf://org/../tiny", None),
        ("hf://org/tiny?x", None),
        ("hf://org/tiny", Some("../../etc")),
        ("s3://bucket/tiny", Some("v1")),
        ("oci://registry/tiny", None),
        ("file:///does/not/exist", None),
    ] {
        let error = resolve(source, revision, &settings, &Progress::default()).unwrap_err();
        assert_eq!(
            error.fault(),
            Some(ModelFault::ModelNotFound),
            "{source}: {error}"
        );
    }
    assert_eq!(server.count(""), 0);
}
