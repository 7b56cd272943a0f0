//! Who may come in: connections are greeted beside each other, and who has nothing to say costs seconds and nobody else's.
//!
//! Whoever connects says which protocol it speaks and whether it has a secret; then both prove that theirs is the same
//! ([`crate::secret`]), the listening side first. Only then is anything believed. Messages are a length and JSON.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::secret::{Nonce, Nonces, Proof, Secret, Side, nonce};

/// Of the messages between ranks before they are a group; a rank of another version is refused.
const PROTOCOL: u32 = 2;
/// Longest message.
const MESSAGE_BYTES_MAX: u32 = 64 << 10;
/// How long a connection may take to say what it is, all in all.
pub(crate) const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that are greeted at once; more wait in the system's queue.
const GREETED_MAX: usize = 64;
/// Pause between two looks for somebody.
const LOOK: Duration = Duration::from_millis(5);

/// What a rank with a wrong secret, or without one, should do.
const SAME_SECRET: &str = "start every rank with the same --group-secret-file";

/// From who connects.
#[derive(Debug, Serialize, Deserialize)]
struct Knock {
    protocol: u32,
    // Another version may have neither.
    #[serde(default)]
    has_secret: bool,
    #[serde(default)]
    nonce: Nonce,
}

/// From who listens.
#[derive(Debug, Serialize, Deserialize)]
enum Challenge {
    Refused(String),
    Come {
        nonce: Nonce,
        /// Where there is a secret.
        proof: Option<Proof>,
    },
}

/// From who connected, where there is a secret.
#[derive(Debug, Serialize, Deserialize)]
struct Response {
    proof: Proof,
}

/// Why a connection came to nothing.
#[derive(Debug)]
pub(crate) enum Shut {
    /// The other side does not want this one, or this one not the other.
    Refused(String),
    /// It broke.
    Broken(io::Error),
}

impl From<io::Error> for Shut {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// Somebody who was let in, and the first thing that it said.
pub(crate) struct Arrival<T> {
    pub(crate) stream: TcpStream,
    pub(crate) from: SocketAddr,
    pub(crate) said: T,
}

type Greeted<T> = (SocketAddr, Result<(TcpStream, T), Shut>);

/// Where ranks come in.
pub(crate) struct Door<'a, T> {
    listener: &'a TcpListener,
    secret: Option<Secret>,
    /// Connections that are being greeted.
    greeted: usize,
    sender: Sender<Greeted<T>>,
    arrivals: Receiver<Greeted<T>>,
}

impl<'a, T: DeserializeOwned + Send + 'static> Door<'a, T> {
    /// Opens it.
    ///
    /// # Errors
    /// The socket is of no use.
    pub(crate) fn new(listener: &'a TcpListener, secret: Option<Secret>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (sender, arrivals) = mpsc::channel();
        Ok(Self {
            listener,
            secret,
            greeted: 0,
            sender,
            arrivals,
        })
    }

    /// The next one who is let in; none when `until` is over. Whoever is not is logged.
    pub(crate) fn next(&mut self, until: Instant) -> Option<Arrival<T>> {
        loop {
            self.let_greet();
            match self.arrivals.recv_timeout(LOOK) {
                Ok((from, outcome)) => {
                    self.greeted -= 1;
                    match outcome {
                        Ok((stream, said)) => return Some(Arrival { stream, from, said }),
                        Err(Shut::Refused(problem)) => {
                            tracing::warn!(%from, problem, "a rank was not let in");
                        }
                        Err(Shut::Broken(error)) => {
                            tracing::warn!(%from, %error, "somebody connected and did not say what a rank says");
                        }
                    }
                }
                Err(_) if Instant::now() >= until => return None,
                Err(_) => {}
            }
        }
    }

    /// Begins to greet whoever waits.
    fn let_greet(&mut self) {
        while self.greeted < GREETED_MAX {
            let (stream, from) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // The peer hung up before it was accepted, or the like.
                    tracing::warn!(%error, "a connection could not be accepted");
                    return;
                }
            };
            let (secret, sender) = (self.secret.clone(), self.sender.clone());
            let greet = move || {
                let outcome = greet(stream, secret.as_ref());
                // Nobody waits any more when the group is complete.
                let _ = sender.send((from, outcome));
            };
            match std::thread::Builder::new().spawn(greet) {
                Ok(_) => self.greeted += 1,
                Err(error) => tracing::warn!(%error, "a connection could not be greeted"),
            }
        }
    }
}

