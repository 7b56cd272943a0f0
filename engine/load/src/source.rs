//! From a model source to a local directory.
//!
//! `file://` directories and plain paths are used where they are. `hf://` and `s3://` models are fetched into the
//! cache directory, into a folder named after what they contain (commit, or digest of the listing), so that a model
//! that changes under its name never mixes with its predecessor.

use std::path::{Path, PathBuf};

use rusty_s3::actions::{ListObjectsV2, S3Action};
use rusty_s3::{Bucket, Credentials, UrlStyle};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::cache::{self, Local};
use crate::download::{Client, Origin, Patience, RemoteFile, hex};
use crate::{LoadError, Progress};

/// The hub when no other is given.
const HUB: &str = "https://huggingface.co";
/// Region when no other is given.
const REGION: &str = "us-east-1";
/// Life of a signed URL: longer than a piece may take.
const SIGNATURE_SECONDS: u64 = 3600;
/// Files a model may have.
const FILES_MAX: usize = 10_000;

/// What fetching needs to know; nothing of it is read from the environment here.
#[derive(Clone, Debug, Default)]
pub struct FetchSettings {
    /// Where fetched models are kept.
    pub cache_dir: PathBuf,
    /// Bytes that they may take together; no limit without it.
    pub cache_limit_bytes: Option<u64>,
    /// `HF_ENDPOINT`.
    pub hf_endpoint: Option<String>,
    /// `HF_TOKEN`.
    pub hf_token: Option<String>,
    /// `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`: another store than AWS, addressed by path.
    pub s3_endpoint: Option<String>,
    /// `AWS_REGION` or `AWS_DEFAULT_REGION`.
    pub s3_region: Option<String>,
    /// `AWS_ACCESS_KEY_ID`; requests are unsigned without it.
    pub s3_access_key: Option<String>,
    /// `AWS_SECRET_ACCESS_KEY`.
    pub s3_secret_key: Option<String>,
    /// `AWS_SESSION_TOKEN`.
    pub s3_session_token: Option<String>,
    /// Limits.
    pub patience: Patience,
}

impl FetchSettings {
    /// Settings from variables that `lookup` knows; a binary passes its environment. Empty ones count as absent.
    pub fn from_lookup(cache_dir: PathBuf, lookup: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        Self {
            cache_dir,
            cache_limit_bytes: None,
            hf_endpoint: get("HF_ENDPOINT"),
            hf_token: get("HF_TOKEN"),
            s3_endpoint: get("AWS_ENDPOINT_URL_S3").or_else(|| get("AWS_ENDPOINT_URL")),
            s3_region: get("AWS_REGION").or_else(|| get("AWS_DEFAULT_REGION")),
            s3_access_key: get("AWS_ACCESS_KEY_ID"),
            s3_secret_key: get("AWS_SECRET_ACCESS_KEY"),
            s3_session_token: get("AWS_SESSION_TOKEN"),
            patience: Patience::default(),
        }
    }
}

/// Where a model is.
pub(crate) enum Place {
    /// In a directory.
    Local(PathBuf),
    /// Behind a server.
    Remote {
        origin: Box<dyn Origin>,
        client: Client,
        files: Vec<RemoteFile>,
        /// Name of its folder in the cache.
        folder: String,
    },
}

/// The local directory of a model, fetched first where it has to be. `progress` counts fetched bytes, those that
/// another process fetches into the same cache among them.
///
/// # Errors
/// When the source names nothing, cannot be reached, refuses, or does not fit on the disk or into the cache's limit.
pub fn resolve(
    source: &str,
    revision: Option<&str>,
    settings: &FetchSettings,
    progress: &Progress,
) -> Result<Local, LoadError> {
    match locate(source, revision, settings)? {
        Place::Local(dir) => Ok(Local::outside(dir)),
        Place::Remote {
            origin,
            client,
            files,
            folder,
        } => {
            let bytes = files.iter().map(|file| file.bytes).sum();
            let FetchSettings {
                cache_dir,
                cache_limit_bytes,
                ..
            } = settings;
            let dir = cache::enter(cache_dir, &folder, bytes, *cache_limit_bytes)?;
            client.fetch_all(&*origin, &files, &dir, progress)?;
            Ok(dir)
        }
    }
}

/// Finds a model and lists its files; fetches nothing else.
pub(crate) fn locate(
    source: &str,
    revision: Option<&str>,
    settings: &FetchSettings,
) -> Result<Place, LoadError> {
    match source.split_once("://") {
        None => local(Path::new(source)).map(Place::Local),
        Some(("file", path)) => local(Path::new(path)).map(Place::Local),
        Some(("hf", name)) => locate_on_hub(name, revision, settings),
        Some(("s3", place)) => locate_in_store(place, revision, settings),
        Some((scheme, _)) => Err(LoadError::NotFound(format!(
            "model source {source}: the engine reads file://, hf:// and s3://, not {scheme}://"
        ))),
    }
}

