//! Accepts connections within limits, with TLS or without, and ends them gracefully.
//!
//! Invariant: a connection holds a slot from its first moment and every wait before its first request is bounded: for
//! its first bytes, for the handshake, for the head. Which HTTP it speaks is settled before hyper sees it, since hyper
//! itself would wait without end for a client that says nothing.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tower::ServiceExt;

use crate::state::Shared;
use crate::tls::Tls;

/// Pause after an accept that failed, for example because file descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Time for responses that are being written when the server ends.
const GOODBYE: Duration = Duration::from_secs(2);
/// Bytes of the head of a request; hyper answers 431 beyond it.
pub const HEAD_BYTES_MAX: usize = 64 << 10;
/// Header lines of a request.
pub const HEADERS_MAX: usize = 100;
/// Requests at once on one HTTP/2 connection.
pub const STREAMS_MAX: u32 = 256;
/// How HTTP/2 begins: no other request does.
const HTTP2_PREFACE: &[u8] = b"PRI";
/// How a TLS handshake begins.
const TLS_HANDSHAKE: u8 = 0x16;
/// For a client that took an `https` port for an `http` one.
const SPEAKS_TLS: &str = "{\"error\": {\"message\": \"this port speaks HTTPS; use https:// in the address\", \
    \"type\": \"invalid_request_error\", \"param\": null, \"code\": \"tls_required\"}}";

/// What the connection says about its client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// It showed a certificate that a trusted authority issued.
    pub is_verified: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    Http1,
    Http2,
}

/// Serves until `stop` fires; then lets open responses end.
pub async fn accept_loop(
    listener: TcpListener,
    router: Router,
    shared: Arc<Shared>,
    mut stop: oneshot::Receiver<()>,
) {
    let slots = Arc::new(Semaphore::new(shared.options.connections_max));
    let graceful = GracefulShutdown::new();
    loop {
        // Connections beyond the limit wait in the kernel's backlog, which is bounded too.
        let slot = tokio::select! {
            slot = slots.clone().acquire_owned() => slot,
            _ = &mut stop => break,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Tokens are small and must not wait for a full packet.
        let _ = stream.set_nodelay(true);
        let (router, shared, watcher) = (router.clone(), shared.clone(), graceful.watcher());
        tokio::spawn(async move {
            let _slot = slot;
            connection(stream, router, &shared, watcher).await;
        });
    }
    drop(listener);
    if tokio::time::timeout(GOODBYE, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::debug!("some connections were still open at the end");
    }
}

/// From the first byte to the last one.
async fn connection(stream: TcpStream, router: Router, shared: &Shared, watcher: Watcher) {
    let timeout = shared.options.header_timeout;
    let opened = match &shared.options.tls {
        None => match tokio::time::timeout(timeout, plain_version(&stream)).await {
            Ok(Ok(version)) => {
                serve(stream, version, Peer::default(), router, shared, watcher).await;
                return;
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no request in time".to_owned()),
        },
        Some(tls) => match tokio::time::timeout(timeout, shake_hands(stream, tls)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no handshake in time".to_owned()),
        },
    };
    match opened {
        Ok(stream) => {
            let (_, session) = stream.get_ref();
            let version = match session.alpn_protocol() {
                Some(b"h2") => Version::Http2,
                _ => Version::Http1,
            };
            let is_verified = session
                .peer_certificates()
                .is_some_and(|chain| !chain.is_empty());
            serve(
                stream,
                version,
                Peer { is_verified },
                router,
                shared,
                watcher,
            )
            .await;
        }
        Err(problem) => {
            if shared.options.tls.is_some() {
                shared.metrics.handshake_failures.inc();
            }
            tracing::debug!(problem, "a connection was not opened");
        }
    }
}

async fn shake_hands(
    mut stream: TcpStream,
    tls: &Tls,
) -> io::Result<tokio_rustls::server::TlsStream<TcpStream>> {
    let mut first = [0; 1];
    if stream.peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE {
        // rustls would send an alert, which such a client shows as a garbled answer.
        let answer = format!(
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n\
             content-length: {}\r\n\r\n{SPEAKS_TLS}",
            SPEAKS_TLS.len()
        );
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it speaks plain HTTP to a TLS port",
        ));
    }
    tls.acceptor().accept(stream).await
}

/// Which HTTP a client speaks by its first bytes.
async fn plain_version(stream: &TcpStream) -> io::Result<Version> {
    let mut first = [0; HTTP2_PREFACE.len()];
    loop {
        let count = stream.peek(&mut first).await?;
        if count == first.len() && first == HTTP2_PREFACE {
            return Ok(Version::Http2);
        }
        // A client that is gone is hyper's to notice.
        if count == 0 || count == first.len() || !HTTP2_PREFACE.starts_with(&first[..count]) {
            return Ok(Version::Http1);
        }
        // Peeking returns at once while the same bytes lie there.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    version: Version,
    peer: Peer,
    router: Router,
    shared: &Shared,
    watcher: Watcher,
) {
    let builder = Builder::new(TokioExecutor::new());
    let mut builder = match version {
        Version::Http1 => builder.http1_only(),
        Version::Http2 => builder.http2_only(),
    };
    builder
        .http1()
        .timer(TokioTimer::new())
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .header_read_timeout(shared.options.header_timeout);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .max_concurrent_streams(STREAMS_MAX)
        // A client that is gone without a word gives its slot back.
        .keep_alive_interval(shared.options.header_timeout);
    let service = router.map_request(move |mut request: hyper::Request<_>| {
        request.extensions_mut().insert(peer);
        request
    });
    let connection = builder
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
        .into_owned();
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(error, "a connection broke");
    }
}
