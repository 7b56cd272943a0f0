//! The limit of a restart: how long the API server needs to tell what an operator has to know, to a client that does nothing
//! with it.

use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use futures::AsyncBufReadExt;
use futures::future::try_join_all;
use hyper::Request;
use operator_k8s::Client;

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

/// What marks the end of a streamed list.
const END: &str = "k8s.io/initial-events-end";

/// What was told.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    /// How long it took.
    pub seconds: f64,
    /// How much it was.
    pub megabytes: f64,
}

/// Reads all lists at once, as streams.
///
/// # Errors
/// When the API server refuses one, or does not end it in time.
pub async fn read(client: &Client) -> Result<Told> {
    let start = Instant::now();
    let all = try_join_all(LISTS.map(|(path, select)| stream(client, path, select)));
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
    let mut lines = pin!(
        client
            .request_stream(Request::get(uri).body(Vec::new())?)
            .await?
    );
    let (mut line, mut bytes) = (Vec::new(), 0);
    loop {
        line.clear();
        let read = lines.read_until(b'\n', &mut line).await?;
        if read == 0 {
            bail!("{path}: the list ended before it was complete");
        }
        bytes += read;
        // An object may have such a text in it too.
        if line.starts_with(b"{\"type\":\"BOOKMARK\"")
            && line
                .windows(END.len())
                .any(|window| window == END.as_bytes())
        {
            return Ok(bytes);
        }
    }
}
