//! TLS from files that are read again when they change.
//!
//! Invariant: there is always one whole configuration in use. A new one takes its place only after all of its files
//! were read and fit together, so a rotation caught half-way, or a broken file, leaves the old certificate serving;
//! connections that are open keep the one they began with.
//!
//! Surprise: a client certificate is asked for but not demanded in the handshake. The kubelet probes without one, so
//! who must show one is decided by path, like API keys; one that is shown and not trusted ends the handshake.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sha2::{Digest, Sha256};
use thiserror::Error;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};

/// Largest file that is read; chains have kilobytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// How often the files are looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// Where the files are, all PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, then its intermediates.
    pub certificate: PathBuf,
    /// The key of the first certificate: PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
    /// Whom to trust to issue certificates of clients; absent asks for none.
    pub client_ca: Option<PathBuf>,
}

/// Why TLS cannot be served with these files.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{file} cannot be read: {source}", file = file.display())]
    Read {
        /// Which file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file holds something else.
    #[error("{file} {problem}", file = file.display())]
    Content {
        /// Which file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The key is of another certificate, or of a kind that is not served.
    #[error(
        "{key} is not the private key of the certificate in {certificate}: {source}; give the two files of one pair",
        key = key.display(), certificate = certificate.display()
    )]
    Pair {
        /// File of the key.
        key: PathBuf,
        /// File of the certificate.
        certificate: PathBuf,
        /// What rustls says.
        #[source]
        source: rustls::Error,
    },
}

struct Current {
    config: Arc<ServerConfig>,
    /// Of the files as they were at the last attempt, successful or not.
    digest: [u8; 32],
}

/// The configuration in use and where it came from.
pub struct Tls {
    files: TlsFiles,
    reload_interval: Duration,
    current: Mutex<Current>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Tls")
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn open(files: TlsFiles) -> Result<Self, TlsError> {
        let contents = Contents::read(&files)?;
        let current = Current {
            digest: contents.digest(),
            config: Arc::new(contents.config(&files)?),
        };
        Ok(Self {
            files,
            reload_interval: RELOAD_INTERVAL,
            current: Mutex::new(current),
        })
    }

    /// Looks at the files so often.
    #[must_use]
    pub fn reloading_every(mut self, interval: Duration) -> Self {
        self.reload_interval = interval;
        self
    }

    /// How often the files are looked at.
    pub(crate) fn reload_interval(&self) -> Duration {
        self.reload_interval
    }

    /// Whether clients must show a certificate.
    pub(crate) fn asks_for_clients(&self) -> bool {
        self.files.client_ca.is_some()
    }

