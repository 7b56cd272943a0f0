//! The limit of a restart: how long the API server needs to tell what an operator has to know, to a client that does nothing
//! with it. Like the operator it asks for protobuf where there is some.

use std::path::Path;
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use futures::AsyncReadExt;
use futures::future::try_join_all;
use hyper::Request;
use hyper::header::ACCEPT;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// How long the lists may take.
const LISTS_MAX: Duration = Duration::from_secs(120);
/// What the operator asks for, and of which objects: the large ones, of which there are many.
const LISTS: [(&str, &str); 7] = [
    (
        "/api/v1/pods",
        "labelSelector=app.kubernetes.io/managed-by%3Dcachalot",
    ),
    (
        "/api/v1/pods",
        "labelSelector=app.kubernetes.io/managed-by%21%3Dcachalot",
    ),
    ("/api/v1/nodes", ""),
    ("/apis/cachalot.dev/v1alpha1/modeldeployments", ""),
    ("/api/v1/services", ""),
    (
        "/api/v1/configmaps",
        "labelSelector=app.kubernetes.io/managed-by%3Dcachalot",
    ),
    ("/apis/policy/v1/poddisruptionbudgets", ""),
];

/// What pods and nodes are asked for in; other kinds come as JSON.
const FORMS: &str = "application/vnd.kubernetes.protobuf,application/json";
/// What marks the end of a streamed list; no object of the benchmark has such a text in it.
const END: &[u8] = b"k8s.io/initial-events-end";
/// What is read at once.
const PIECE_BYTES: usize = 64 << 10;

/// What was told.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    /// How long it took.
    pub seconds: f64,
    /// How much it was.
    pub megabytes: f64,
}

/// Reads all lists at once, as streams, with a client that makes nothing of what it reads.
///
/// # Errors
/// When the API server refuses one, or does not end it in time.
pub async fn read(kubeconfig: &Path) -> Result<Told> {
    let access = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(access, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let start = Instant::now();
    let all = try_join_all(LISTS.map(|(path, select)| stream(&client, path, select)));
    let bytes: usize = tokio::time::timeout(LISTS_MAX, all)
        .await
        .with_context(|| format!("lists were not complete after {LISTS_MAX:?}"))??
        .iter()
        .sum();
    Ok(Told {
        seconds: start.elapsed().as_secs_f64(),
        megabytes: f64::from(u32::try_from(bytes / 1000)?) / 1000.0,
    })
}

/// Reads one until it is complete; how many bytes it was.
async fn stream(client: &Client, path: &str, select: &str) -> Result<usize> {
    let uri = format!(
        "{path}?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&{select}"
    );
    let request = Request::get(uri).header(ACCEPT, FORMS).body(Vec::new())?;
    let mut told = pin!(client.request_stream(request).await?);
    let (mut bytes, mut piece, mut kept) = (0, vec![0; PIECE_BYTES], 0);
    loop {
        let read = told.read(&mut piece[kept..]).await?;
        if read == 0 {
            bail!("{path}: the list ended before it was complete");
        }
        bytes += read;
        let whole = kept + read;
        if piece[..whole]
            .windows(END.len())
            .any(|window| window == END)
        {
            return Ok(bytes);
        }
        // It may begin at the end of one piece and end in the next.
        kept = whole.min(END.len());
        piece.copy_within(whole - kept..whole, 0);
    }
}