fn local(path: &Path) -> Result<PathBuf, LoadError> {
    if path.is_dir() {
        return Ok(path.into());
    }
    let what = if path.exists() {
        "is not a directory"
    } else {
        "does not exist"
    };
    Err(LoadError::NotFound(format!(
        "model directory {} {what} in this container",
        path.display()
    )))
}

/// Files that serving reads; a repository's other files stay where they are.
fn is_wanted(name: &str) -> bool {
    let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\']);
    let known = name.ends_with(".safetensors")
        || name == crate::PACKED_FILE
        || name.ends_with(".safetensors.index.json")
        || matches!(
            name,
            "config.json"
                | "generation_config.json"
                | "tokenizer.json"
                | "tokenizer_config.json"
                | "special_tokens_map.json"
                | "chat_template.jinja"
                | "chat_template.json"
        );
    plain && known
}

fn check_files(files: &[RemoteFile], what: &str) -> Result<(), LoadError> {
    if files.len() > FILES_MAX {
        return Err(LoadError::Malformed {
            file: what.into(),
            problem: format!("{} files, the limit is {FILES_MAX}", files.len()),
        });
    }
    if files.iter().any(|file| file.name == "config.json") {
        return Ok(());
    }
    Err(LoadError::NotFound(format!(
        "{what} has no config.json at its top level; is it a model in safetensors form?"
    )))
}

struct Hub {
    endpoint: String,
    name: String,
    commit: String,
    token: Option<String>,
}

impl Origin for Hub {
    fn url(&self, file: &str) -> String {
        let Self {
            endpoint,
            name,
            commit,
            ..
        } = self;
        format!("{endpoint}/{name}/resolve/{commit}/{file}")
    }

    fn authorization(&self) -> Option<String> {
        self.token.as_ref().map(|token| format!("Bearer {token}"))
    }

    fn describe(&self) -> String {
        format!("hf://{} at {}", self.name, self.commit)
    }
}

#[derive(Deserialize)]
struct HubListing {
    sha: String,
    siblings: Vec<HubFile>,
}

#[derive(Deserialize)]
struct HubFile {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<HubLfs>,
}

#[derive(Deserialize)]
struct HubLfs {
    sha256: Option<String>,
}

fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text != "."
        && text != ".."
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

fn locate_on_hub(
    name: &str,
    revision: Option<&str>,
    settings: &FetchSettings,
) -> Result<Place, LoadError> {
    let name = name.trim_end_matches('/');
    let parts: Vec<&str> = name.split('/').collect();
    if parts.len() != 2 || !parts.iter().all(|part| is_word(part)) {
        return Err(LoadError::NotFound(format!(
            "model source hf://{name}: expected hf://ORGANISATION/NAME"
        )));
    }
    let revision = revision.unwrap_or("main");
    if !revision.split('/').all(is_word) {
        return Err(LoadError::NotFound(format!(
            "revision \"{revision}\" of hf://{name}: expected a commit, tag or branch"
        )));
    }
    let endpoint = settings.hf_endpoint.as_deref().unwrap_or(HUB);
    let endpoint = endpoint.trim_end_matches('/').to_owned();
    let client = Client::new(settings.patience);
    let mut hub = Hub {
        endpoint,
        name: name.into(),
        commit: revision.into(),
        token: settings.hf_token.clone(),
    };
    let listing_url = || {
        let escaped = revision.replace('/', "%2F");
        format!(
            "{}/api/models/{name}/revision/{escaped}?blobs=true",
            hub.endpoint
        )
    };
    let text = client.text(
        &listing_url,
        hub.authorization().as_deref(),
        &hub.describe(),
    )?;
    let malformed = |problem| LoadError::Malformed {
        file: format!("listing of hf://{name}"),
        problem,
    };
    let listing: HubListing =
        serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
    if !is_word(&listing.sha) {
        return Err(malformed(format!("commit \"{}\"", listing.sha)));
    }
    hub.commit = listing.sha;
    let mut files = Vec::new();
    for file in listing.siblings {
        if !is_wanted(&file.rfilename) {
            continue;
        }
        let Some(bytes) = file.size else {
            return Err(malformed(format!("no size for {}", file.rfilename)));
        };
        files.push(RemoteFile {
            name: file.rfilename,
            bytes,
            sha256: file
                .lfs
                .and_then(|lfs| lfs.sha256)
                .map(|hash| hash.to_ascii_lowercase()),
        });
    }
    check_files(&files, &hub.describe())?;
    let folder = format!("hf--{}--{}", name.replace('/', "--"), hub.commit);
    Ok(Place::Remote {
        origin: Box::new(hub),
        client,
        files,
        folder,
    })
}

