//! The connection to the API server.
//!
//! Put together from kube's parts as kube does it, but for the buffers: hyper lets one grow to 400 kB while a list is read, and
//! the watch that follows on the connection keeps it. Each read of TLS gives 16 kB at most, so larger ones gain nothing.

use std::path::Path;
use std::time::Duration;

use hyper::body::{Body as HttpBody, Bytes};
use hyper::{Request, Response, Uri};
use hyper_timeout::TimeoutConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::layer::layer_fn;
use tower::{BoxError, Service, ServiceBuilder};

use crate::error::{Call, Error};
use crate::protobuf::{Protobuf, Read};

/// How long opening a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection that nobody uses stays open: it keeps its buffers and those of TLS, and a rollout opens some hundred at
/// once. Without a timer hyper looks for them only when the next is taken, and keeps all.
const IDLE_FOR: Duration = Duration::from_secs(10);

/// A client from the environment: `KUBECONFIG`, `~/.kube/config`, or the service account of the pod. Also the namespace
/// that the environment names.
///
/// # Errors
/// When there is no configuration, or it cannot be used; says what was tried.
pub async fn connect() -> Result<(Client, String), Error> {
    let call = call("from KUBECONFIG or the pod's service account");
    let config = Config::infer()
        .await
        .map_err(|error| failed(&call, error.to_string()))?;
    client_of(config, call)
}

/// A client as kubectl makes one: from `kubeconfig`, else from `KUBECONFIG` or `~/.kube/config`; with `context`, else
/// with the current one. Also the namespace of that context.
///
/// # Errors
/// When there is no configuration, or it cannot be used.
pub async fn connect_as(
    kubeconfig: Option<&Path>,
    context: Option<&str>,
) -> Result<(Client, String), Error> {
    let from = kubeconfig.map_or("KUBECONFIG or ~/.kube/config".into(), |path| {
        path.display().to_string()
    });
    let call = call(&format!("from {from}"));
    let read = match kubeconfig {
        Some(path) => Kubeconfig::read_from(path),
        None => Kubeconfig::read(),
    };
    let options = KubeConfigOptions {
        context: context.map(str::to_owned),
        ..KubeConfigOptions::default()
    };
    let read = read.map_err(|error| failed(&call, error.to_string()))?;
    let config = Config::from_custom_kubeconfig(read, &options)
        .await
        .map_err(|error| failed(&call, error.to_string()))?;
    client_of(config, call)
}

fn call(name: &str) -> Call {
    Call {
        verb: "configure",
        kind: "client",
        name: name.into(),
    }
}

fn failed(call: &Call, message: String) -> Error {
    Error::Http {
        call: call.clone(),
        message,
    }
}

fn client_of(mut config: Config, call: Call) -> Result<(Client, String), Error> {
    // `retry` repeats, within bounds; kube's own layer would go on for minutes.
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    let namespace = config.default_namespace.clone();
    let client = match config.proxy_url {
        // kube knows which proxies it can talk to.
        Some(_) => ClientBuilder::try_from(config)
            .map(|builder| builder.with_layer(&layer_fn(adapted)).build()),
        None => direct(config),
    };
    let client = client.map_err(|source| Error::Api {
        call,
        source: Box::new(source),
    })?;
    Ok((client, namespace))
}

/// Largest buffer that a connection keeps for reading.
const READ_BYTES_MAX: usize = 16 << 10;

fn direct(config: Config) -> Result<Client, kube::Error> {
    let mut connector = TimeoutConnector::new(config.rustls_https_connector()?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    let connections = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .http1_max_buf_size(READ_BYTES_MAX)
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_FOR)
        .build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(connections);
    Ok(Client::new(adapted(service), config.default_namespace))
}

/// What is asked and answered otherwise than kube does it: lists as new as the question, pods and nodes in protobuf.
fn adapted<S, B>(
    service: S,
) -> impl Service<Request<Body>, Response = Response<Read>, Error = S::Error, Future: Send> + Send
where
    S: Service<Request<Body>, Response = Response<B>, Future: Send> + Send,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let asked = Protobuf::default();
    let read = asked.clone();
    ServiceBuilder::new()
        .map_request(move |request| asked.ask(fresh(request)))
        .map_response(move |answer| read.read(answer))
        .service(service)
}

