//! Plain HTTP GET towards engine pods: every call bounded in time and in size.
//!
//! An open connection costs a socket and nothing else: hyper's buffers and tasks, some 30 kB a connection, live as long as
//! one exchange. There are ten thousand pods. A connection that was kept may have been closed by the other side meanwhile,
//! so an exchange on it is repeated once on a new one; a GET changes nothing.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, Response, Uri, Version};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::error::{Call, Error};
use crate::wakes::lock;

/// How long an open connection is kept without use: longer than the pause between two scrapes of a pod that serves.
const IDLE_FOR: Duration = Duration::from_secs(45);
/// Open connections that are kept; half of the 1,024 files that some systems allow a process. Pods beyond it get a new
/// connection each time.
const IDLE_MAX: usize = 512;
/// How often connections that were idle for too long are looked for.
const SWEEP_PERIOD: Duration = Duration::from_secs(5);

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
    idle: Arc<Mutex<Idle>>,
    connect_timeout: Duration,
}

/// Connections that nobody uses now, by host and port.
#[derive(Debug, Default)]
struct Idle {
    open: HashMap<String, (Instant, TcpStream)>,
    swept: Option<Instant>,
}

impl Idle {
    /// A connection that the other side has not closed and sent nothing on.
    fn take(&mut self, authority: &str) -> Option<TcpStream> {
        let (until, stream) = self.open.remove(authority)?;
        let is_silent = matches!(stream.try_read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
        (until > Instant::now() && is_silent).then_some(stream)
    }

    fn put(&mut self, authority: String, stream: TcpStream) {
        let now = Instant::now();
        if self.swept.is_none_or(|swept| now > swept + SWEEP_PERIOD) {
            self.swept = Some(now);
            self.open.retain(|_, (until, _)| *until > now);
        }
        if self.open.len() < IDLE_MAX {
            self.open.insert(authority, (now + IDLE_FOR, stream));
        }
    }
}

impl HttpClient {
    /// A client whose connections take at most `connect_timeout` to open and are closed after 45 s of silence.
    pub fn new(connect_timeout: Duration) -> Self {
        HttpClient {
            idle: Arc::default(),
            connect_timeout,
        }
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
        let answer = async {
            let uri: Uri = url.parse().map_err(|error| format!("not a URL: {error}"))?;
            self.ask(&uri, body_bytes_max).await
        };
        match tokio::time::timeout(timeout, answer).await {
            Ok(answer) => answer.map_err(|message| Error::Http { call, message }),
            Err(_) => Err(Error::Timeout {
                call,
                limit: timeout,
            }),
        }
    }

