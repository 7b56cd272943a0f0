//! Plain HTTP GET towards engine pods: every call bounded in time and in size.

use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Request, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use crate::error::{Call, Error};

/// An answer: status and body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Body, at most as long as was allowed.
    pub body: String,
}

/// A shared client; cheap to clone.
#[derive(Clone, Debug)]
pub struct HttpClient {
    inner: Client<HttpConnector, Empty<Bytes>>,
}

impl HttpClient {
    /// A client whose connections take at most `connect_timeout` to open and are closed after 30 s of silence.
    pub fn new(connect_timeout: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(connect_timeout));
        connector.set_nodelay(true);
        let inner = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(30))
            .pool_max_idle_per_host(1)
            .build(connector);
        HttpClient { inner }
    }

    /// One GET.
    ///
    /// # Errors
    /// No connection, no answer within `timeout`, a body of more than `body_bytes_max` bytes or not UTF-8. A status
    /// other than 200 is not an error here.
    pub async fn get(
        &self,
        kind: &'static str,
        url: &str,
        timeout: Duration,
        body_bytes_max: usize,
    ) -> Result<Answer, Error> {
        let call = Call {
            verb: "get",
            kind,
            name: url.to_string(),
        };
        let failed = |message: String| Error::Http {
            call: call.clone(),
            message,
        };
        let uri: Uri = url
            .parse()
            .map_err(|error| failed(format!("not a URL: {error}")))?;
        let request = Request::get(uri)
            .header("accept", "application/json, text/plain")
            .body(Empty::new())
            .map_err(|error| failed(error.to_string()))?;
        let exchange = async {
            let response = self
                .inner
                .request(request)
                .await
                .map_err(|error| failed(chain(&error)))?;
            let status = response.status().as_u16();
            let body = Limited::new(response.into_body(), body_bytes_max)
                .collect()
                .await
                .map_err(|error| {
                    failed(format!(
                        "body: {error} (at most {body_bytes_max} bytes are read)"
                    ))
                })?
                .to_bytes();
            let body =
                String::from_utf8(body.to_vec()).map_err(|_| failed("body is not UTF-8".into()))?;
            Ok(Answer { status, body })
        };
        tokio::time::timeout(timeout, exchange)
            .await
            .unwrap_or_else(|_| {
                Err(Error::Timeout {
                    call: call.clone(),
                    limit: timeout,
                })
            })
    }
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A server on loopback that answers every request with `response`, verbatim, after `delay`.
    pub(crate) async fn server(response: String, delay: Duration) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let response = response.clone();
                tokio::spawn(async move {
                    let mut request = [0; 4096];
                    let _ = stream.read(&mut request).await;
                    tokio::time::sleep(delay).await;
                    let _ = stream.write_all(response.as_bytes()).await;
                });
            }
        });
        format!("http://{address}")
    }

    pub(crate) fn response(status: u16, body: &str) -> String {
        format!(
            "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
    }

    const LIMIT: Duration = Duration::from_millis(500);

    #[tokio::test]
    async fn status_and_body_come_back_also_when_the_status_is_not_200() {
        let url = server(response(503, "{\"phase\":\"loading\"}"), Duration::ZERO).await;
        let answer = HttpClient::new(LIMIT)
            .get("engine", &url, LIMIT, 100)
            .await
            .expect("an answer");
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (503, "{\"phase\":\"loading\"}")
        );
    }

    #[tokio::test]
    async fn a_body_beyond_the_limit_is_refused() {
        let url = server(response(200, &"x".repeat(200)), Duration::ZERO).await;
        let error = HttpClient::new(LIMIT)
            .get("engine", &url, LIMIT, 100)
            .await
            .expect_err("too long");
        assert!(error.to_string().contains("at most 100 bytes"), "{error}");
    }

    #[tokio::test]
    async fn a_silent_server_and_a_closed_port_end_in_time() {
        let url = server(response(200, ""), Duration::from_secs(30)).await;
        let error = HttpClient::new(LIMIT)
            .get("engine", &url, LIMIT, 100)
            .await
            .expect_err("silence");
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        let error = HttpClient::new(LIMIT)
            .get("engine", "http://127.0.0.1:1/x", LIMIT, 100)
            .await
            .expect_err("closed");
        assert!(
            error.to_string().contains("http://127.0.0.1:1/x"),
            "{error}"
        );
    }
}
