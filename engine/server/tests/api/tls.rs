//! TLS over real sockets: certificates made here, rotated, wrong, missing, and clients that speak something else.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::harness::{Backend, Server, eventually, options};
use engine_server::{ServerOptions, Tls, TlsFiles};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

type Stream = StreamOwned<ClientConnection, TcpStream>;

/// A certificate and its key, PEM.
#[derive(Clone)]
struct Pair {
    certificate: String,
    key: String,
}

/// An authority that issues certificates for localhost.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    fn issue(&self) -> Pair {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        Pair {
            certificate: params.signed_by(&key, &self.0).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }
}

fn write(folder: &Path, pair: &Pair) -> TlsFiles {
    let files = TlsFiles {
        certificate: folder.join("tls.crt"),
        key: folder.join("tls.key"),
        client_ca: None,
    };
    std::fs::write(&files.certificate, &pair.certificate).unwrap();
    std::fs::write(&files.key, &pair.key).unwrap();
    files
}

fn with_tls(files: TlsFiles) -> ServerOptions {
    let tls = Tls::open(files).unwrap();
    let mut options = options();
    options.tls = Some(Arc::new(tls.reloading_every(Duration::from_millis(20))));
    options
}

/// A handshake with a server whose certificate `authority` must have issued.
fn connect(
    address: SocketAddr,
    authority: &str,
    client: Option<&Pair>,
    alpn: &[u8],
) -> std::io::Result<Stream> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(authority.as_bytes()).unwrap())
        .unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match client {
        None => builder.with_no_client_auth(),
        Some(pair) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    let name = ServerName::try_from("localhost").unwrap();
    let mut session = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut tcp = TcpStream::connect(address).unwrap();
    tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    while session.is_handshaking() {
        session.complete_io(&mut tcp)?;
    }
    Ok(StreamOwned::new(session, tcp))
}

fn ask(stream: &mut Stream, method: &str, path: &str, body: &str) -> std::io::Result<()> {
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn answer(stream: &mut Stream) -> std::io::Result<(u16, String)> {
    let mut text = String::new();
    match stream.read_to_string(&mut text) {
        // Whoever closes with `connection: close` need not say goodbye in TLS.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof && !text.is_empty() => {}
        other => {
            other?;
        }
    }
    let status = text.split(' ').nth(1).unwrap().parse().unwrap();
    let body = text.split_once("\r\n\r\n").unwrap().1.to_owned();
    Ok((status, body))
}

fn get(server: &Server, authority: &str, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = connect(server.address, authority, None, b"http/1.1")?;
    ask(&mut stream, "GET", path, "")?;
    answer(&mut stream)
}

fn start(options: ServerOptions, authority: &Authority, backend: Backend) -> Server {
    let server = Server::begin(options, crate::harness::loader(backend));
    eventually("ready", || {
        get(&server, &authority.pem(), "/readyz").unwrap().0 == 200
    });
    server
}

fn generate() -> String {
    json!({"prompt": "x", "max_tokens": 60, "ignore_eos": true, "temperature": 0, "stream": true})
        .to_string()
}

#[test]
fn answers_are_those_of_the_plain_port() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let options = with_tls(write(folder.path(), &authority.issue()));
    let server = start(options, &authority, Backend::quick());
    let body = json!({"prompt": "x", "max_tokens": 20, "temperature": 0}).to_string();
    let mut stream = connect(server.address, &authority.pem(), None, b"http/1.1").unwrap();
    ask(&mut stream, "POST", "/v1/completions", &body).unwrap();
    let (status, encrypted) = answer(&mut stream).unwrap();
    assert_eq!(status, 200, "{encrypted}");
    let plain = Server::start(crate::harness::options(), Backend::quick());
    let plain = plain.send("POST", "/v1/completions", &[], body.as_bytes());
    let text = |body: &str| {
        let value: Value = serde_json::from_str(body).unwrap();
        value["choices"][0]["text"].clone()
    };
    assert_eq!(text(&encrypted), text(&plain.body));
    // HTTP/2 is offered to those who ask for it.
    let stream = connect(server.address, &authority.pem(), None, b"h2").unwrap();
    assert_eq!(stream.conn.alpn_protocol(), Some(&b"h2"[..]));
    // Another authority's clients do not take this server for theirs.
    let stranger = get(&server, &Authority::new().pem(), "/livez").unwrap_err();
    assert!(stranger.to_string().contains("certificate"), "{stranger}");
}