    async fn ask(&self, uri: &Uri, body_bytes_max: usize) -> Result<Answer, String> {
        let (Some("http"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err("not a URL: expected http://HOST:PORT/PATH".into());
        };
        let address = match authority.port() {
            Some(_) => authority.as_str().to_owned(),
            None => format!("{authority}:80"),
        };
        let kept = lock(&self.idle).take(&address);
        if let Some(stream) = kept
            && let Ok(answer) = self.exchange(&address, stream, uri, body_bytes_max).await
        {
            return Ok(answer);
        }
        let stream = tokio::time::timeout(self.connect_timeout, TcpStream::connect(&address))
            .await
            .map_err(|_| format!("no connection within {:?}", self.connect_timeout))?
            .map_err(|error| format!("no connection: {error}"))?;
        stream
            .set_nodelay(true)
            .map_err(|error| error.to_string())?;
        self.exchange(&address, stream, uri, body_bytes_max).await
    }

    /// One request and its answer; keeps the connection when the other side does.
    async fn exchange(
        &self,
        address: &str,
        stream: TcpStream,
        uri: &Uri,
        body_bytes_max: usize,
    ) -> Result<Answer, String> {
        let (sender, connection) = http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
            .await
            .map_err(|error| chain(&error))?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let request = Request::get(path)
            .header("host", address)
            .header("accept", "application/json, text/plain")
            .body(Empty::new())
            .map_err(|error| error.to_string())?;
        let mut connection = pin!(connection.without_shutdown());
        // The connection ends, and gives the stream back, when the sender is gone.
        let talk = async move {
            let mut sender = sender;
            let response = sender
                .send_request(request)
                .await
                .map_err(|error| chain(&error))?;
            let (keeps, status) = (keeps_alive(&response), response.status().as_u16());
            let body = Limited::new(response.into_body(), body_bytes_max)
                .collect()
                .await
                .map_err(|error| {
                    format!("body: {error} (at most {body_bytes_max} bytes are read)")
                })?
                .to_bytes();
            let body = String::from_utf8(body.into()).map_err(|_| "body is not UTF-8")?;
            Ok::<_, String>((keeps, Answer { status, body }))
        };
        let mut talk = pin!(talk);
        let mut ended = None;
        let (keeps, answer) = loop {
            tokio::select! {
                biased;
                said = &mut talk => break said?,
                parts = &mut connection, if ended.is_none() => ended = Some(parts),
            }
        };
        if keeps {
            let parts = match ended {
                Some(parts) => parts,
                None => connection.await,
            };
            if let Ok(parts) = parts
                && parts.read_buf.is_empty()
            {
                lock(&self.idle).put(address.to_owned(), parts.io.into_inner());
            }
        }
        Ok(answer)
    }
}

/// Whether the other side leaves the connection open: by RFC 9112 it does unless a list of options has `close` in it.
fn keeps_alive<B>(response: &Response<B>) -> bool {
    let lists = response.headers().get_all("connection").iter();
    let mut options = lists.flat_map(|list| list.as_bytes().split(|byte| *byte == b','));
    response.version() == Version::HTTP_11
        && !options.any(|option| option.trim_ascii().eq_ignore_ascii_case(b"close"))
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

    /// Answers every request on a connection until the other side closes it; ends a connection after `requests_max`.
    async fn keeping_server(requests_max: usize) -> (String, Arc<std::sync::atomic::AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let connections = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                tokio::spawn(async move {
                    let mut request = [0; 4096];
                    for _ in 0..requests_max {
                        match stream.read(&mut request).await {
                            Ok(0) | Err(_) => return,
                            Ok(_) => {}
                        }
                        let _ = stream
                            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                            .await;
                    }
                });
            }
        });
        (format!("http://{address}/load"), connections)
    }

    async fn ask_often(client: &HttpClient, url: &str, times: usize) {
        for _ in 0..times {
            let answer = client.get("engine", url, LIMIT, 100).await;
            assert_eq!(answer.expect("an answer").body, "ok");
        }
    }

    #[tokio::test]
    async fn a_connection_is_used_again_and_one_that_was_closed_is_replaced() {
        let client = HttpClient::new(LIMIT);
        let (url, connections) = keeping_server(usize::MAX).await;
        ask_often(&client, &url, 5).await;
        assert_eq!(connections.load(std::sync::atomic::Ordering::SeqCst), 1);
        let (url, connections) = keeping_server(2).await;
        ask_often(&client, &url, 6).await;
        let opened = connections.load(std::sync::atomic::Ordering::SeqCst);
        assert!((3..=6).contains(&opened), "{opened}");
    }

    #[test]
    fn close_is_found_in_any_list_and_case() {
        let keeps = |version, lists: &[&str]| {
            let mut response = Response::builder().version(version);
            for list in lists {
                response = response.header("connection", *list);
            }
            keeps_alive(&response.body(()).expect("a response"))
        };
        assert!(keeps(Version::HTTP_11, &[]) && keeps(Version::HTTP_11, &["keep-alive, x-closed"]));
        for lists in [
            &["close"][..],
            &["Upgrade , CLOSE"],
            &["keep-alive", "close"],
        ] {
            assert!(!keeps(Version::HTTP_11, lists), "{lists:?}");
        }
        assert!(!keeps(Version::HTTP_10, &[]));
    }

    #[tokio::test]
    async fn connections_that_are_kept_are_few() {
        let client = HttpClient::new(LIMIT);
        let (url, _) = keeping_server(usize::MAX).await;
        for number in 0..IDLE_MAX + 8 {
            let stream =
                TcpStream::connect(url.trim_start_matches("http://").trim_end_matches("/load"))
                    .await
                    .expect("a connection");
            lock(&client.idle).put(number.to_string(), stream);
        }
        assert_eq!(lock(&client.idle).open.len(), IDLE_MAX);
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
