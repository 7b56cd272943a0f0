//! Fetching from a hub and from an object store that misbehave, over a real HTTP server on loopback.

// Helpers of tests are no tests to clippy.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashMap;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, SystemTime};

use engine_load::{
    FetchSettings, LoadError, Local, PACKED_FILE, PackedHeader, PackedWriter, Patience, Progress,
    Section, inspect, inspect_source, resolve, source_config,
};
use engine_spec::ModelFault;
use support::hub::{COMMIT, Mood, Server};
use support::{config, file, tensors};
use tempfile::TempDir;

/// A hub with a small model, and a file that is not for serving.
fn start(mood: Mood) -> Server {
    let files = HashMap::from([
        ("config.json".to_owned(), config().to_string().into_bytes()),
        ("model.safetensors".to_owned(), file(&tensors(&config()))),
        ("README.md".to_owned(), b"not for serving".to_vec()),
    ]);
    Server::start(mood, files)
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

fn fetch(server: &Server, cache: &TempDir) -> Result<Local, LoadError> {
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
        let (server, cache) = (start(mood), cache());
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
    let (server, cache) = (start(Mood::Good), cache());
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
        let (server, cache) = (start(mood), cache());
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
    let server = Server::absent(format!("http://127.0.0.1:{port}"));
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
    let (server, cache) = (start(Mood::Good), cache());
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
fn one_that_holds_a_model_and_does_nothing_is_not_waited_for_for_ever() {
    let (server, cache) = (start(Mood::Good), cache());
    let dir = fetch(&server, &cache).unwrap();
    let lock = std::fs::File::create(dir.join(".lock")).unwrap();
    lock.try_lock().unwrap();
    let mut settings = settings(&server, cache.path());
    settings.patience.piece_timeout = Duration::from_millis(20);
    let progress = Progress::default();
    let error = resolve("hf://org/tiny", None, &settings, &progress).unwrap_err();
    assert!(error.to_string().contains("does nothing"), "{error}");
    // What is there was counted all the same.
    assert_eq!(progress.done(), progress.total());
    drop(lock);
    fetch(&server, &cache).unwrap();
}

/// Fetches `hf://org/NAME` into a cache of so many bytes.
fn fetch_within(
    server: &Server,
    cache: &TempDir,
    name: &str,
    limit: u64,
) -> Result<Local, LoadError> {
    let mut settings = settings(server, cache.path());
    settings.cache_limit_bytes = Some(limit);
    let source = format!("hf://org/{name}");
    resolve(&source, None, &settings, &Progress::default())
}

/// The models in a cache.
fn models(cache: &TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(cache.path()).unwrap();
    let mut models: Vec<String> = entries
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .map(|name| name.split("--").nth(2).unwrap().to_owned())
        .collect();
    models.sort();
    models
}

#[test]
fn the_longest_unused_model_makes_room_and_one_in_use_never_does() {
    let (server, cache) = (start(Mood::Good), cache());
    let bytes = file(&tensors(&config())).len() as u64 + config().to_string().len() as u64;
    let limit = 3 * bytes;
    let fetch = |name: &str| fetch_within(&server, &cache, name, limit);
    let first = fetch("first").unwrap();
    for (name, age) in [("second", 200), ("third", 100)] {
        let dir = fetch(name).unwrap();
        let lock = std::fs::File::options()
            .write(true)
            .open(dir.with_added_extension("lock"));
        let used = SystemTime::now() - Duration::from_secs(age);
        lock.unwrap().set_modified(used).unwrap();
    }
    assert_eq!(models(&cache), ["first", "second", "third"]);
    // The first is older, and in use.
    fetch("fourth").unwrap();
    assert_eq!(models(&cache), ["first", "fourth", "third"]);
    inspect(&first).unwrap();
    // Used again, the third is no longer the oldest.
    fetch("third").unwrap();
    let fifth = fetch("fifth").unwrap();
    assert_eq!(models(&cache), ["fifth", "first", "third"]);
    // What is asked for does not make room for itself.
    fetch_within(&server, &cache, "third", limit).unwrap();
    assert_eq!(models(&cache), ["fifth", "first", "third"]);

    let error = fetch_within(&server, &cache, "sixth", 2 * bytes).unwrap_err();
    let text = error.chain();
    assert_eq!(error.fault(), Some(ModelFault::DiskFull), "{text}");
    for word in [
        &format!("{} bytes of models in use", 2 * bytes),
        &format!("limit is {}", 2 * bytes),
        "--cache-limit",
        "org--sixth",
    ] {
        assert!(text.contains(word), "\"{word}\" is not in: {text}");
    }
    // What cannot be enough is not done.
    assert_eq!(models(&cache), ["fifth", "first", "third"]);
    drop(fifth);
    fetch_within(&server, &cache, "sixth", 2 * bytes).unwrap();
    assert_eq!(models(&cache), ["first", "sixth"]);
}

#[test]
fn a_model_comes_from_an_object_store_with_signed_urls() {
    let (server, cache) = (start(Mood::Breaks(1)), cache());
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
    let (server, cache) = (start(Mood::Good), cache());
    let settings = settings(&server, cache.path());
    for source in ["hf://org/tiny", "s3://bucket/models/tiny"] {
        let found = inspect_source(source, None, &settings)
            .unwrap_or_else(|error| panic!("{source}: {}", error.chain()));
        assert_eq!(found, expected, "{source}");
    }
    let server = start(Mood::Good);
    let config = source_config(
        "hf://org/tiny",
        None,
        &self::settings(&server, cache.path()),
    );
    assert_eq!(config.unwrap(), expected.config);
    assert_eq!(server.count("model.safetensors"), 0, "a config needs none");
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);

    for (mood, fault) in [
        (Mood::Denies, ModelFault::AccessDenied),
        (Mood::KnowsNothing, ModelFault::ModelNotFound),
        (Mood::Busy(100), ModelFault::SourceUnreachable),
    ] {
        let server = start(mood);
        let settings = self::settings(&server, cache.path());
        let error = inspect_source("hf://org/tiny", None, &settings).unwrap_err();
        assert_eq!(error.fault(), Some(fault), "{}", error.chain());
    }
}

#[test]
fn a_remote_packed_model_is_inspected_by_its_header() {
    let local = tempfile::tempdir().unwrap();
    let section = Section {
        name: "t".into(),
        form: "bytes".into(),
        shape: [1, 1 << 20, 1],
        bytes: 1 << 20,
        sha256: String::new(),
    };
    let header = PackedHeader {
        layout: "test-1".into(),
        config: "0".repeat(64),
        form: "bytes".into(),
        sections: vec![section],
    };
    let path = local.path().join(PACKED_FILE);
    let mut writer = PackedWriter::create(&path, header).unwrap();
    writer.put(&vec![7; 1 << 20]).unwrap();
    writer.finish().unwrap();
    let text = config().to_string();
    std::fs::write(local.path().join("config.json"), &text).unwrap();
    let packed = std::fs::read(&path).unwrap();
    let hub = |packed: &[u8]| {
        let files = [("config.json", text.as_bytes()), (PACKED_FILE, packed)];
        Server::start(
            Mood::Good,
            files
                .map(|(name, bytes)| (name.to_owned(), bytes.to_vec()))
                .into(),
        )
    };
    let cache = cache();
    let look = |packed: &[u8]| {
        let server = hub(packed);
        let found = inspect_source("hf://org/tiny", None, &settings(&server, cache.path()));
        (found, server.count(PACKED_FILE))
    };
    let (found, requests) = look(&packed);
    assert_eq!(found.unwrap(), inspect(local.path()).unwrap());
    assert_eq!(requests, 1, "one piece has the header");
    let (cut, _) = look(&packed[..packed.len() - 64]);
    assert_eq!(cut.unwrap_err().fault(), Some(ModelFault::WeightsTruncated));
}

#[test]
fn sources_that_cannot_be_are_refused_before_any_request() {
    let (server, cache) = (start(Mood::Good), cache());
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