/// Has streamed lists be as new as the question. kube asks for one of any age (version 0), which the cache of an API server that
/// lags may answer with what was long ago; without a version it waits until it has caught up, as it does for client-go.
fn fresh(mut request: Request<Body>) -> Request<Body> {
    let query = request.uri().query().unwrap_or_default();
    if query
        .split('&')
        .any(|parameter| parameter == "sendInitialEvents=true")
    {
        let kept: Vec<&str> = query
            .split('&')
            .filter(|parameter| *parameter != "resourceVersion=0")
            .collect();
        let mut parts = request.uri().clone().into_parts();
        let asked = format!("{}?{}", request.uri().path(), kept.join("&"));
        parts.path_and_query = asked.parse().ok();
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use kube::config::AuthInfo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// Says what it was asked.
    async fn echo(listener: TcpListener) {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let mut asked = vec![0; 4096];
        let length = stream.read(&mut asked).await.expect("a request");
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("a head");
        stream.write_all(&asked[..length]).await.expect("a body");
    }

    #[tokio::test]
    async fn requests_go_where_the_configuration_says_and_carry_its_token_and_headers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}/prefix", listener.local_addr().expect("bound"));
        tokio::spawn(echo(listener));
        let mut config = Config::new(url.parse().expect("a URL"));
        config.default_namespace = "models".into();
        config.auth_info = AuthInfo {
            token: Some("secret-token".to_owned().into()),
            ..AuthInfo::default()
        };
        config.headers = vec![(
            hyper::header::USER_AGENT,
            hyper::header::HeaderValue::from_static("tester"),
        )];
        let (client, namespace) = client_of(config, call("by hand")).expect("a client");
        assert_eq!(
            (&*namespace, client.default_namespace()),
            ("models", "models")
        );
        let request = hyper::Request::get("/version").body(Vec::new());
        let asked = client.request_text(request.expect("a request")).await;
        let asked = asked.expect("an answer").to_ascii_lowercase();
        assert!(
            asked.starts_with("get /prefix/version http/1.1\r\n"),
            "{asked}"
        );
        assert!(
            asked.contains("\r\nauthorization: bearer secret-token\r\n"),
            "{asked}"
        );
        assert!(asked.contains("\r\nuser-agent: tester\r\n"), "{asked}");
    }

    /// Accepts connections and answers what is asked on them; each ends when the other side closes it.
    async fn serve(listener: TcpListener, open: Arc<AtomicUsize>) {
        loop {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let open = Arc::clone(&open);
            tokio::spawn(async move {
                open.fetch_add(1, Ordering::SeqCst);
                let mut asked = vec![0; 4096];
                while stream.read(&mut asked).await.is_ok_and(|length| length > 0) {
                    // Others come meanwhile, so that they open connections of their own.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
                    stream.write_all(answer).await.expect("an answer");
                }
                open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    }

    #[tokio::test]
    async fn connections_that_nobody_uses_any_more_are_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let open = Arc::new(AtomicUsize::new(0));
        tokio::spawn(serve(listener, Arc::clone(&open)));
        let config = Config::new(url.parse().expect("a URL"));
        let (client, _) = client_of(config, call("by hand")).expect("a client");
        let ask = || async {
            let request = hyper::Request::get("/version").body(Vec::new());
            let asked = client.request_text(request.expect("a request")).await;
            assert_eq!(asked.expect("an answer"), "{}");
        };
        futures::future::join_all((0..8).map(|_| ask())).await;
        assert_eq!(open.load(Ordering::SeqCst), 8);
        // One that is used goes on being used.
        ask().await;
        assert_eq!(open.load(Ordering::SeqCst), 8);
        tokio::time::pause();
        tokio::time::sleep(IDLE_FOR * 3).await;
        tokio::time::resume();
        let left = async {
            while open.load(Ordering::SeqCst) > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let left = tokio::time::timeout(Duration::from_secs(10), left).await;
        assert!(left.is_ok(), "{open:?} are open");
    }

    #[test]
    fn a_streamed_list_is_never_asked_for_at_any_age_and_nothing_else_changes() {
        let asked = |uri: &str| {
            let request = Request::get(uri).body(Body::empty()).expect("a request");
            fresh(request).uri().to_string()
        };
        let streamed = "https://host/p/api/v1/pods?&watch=true&labelSelector=a%3Db&sendInitialEvents=true\
            &resourceVersionMatch=NotOlderThan";
        assert_eq!(asked(&format!("{streamed}&resourceVersion=0")), streamed);
        for other in [
            "https://host/api/v1/pods?&watch=true&resourceVersion=0",
            "/api/v1/pods?limit=1&resourceVersion=0",
            "/version",
        ] {
            assert_eq!(asked(other), other);
        }
    }

    #[tokio::test]
    async fn a_proxy_that_kube_does_not_know_is_refused() {
        let mut config = Config::new("http://127.0.0.1:1".parse().expect("a URL"));
        config.proxy_url = Some("gopher://127.0.0.1:1".parse().expect("a URL"));
        let error = client_of(config, call("by hand"))
            .err()
            .expect("no such proxy");
        assert!(crate::http::chain(&error).contains("proxy"), "{error}");
    }
}