/// The listening side of a greeting.
fn greet<T: DeserializeOwned>(
    mut stream: TcpStream,
    secret: Option<&Secret>,
) -> Result<(TcpStream, T), Shut> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(GREETING_TIMEOUT))?;
    let until = Instant::now() + GREETING_TIMEOUT;
    let knock: Knock = read_until(&mut stream, until)?;
    if let Some(reason) = refusal(&knock, secret) {
        // It may be gone; the refusal is logged here too.
        let _ = write(&mut stream, &Challenge::Refused(reason.clone()));
        return Err(Shut::Refused(reason));
    }
    let nonces = Nonces {
        guest: knock.nonce,
        host: nonce()?,
    };
    let come = Challenge::Come {
        nonce: nonces.host,
        proof: secret.map(|secret| secret.proof(Side::Host, &nonces)),
    };
    write(&mut stream, &come)?;
    if let Some(secret) = secret {
        let response: Response = read_until(&mut stream, until)?;
        if !secret.is_proof(Side::Guest, &nonces, &response.proof) {
            let reason = format!("its group secret differs; {SAME_SECRET}");
            return Err(Shut::Refused(reason));
        }
    }
    let said = read_until(&mut stream, until)?;
    Ok((stream, said))
}

fn refusal(knock: &Knock, secret: Option<&Secret>) -> Option<String> {
    if knock.protocol != PROTOCOL {
        let theirs = knock.protocol;
        return Some(format!(
            "it speaks version {theirs} of the protocol between ranks, this rank version {PROTOCOL}; run the same engine \
             on every rank"
        ));
    }
    match (knock.has_secret, secret.is_some()) {
        (true, false) => Some(format!(
            "it has a group secret and this rank has none; {SAME_SECRET}"
        )),
        (false, true) => Some(format!(
            "it has no group secret and this rank has one; {SAME_SECRET}"
        )),
        _ => None,
    }
}

/// The connecting side of a greeting, until `until`; the listening side has all of its own time for it.
pub(crate) fn enter(
    stream: &mut TcpStream,
    secret: Option<&Secret>,
    until: Instant,
) -> Result<(), Shut> {
    stream.set_write_timeout(Some(GREETING_TIMEOUT))?;
    let guest = nonce()?;
    let knock = Knock {
        protocol: PROTOCOL,
        has_secret: secret.is_some(),
        nonce: guest,
    };
    write(stream, &knock)?;
    let (host, proof) = match read_until(stream, until)? {
        Challenge::Refused(reason) => return Err(Shut::Refused(reason)),
        Challenge::Come { nonce, proof } => (nonce, proof),
    };
    let Some(secret) = secret else {
        return Ok(());
    };
    let nonces = Nonces { guest, host };
    // A stranger is told nothing: our proof comes after its own.
    if !proof.is_some_and(|proof| secret.is_proof(Side::Host, &nonces, &proof)) {
        let reason = format!("its group secret differs; {SAME_SECRET}");
        return Err(Shut::Refused(reason));
    }
    let proof = secret.proof(Side::Guest, &nonces);
    write(stream, &Response { proof })?;
    Ok(())
}

pub(crate) fn write(stream: &mut TcpStream, message: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&length.to_le_bytes(), text.as_slice()].concat())
}

/// Reads a message that has to be there at `until`: a stranger may send a byte now and then.
pub(crate) fn read_until<T: DeserializeOwned>(
    stream: &mut TcpStream,
    until: Instant,
) -> io::Result<T> {
    let mut bounded = Bounded { stream, until };
    let mut length = [0; 4];
    bounded.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > MESSAGE_BYTES_MAX {
        let problem = format!("a message of {length} bytes, the limit is {MESSAGE_BYTES_MAX}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    let mut text = vec![0; length as usize];
    bounded.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

struct Bounded<'a> {
    stream: &'a mut TcpStream,
    until: Instant,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}
