//! Watches of pods and nodes, in the form that costs the API server least.
//!
//! kube reads JSON. An API server makes JSON for whoever asks for it, field by field and managed fields included; protobuf is
//! its own form, in which its other clients watch, and an event that was written for one of them is sent to all. So watches of
//! pods and nodes ask for protobuf here, between kube and the connection, and each event is written as one line of JSON with
//! what this operator keeps. Whoever answers in JSON is read as before, as are all other kinds and calls.
//! The surprise: a field that [`messages`] does not name never arrives.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::StreamExt;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::{Body as HttpBody, Bytes, Frame};
use hyper::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response};
use k8s_openapi::api::core::v1 as core;
use kube::Resource;
use kube::client::Body;
use kube::core::watch::{Bookmark, BookmarkMeta};
use kube::core::{Status, TypeMeta, WatchEvent};
use prost::Message;
use serde::Serialize;
use tokio_util::bytes::BytesMut;
use tokio_util::codec::{Decoder, FramedRead, LengthDelimitedCodec};
use tokio_util::io::StreamReader;
use tower::BoxError;

mod messages;

const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
const JSON: &str = "application/json";
/// What precedes every object.
const MAGIC: &[u8] = b"k8s\0";
/// Largest event that is read; etcd takes objects of 1.5 MiB at most by default.
const EVENT_BYTES_MAX: usize = 16 << 20;
/// Largest refusal that is read.
const REFUSAL_BYTES_MAX: usize = 1 << 20;
/// What a pod takes as a line, roughly.
const LINE_BYTES: usize = 2048;

/// What an answer is read from.
pub(crate) type Read = UnsyncBoxBody<Bytes, BoxError>;

/// Asks for protobuf, and makes JSON of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Protobuf {
    /// Something was not understood; JSON is asked for from then on.
    failed: Arc<AtomicBool>,
}

impl Protobuf {
    /// Asks for protobuf where `request` begins a watch of pods or nodes.
    pub(crate) fn ask(&self, mut request: Request<Body>) -> Request<Body> {
        if is_watch_of_pods_or_nodes(&request) && !self.failed.load(Ordering::Relaxed) {
            let forms =
                HeaderValue::from_static("application/vnd.kubernetes.protobuf,application/json");
            request.headers_mut().insert(ACCEPT, forms);
        }
        request
    }

    /// The same answer in JSON.
    pub(crate) fn read<B>(&self, response: Response<B>) -> Response<Read>
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let content = response.headers().get(CONTENT_TYPE);
        let content = content
            .and_then(|content| content.to_str().ok())
            .unwrap_or_default();
        let mut parts = content.split(';').map(str::trim);
        if parts.next() != Some(PROTOBUF) {
            return response.map(|body| body.map_err(Into::into).boxed_unsync());
        }
        let is_stream = parts.any(|part| part == "stream=watch");
        let (mut head, body) = response.into_parts();
        head.headers
            .insert(CONTENT_TYPE, HeaderValue::from_static(JSON));
        head.headers.remove(CONTENT_LENGTH);
        let body = match is_stream {
            true => self.lines(body),
            false => refusal(body),
        };
        Response::from_parts(head, body)
    }

    /// The events of a watch, a line each.
    fn lines<B>(&self, body: B) -> Read
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let failed = Arc::clone(&self.failed);
        let bytes = body.map_err(io_error).into_data_stream();
        let events = FramedRead::new(StreamReader::new(Box::pin(bytes)), Events::default());
        let lines = events.map(move |line| {
            line.map(Frame::data).map_err(|error| match error {
                Unread::Broken(error) => BoxError::from(error),
                Unread::Unknown(why) => {
                    if !failed.swap(true, Ordering::Relaxed) {
                        tracing::warn!(
                            why,
                            "an event is not understood as protobuf; JSON is asked for from now on"
                        );
                    }
                    why.into()
                }
            })
        });
        StreamBody::new(lines).boxed_unsync()
    }
}

/// `pods` and `nodes` of the core group, of one namespace or of all.
fn is_watch_of_pods_or_nodes(request: &Request<Body>) -> bool {
    let (uri, query) = (request.uri(), request.uri().query().unwrap_or_default());
    let Some((_, path)) = uri.path().split_once("/api/v1/") else {
        return false;
    };
    let plural = match path.split('/').collect::<Vec<_>>()[..] {
        [plural] | ["namespaces", _, plural] => plural,
        _ => return false,
    };
    request.method() == Method::GET
        && matches!(plural, "pods" | "nodes")
        && query.split('&').any(|parameter| parameter == "watch=true")
}