struct Store {
    bucket: Bucket,
    credentials: Option<Credentials>,
    prefix: String,
}

impl Store {
    fn new(place: &str, settings: &FetchSettings) -> Result<Self, LoadError> {
        let wrong =
            |problem: String| LoadError::NotFound(format!("model source s3://{place}: {problem}"));
        let (name, prefix) = place.split_once('/').unwrap_or((place, ""));
        let region = settings.s3_region.clone().unwrap_or_else(|| REGION.into());
        let (endpoint, style) = match &settings.s3_endpoint {
            Some(endpoint) => (endpoint.clone(), UrlStyle::Path),
            None => (
                format!("https://s3.{region}.amazonaws.com"),
                UrlStyle::VirtualHost,
            ),
        };
        let url = endpoint
            .parse()
            .map_err(|error| wrong(format!("endpoint {endpoint}: {error}")))?;
        let bucket = Bucket::new(url, style, name.to_owned(), region)
            .map_err(|error| wrong(format!("bucket \"{name}\": {error}")))?;
        let credentials = match (&settings.s3_access_key, &settings.s3_secret_key) {
            (Some(key), Some(secret)) => Some(match &settings.s3_session_token {
                Some(token) => Credentials::new_with_token(key, secret, token),
                None => Credentials::new(key, secret),
            }),
            (None, None) => None,
            _ => {
                return Err(LoadError::AccessDenied(
                    "only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set; set both, or none for a public bucket"
                        .into(),
                ));
            }
        };
        let prefix = match prefix.trim_end_matches('/') {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        Ok(Self {
            bucket,
            credentials,
            prefix,
        })
    }

    /// Name, size and tag of every object directly under the prefix.
    fn list(&self, client: &Client) -> Result<Vec<(RemoteFile, String)>, LoadError> {
        let mut found = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let url = || {
                let mut action = ListObjectsV2::new(&self.bucket, self.credentials.as_ref());
                action.with_prefix(&*self.prefix);
                action.with_delimiter("/");
                if let Some(token) = &token {
                    action.with_continuation_token(&**token);
                }
                action
                    .sign(std::time::Duration::from_secs(SIGNATURE_SECONDS))
                    .to_string()
            };
            let text = client.text(&url, None, &self.describe())?;
            let page =
                ListObjectsV2::parse_response(&text).map_err(|error| LoadError::Malformed {
                    file: format!("listing of {}", self.describe()),
                    problem: error.to_string(),
                })?;
            for object in page.contents {
                let name = object.key.strip_prefix(&self.prefix).unwrap_or_default();
                if is_wanted(name) {
                    let file = RemoteFile {
                        name: name.into(),
                        bytes: object.size,
                        sha256: None,
                    };
                    found.push((file, object.etag));
                }
            }
            token = page.next_continuation_token;
            if token.is_none() || found.len() > FILES_MAX {
                return Ok(found);
            }
        }
    }
}

impl Origin for Store {
    fn url(&self, file: &str) -> String {
        let key = format!("{}{file}", self.prefix);
        let action = self.bucket.get_object(self.credentials.as_ref(), &key);
        action
            .sign(std::time::Duration::from_secs(SIGNATURE_SECONDS))
            .to_string()
    }

    fn authorization(&self) -> Option<String> {
        // The signature is part of the URL.
        None
    }

    fn describe(&self) -> String {
        format!("s3://{}/{}", self.bucket.name(), self.prefix)
    }
}

fn locate_in_store(
    place: &str,
    revision: Option<&str>,
    settings: &FetchSettings,
) -> Result<Place, LoadError> {
    if let Some(revision) = revision {
        return Err(LoadError::NotFound(format!(
            "revision \"{revision}\" of s3://{place}: object stores have no revisions; put it into the prefix"
        )));
    }
    let store = Store::new(place, settings)?;
    let client = Client::new(settings.patience);
    let mut listing = store.list(&client)?;
    listing.sort_by(|a, b| a.0.name.cmp(&b.0.name));
    let mut hash = Sha256::new();
    for (file, tag) in &listing {
        hash.update(format!("{}\0{}\0{tag}\0", file.name, file.bytes));
    }
    let files: Vec<RemoteFile> = listing.into_iter().map(|(file, _)| file).collect();
    check_files(&files, &store.describe())?;
    let digest = hex(&hash.finalize());
    let folder = format!("s3--{}--{}", store.bucket.name(), &digest[..16]);
    Ok(Place::Remote {
        origin: Box::new(store),
        client,
        files,
        folder,
    })
}
