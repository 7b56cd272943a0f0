//! An API server that a test writes down: a function of what it is asked, which it also keeps.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Request, Response};
use kube::client::Body;
use serde_json::{Value, json};

use crate::wakes::lock;

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// `GET`, `POST`, …
    pub(crate) method: String,
    /// The path without the query.
    pub(crate) path: String,
    /// The query as it was sent.
    pub(crate) query: String,
    /// The content type of the body.
    pub(crate) content: String,
    /// The body; null when there is none.
    pub(crate) body: Value,
}

/// What it says to one.
pub(crate) enum Answer {
    /// A status and an object, or as many as a watch tells before it ends.
    Says(u16, Vec<Value>),
    /// That, after a while.
    Late(Duration, Box<Answer>),
    /// Nothing, ever.
    Silence,
}

/// What it was asked so far.
#[derive(Debug, Default)]
pub(crate) struct Log(Mutex<Vec<Asked>>);

impl Log {
    pub(crate) fn all(&self) -> Vec<Asked> {
        lock(&self.0).clone()
    }

    pub(crate) fn count(&self) -> usize {
        lock(&self.0).len()
    }

    pub(crate) fn last(&self) -> Asked {
        self.all().pop().expect("it was asked")
    }
}

pub(crate) fn says(object: Value) -> Answer {
    Answer::Says(200, vec![object])
}

/// A refusal as an API server words it.
pub(crate) fn refuses(code: u16, reason: &str) -> Answer {
    Answer::Says(code, vec![status(code, reason)])
}

pub(crate) fn status(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "no"})
}

/// A list of such a version.
pub(crate) fn list(version: &str, next: &str, items: &[Value]) -> Answer {
    says(
        json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": version, "continue": next},
        "items": items}),
    )
}

/// A client of a server that answers like this; the number counts from 0.
pub(crate) fn api_server(
    answer: impl Fn(usize, &Asked) -> Answer + Send + Sync + 'static,
) -> (kube::Client, Arc<Log>) {
    let log = Arc::new(Log::default());
    let (kept, answer) = (Arc::clone(&log), Arc::new(answer));
    let service = tower::service_fn(move |request: Request<Body>| {
        let (log, answer) = (Arc::clone(&kept), Arc::clone(&answer));
        async move {
            let (head, body) = request.into_parts();
            let content = head.headers.get("content-type");
            let body = body.collect_bytes().await.expect("a body");
            let asked = Asked {
                method: head.method.to_string(),
                path: head.uri.path().to_owned(),
                query: head.uri.query().unwrap_or_default().to_owned(),
                content: content.map_or(String::new(), |content| {
                    content.to_str().unwrap_or_default().to_owned()
                }),
                body: serde_json::from_slice(&body).unwrap_or_default(),
            };
            let number = {
                let mut all = lock(&log.0);
                all.push(asked.clone());
                all.len() - 1
            };
            let mut said = answer(number, &asked);
            while let Answer::Late(pause, later) = said {
                tokio::time::sleep(pause).await;
                said = *later;
            }
            match said {
                Answer::Silence | Answer::Late(..) => std::future::pending().await,
                Answer::Says(status, objects) => {
                    let lines = objects.iter().map(|object| format!("{object}\n"));
                    let text = Full::new(Bytes::from(lines.collect::<String>()));
                    let response = Response::builder().status(status).body(text);
                    Ok::<_, Infallible>(response.expect("a response"))
                }
            }
        }
    });
    (kube::Client::new(service, "d"), log)
}