    /// For the next connection.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.lock().config.clone())
    }

    /// Takes the files over if they changed; none when they did not. Files that cannot be used are tried again when
    /// they change once more.
    pub(crate) fn reload(&self) -> Option<Result<(), TlsError>> {
        let contents = match Contents::read(&self.files) {
            Ok(contents) => contents,
            Err(error) => {
                // Said once: the state "a file is missing" has a digest like any other.
                let digest = Sha256::digest(error.to_string()).into();
                let is_news = std::mem::replace(&mut self.lock().digest, digest) != digest;
                return is_news.then_some(Err(error));
            }
        };
        let digest = contents.digest();
        if std::mem::replace(&mut self.lock().digest, digest) == digest {
            return None;
        }
        Some(contents.config(&self.files).map(|config| {
            self.lock().config = Arc::new(config);
        }))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes of all files, read together.
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Contents {
    fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        Ok(Self {
            certificate: read(&files.certificate)?,
            key: read(&files.key)?,
            client_ca: files.client_ca.as_deref().map(read).transpose()?,
        })
    }

    fn digest(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        for part in [
            Some(&self.certificate),
            Some(&self.key),
            self.client_ca.as_ref(),
        ] {
            let part = part.map_or(&[][..], Vec::as_slice);
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        hasher.finalize().into()
    }

    fn config(&self, files: &TlsFiles) -> Result<ServerConfig, TlsError> {
        let chain = certificates(&self.certificate, &files.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| TlsError::Content {
            file: files.key.clone(),
            problem: format!("holds no private key in PEM that can be read: {error}"),
        })?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::Content {
                file: files.certificate.clone(),
                problem: format!("cannot be served: {error}"),
            })?;
        let verifier: Arc<dyn ClientCertVerifier> = match (&self.client_ca, &files.client_ca) {
            (Some(pem), Some(file)) => client_verifier(pem, file, provider)?,
            _ => WebPkiClientVerifier::no_client_auth(),
        };
        let mut config = builder
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|source| TlsError::Pair {
                key: files.key.clone(),
                certificate: files.certificate.clone(),
                source,
            })?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn client_verifier(
    pem: &[u8],
    file: &Path,
    provider: Arc<rustls::crypto::CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let unusable = |error: String| TlsError::Content {
        file: file.to_owned(),
        problem: format!("cannot be used to verify clients: {error}"),
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem, file)? {
        roots
            .add(certificate)
            .map_err(|error| unusable(error.to_string()))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .allow_unauthenticated()
        .build()
        .map_err(|error| unusable(error.to_string()))
}

fn certificates(pem: &[u8], file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let content = |problem: String| TlsError::Content {
        file: file.to_owned(),
        problem,
    };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| content(format!("is no PEM: {error}")))?;
    match chain.is_empty() {
        true => Err(content("holds no certificate in PEM".to_owned())),
        false => Ok(chain),
    }
}

fn read(file: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read {
        file: file.to_owned(),
        source,
    };
    let bytes = std::fs::metadata(file).map_err(failed)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(TlsError::Content {
            file: file.to_owned(),
            problem: format!("has {bytes} bytes, but at most {FILE_BYTES_MAX} are read"),
        });
    }
    std::fs::read(file).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pair {
        certificate: String,
        key: String,
    }

    fn pair() -> Pair {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        Pair {
            certificate: made.cert.pem(),
            key: made.signing_key.serialize_pem(),
        }
    }

    fn files(folder: &Path) -> TlsFiles {
        TlsFiles {
            certificate: folder.join("tls.crt"),
            key: folder.join("tls.key"),
            client_ca: None,
        }
    }

    fn write(files: &TlsFiles, certificate: &str, key: &str) {
        std::fs::write(&files.certificate, certificate).unwrap();
        std::fs::write(&files.key, key).unwrap();
    }

    #[test]
    fn what_is_wrong_with_a_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (pair(), pair());
        let files = files(folder.path());
        let error = |certificate: &str, key: &str| {
            write(&files, certificate, key);
            Tls::open(files.clone()).unwrap_err().to_string()
        };
        let text = error(&one.certificate, &other.key);
        assert!(
            text.contains("tls.key is not the private key of the certificate in")
                && text.contains("tls.crt"),
            "{text}"
        );
        let text = error("", &one.key);
        assert!(
            text.ends_with("tls.crt holds no certificate in PEM"),
            "{text}"
        );
        let text = error(&one.certificate, &one.certificate);
        assert!(text.contains("tls.key holds no private key"), "{text}");
        let text = error(&one.certificate.replace("MI", "@@"), &one.key);
        assert!(text.contains("tls.crt is no PEM"), "{text}");
        let text = error(&one.certificate, &"x".repeat(FILE_BYTES_MAX as usize + 1));
        assert!(text.contains("tls.key has 1048577 bytes"), "{text}");
        let mut with_ca = files.clone();
        with_ca.client_ca = Some(folder.path().join("ca.crt"));
        write(&files, &one.certificate, &one.key);
        let text = Tls::open(with_ca).unwrap_err().to_string();
        assert!(text.contains("ca.crt cannot be read"), "{text}");
        std::fs::remove_file(&files.key).unwrap();
        let text = Tls::open(files).unwrap_err().to_string();
        assert!(text.contains("tls.key cannot be read"), "{text}");
    }

    #[test]
    fn a_rotation_is_taken_over_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (pair(), pair());
        let files = files(folder.path());
        write(&files, &old.certificate, &old.key);
        let tls = Tls::open(files.clone()).unwrap();
        let before = tls.lock().config.clone();
        assert!(tls.reload().is_none(), "nothing changed");
        // Half a rotation.
        std::fs::write(&files.certificate, &new.certificate).unwrap();
        assert!(matches!(tls.reload(), Some(Err(TlsError::Pair { .. }))));
        assert!(tls.reload().is_none(), "said once");
        std::fs::remove_file(&files.key).unwrap();
        assert!(matches!(tls.reload(), Some(Err(TlsError::Read { .. }))));
        assert!(tls.reload().is_none(), "said once");
        assert!(Arc::ptr_eq(&before, &tls.lock().config));
        std::fs::write(&files.key, &new.key).unwrap();
        assert!(matches!(tls.reload(), Some(Ok(()))));
        assert!(!Arc::ptr_eq(&before, &tls.lock().config));
    }
}