#[test]
fn a_rotated_certificate_is_served_without_a_restart_or_a_broken_answer() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::new(), Authority::new());
    let options = with_tls(write(folder.path(), &old.issue()));
    let server = start(options, &old, Backend::slow(Duration::from_millis(10)));
    let mut open = connect(server.address, &old.pem(), None, b"http/1.1").unwrap();
    ask(&mut open, "POST", "/v1/completions", &generate()).unwrap();
    let mut first = [0; 1];
    open.read_exact(&mut first).unwrap();

    let pair = new.issue();
    write(folder.path(), &pair);
    eventually("the new certificate", || {
        get(&server, &new.pem(), "/livez").is_ok()
    });
    assert!(get(&server, &old.pem(), "/livez").is_err());
    let mut rest = String::new();
    let _ = open.read_to_string(&mut rest);
    assert!(rest.contains("data: [DONE]"), "{rest}");

    // A key of another certificate, then a missing file: the last good pair goes on.
    let broken = Pair {
        key: old.issue().key,
        ..pair.clone()
    };
    // A rotation that is looked at half-way counts as a failure too, so only the rise is certain.
    let failures = || {
        let (_, metrics) = get(&server, &new.pem(), "/metrics").unwrap();
        let line = "cachalot_engine_tls_reloads_total{engine=\"0\",model_name=\"toy\",result=\"failure\"} ";
        let found = metrics.lines().find_map(|found| found.strip_prefix(line));
        found.unwrap().parse::<u64>().unwrap()
    };
    let before = failures();
    write(folder.path(), &broken);
    eventually("a key of another certificate is noticed", || {
        failures() > before
    });
    let before = failures();
    std::fs::remove_file(folder.path().join("tls.key")).unwrap();
    eventually("a missing key is noticed", || failures() > before);
    write(folder.path(), &old.issue());
    eventually("the old authority again", || {
        get(&server, &old.pem(), "/livez").is_ok()
    });
}

#[test]
fn plain_http_to_a_tls_port_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let options = with_tls(write(folder.path(), &authority.issue()));
    let server = start(options, &authority, Backend::quick());
    let refused = server.get("/livez");
    assert_eq!(refused.status, 400);
    assert_eq!(refused.json()["error"]["code"], "tls_required");
    // Noise is no handshake either, and both are counted.
    let mut noise = TcpStream::connect(server.address).unwrap();
    noise
        .write_all(&[0x16, 3, 1, 0, 5, 0xff, 0xff, 0xff, 0xff, 0xff])
        .unwrap();
    let _ = noise.read(&mut [0; 64]);
    let line = "cachalot_engine_tls_handshake_failures_total{engine=\"0\",model_name=\"toy\"} 2";
    eventually(line, || {
        get(&server, &authority.pem(), "/metrics")
            .unwrap()
            .1
            .contains(line)
    });
}

/// The frames by which a server begins HTTP/2.
fn settings(mut stream: impl Read) -> [u8; 9] {
    let mut head = [0; 9];
    stream.read_exact(&mut head).unwrap();
    head
}

#[test]
fn http2_is_spoken_with_and_without_tls_however_its_beginning_is_cut() {
    const BEGINNING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    const SETTINGS: u8 = 4;
    let plain = Server::start(options(), Backend::quick());
    for cut in [1, 2, 3, 24] {
        let mut stream = TcpStream::connect(plain.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream.write_all(&BEGINNING[..cut]).unwrap();
        // Long enough for the server to look at the first piece alone; right either way.
        std::thread::sleep(Duration::from_millis(20));
        stream.write_all(&BEGINNING[cut..]).unwrap();
        assert_eq!(settings(&stream)[3], SETTINGS, "{cut}");
    }
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let options = with_tls(write(folder.path(), &authority.issue()));
    let server = start(options, &authority, Backend::quick());
    let mut stream = connect(server.address, &authority.pem(), None, b"h2").unwrap();
    stream.write_all(BEGINNING).unwrap();
    assert_eq!(settings(stream)[3], SETTINGS);
}

#[test]
fn a_client_that_says_nothing_gives_its_connection_back() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    for is_encrypted in [true, false] {
        let mut options = match is_encrypted {
            true => with_tls(write(folder.path(), &authority.issue())),
            false => options(),
        };
        options.connections_max = 1;
        options.header_timeout = Duration::from_millis(200);
        let server = Server::begin(options, crate::harness::loader(Backend::quick()));
        // The only connection: silent before its first byte, then in the middle of the preface of HTTP/2.
        for beginning in [&b""[..], b"P", b"\x16\x03"] {
            let mut silent = TcpStream::connect(server.address).unwrap();
            silent.write_all(beginning).unwrap();
            let status = match is_encrypted {
                true => get(&server, &authority.pem(), "/livez").unwrap().0,
                false => server.get("/livez").status,
            };
            assert_eq!(status, 200, "after {beginning:?}");
        }
    }
}

#[test]
fn a_client_certificate_is_needed_where_a_key_would_be() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, clients) = (Authority::new(), Authority::new());
    let mut files = write(folder.path(), &authority.issue());
    let client_ca = folder.path().join("ca.crt");
    std::fs::write(&client_ca, clients.pem()).unwrap();
    files.client_ca = Some(client_ca);
    let server = start(with_tls(files), &authority, Backend::quick());
    let models = |client: Option<&Pair>| {
        let mut stream = connect(server.address, &authority.pem(), client, b"http/1.1")?;
        ask(&mut stream, "GET", "/v1/models", "")?;
        answer(&mut stream)
    };
    let (status, body) = models(None).unwrap();
    assert_eq!(status, 401);
    assert!(body.contains("client_certificate_required"), "{body}");
    assert_eq!(models(Some(&clients.issue())).unwrap().0, 200);
    // Shown, but issued by somebody else: no connection at all.
    assert!(models(Some(&authority.issue())).is_err());
    // A kubelet shows none.
    assert_eq!(get(&server, &authority.pem(), "/livez").unwrap().0, 200);
}