/// Errors of a connection keep their kind, by which kube tells one that ended from one that broke.
fn io_error(error: impl Into<BoxError>) -> std::io::Error {
    let error = error.into();
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&*error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<std::io::Error>() {
            let kind = found.kind();
            return std::io::Error::new(kind, error.to_string());
        }
        cause = error.source();
    }
    std::io::Error::other(error)
}

/// Why the watch was not begun.
fn refusal<B>(body: B) -> Read
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let read = async move {
        let body = Limited::new(body, REFUSAL_BYTES_MAX)
            .collect()
            .await?
            .to_bytes();
        let (_, raw) = unwrapped(&body)?;
        let status: Status = messages::Status::decode(raw)?.into();
        Ok(Frame::data(serde_json::to_vec(&status)?.into()))
    };
    StreamBody::new(futures::stream::once(read)).boxed_unsync()
}

/// Why there is no next event.
#[derive(Debug)]
enum Unread {
    /// The connection.
    Broken(std::io::Error),
    /// What came over it.
    Unknown(String),
}

impl From<std::io::Error> for Unread {
    fn from(error: std::io::Error) -> Self {
        Self::Broken(error)
    }
}

/// Cuts a watch into events: four bytes that say how long it is, and the event.
struct Events(LengthDelimitedCodec);

impl Default for Events {
    fn default() -> Self {
        let lengths = LengthDelimitedCodec::builder()
            .max_frame_length(EVENT_BYTES_MAX)
            .new_codec();
        Self(lengths)
    }
}

impl Decoder for Events {
    type Item = Bytes;
    type Error = Unread;

    fn decode(&mut self, bytes: &mut BytesMut) -> Result<Option<Bytes>, Unread> {
        let event = self
            .0
            .decode(bytes)
            .map_err(|error| Unread::Unknown(error.to_string()))?;
        let Some(event) = event else { return Ok(None) };
        line(event.freeze())
            .map(Some)
            .map_err(|error| Unread::Unknown(error.to_string()))
    }

    /// Half an event at the end is none: the watch goes on from the one before.
    fn decode_eof(&mut self, bytes: &mut BytesMut) -> Result<Option<Bytes>, Unread> {
        self.decode(bytes)
    }
}

/// An event as a line of JSON.
fn line(event: Bytes) -> Result<Bytes, BoxError> {
    let event = messages::WatchEvent::decode(event)?;
    let object = event.object.unwrap_or_default();
    let (types, raw) = unwrapped(&object.raw)?;
    match (&*event.kind, &*types.kind) {
        ("ERROR", _) => written(&WatchEvent::<()>::Error(Box::new(
            messages::Status::decode(raw)?.into(),
        ))),
        (kind, "Pod") => {
            let pod = messages::Pod::decode(raw)?;
            told(kind, types, core::Pod::from(pod))
        }
        (kind, "Node") => {
            let node = messages::Node::decode(raw)?;
            told(kind, types, core::Node::from(node))
        }
        (_, kind) => Err(format!("an object of kind {kind:?} in a watch of pods or nodes").into()),
    }
}

fn told<K: Resource + Serialize>(
    kind: &str,
    types: messages::TypeMeta,
    mut object: K,
) -> Result<Bytes, BoxError> {
    match kind {
        "ADDED" => written(&WatchEvent::Added(object)),
        "MODIFIED" => written(&WatchEvent::Modified(object)),
        "DELETED" => written(&WatchEvent::Deleted(object)),
        "BOOKMARK" => {
            let metadata = std::mem::take(object.meta_mut());
            written(&WatchEvent::<K>::Bookmark(Bookmark {
                types: TypeMeta {
                    api_version: types.api_version,
                    kind: types.kind,
                },
                metadata: BookmarkMeta {
                    resource_version: metadata.resource_version.unwrap_or_default(),
                    annotations: metadata.annotations.unwrap_or_default(),
                },
            }))
        }
        other => Err(format!("an event of type {other:?}").into()),
    }
}

fn written<K: Serialize>(event: &WatchEvent<K>) -> Result<Bytes, BoxError> {
    let mut line = Vec::with_capacity(LINE_BYTES);
    serde_json::to_writer(&mut line, event)?;
    line.push(b'\n');
    Ok(line.into())
}

/// What an object is, and its bytes.
fn unwrapped(bytes: &Bytes) -> Result<(messages::TypeMeta, Bytes), BoxError> {
    if !bytes.starts_with(MAGIC) {
        return Err("an object that does not begin like one of Kubernetes".into());
    }
    let unknown = messages::Unknown::decode(bytes.slice(MAGIC.len()..))?;
    Ok((unknown.type_meta.unwrap_or_default(), unknown.raw))
}

#[cfg(test)]
mod tests;
