//! What all ranks of a group know and nobody else does.
//!
//! Two ranks prove to each other that they know it by HMAC-SHA256 (RFC 2104) over two numbers, one chosen at random by
//! each side, and over who speaks: a proof is of no use in another connection, nor sent back to who made it. This says
//! who may join. What ranks tell each other afterwards is neither encrypted nor signed: who can change packets on their
//! way can still do so.

use std::fmt;

use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use thiserror::Error;

/// Shortest secret in bytes: as many as a random key of 128 bits.
const BYTES_MIN: usize = 16;
/// Longest secret in bytes.
const BYTES_MAX: usize = 4096;

/// Chosen anew for each connection by each of its sides.
pub(crate) type Nonce = [u8; 32];
/// An HMAC-SHA256.
pub(crate) type Proof = [u8; 32];

/// It is too short to be a secret, or too long to be meant.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "a secret of {bytes} bytes, expected {BYTES_MIN} to {BYTES_MAX}; make one with: openssl rand -hex 32"
)]
pub struct SecretError {
    /// Without the line's end.
    pub bytes: usize,
}

/// A secret; it is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Box<[u8]>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Which end of a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Who connected.
    Guest,
    /// Who listened.
    Host,
}

/// The numbers of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Nonces {
    pub(crate) guest: Nonce,
    pub(crate) host: Nonce,
}

impl Secret {
    /// Takes what a file holds: 16 to 4096 bytes, and one end of line that is not part of the secret.
    ///
    /// # Errors
    /// There are fewer or more.
    pub fn new(file: &[u8]) -> Result<Self, SecretError> {
        let line = file.strip_suffix(b"\n").unwrap_or(file);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if !(BYTES_MIN..=BYTES_MAX).contains(&line.len()) {
            return Err(SecretError { bytes: line.len() });
        }
        Ok(Self(line.into()))
    }

    /// One that nobody can foresee, for ranks that can be told it in memory.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn random() -> std::io::Result<Self> {
        Ok(Self(nonce()?.into()))
    }

    /// What `side` of the connection with these numbers says to prove that it knows the secret.
    pub(crate) fn proof(&self, side: Side, nonces: &Nonces) -> Proof {
        self.mac(side, nonces).finalize().into_bytes().into()
    }

    /// Whether a proof is right; takes as long for a wrong one.
    pub(crate) fn is_proof(&self, side: Side, nonces: &Nonces, proof: &Proof) -> bool {
        self.mac(side, nonces).verify_slice(proof).is_ok()
    }

    fn mac(&self, side: Side, nonces: &Nonces) -> Hmac<Sha256> {
        let speaker: &[u8] = match side {
            Side::Guest => b"cachalot rank, guest",
            Side::Host => b"cachalot rank, host",
        };
        // An HMAC takes keys of any length.
        #[allow(clippy::expect_used)]
        let mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("a key of any length");
        mac.chain_update(speaker)
            .chain_update(nonces.guest)
            .chain_update(nonces.host)
    }
}

/// A number that nobody can foresee.
///
/// # Errors
/// The system has none.
pub(crate) fn nonce() -> std::io::Result<Nonce> {
    let mut nonce = Nonce::default();
    getrandom::fill(&mut nonce).map_err(std::io::Error::other)?;
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_of_one_side_of_one_connection_with_one_secret() {
        let (ours, theirs) = (Secret([7; 32].into()), Secret([8; 32].into()));
        let nonces = Nonces {
            guest: nonce().unwrap(),
            host: nonce().unwrap(),
        };
        let proof = ours.proof(Side::Guest, &nonces);
        assert!(ours.is_proof(Side::Guest, &nonces, &proof));
        assert!(!ours.is_proof(Side::Host, &nonces, &proof), "sent back");
        assert!(!theirs.is_proof(Side::Guest, &nonces, &proof));
        for other in [
            Nonces {
                guest: nonce().unwrap(),
                ..nonces
            },
            Nonces {
                host: nonce().unwrap(),
                ..nonces
            },
        ] {
            assert!(!ours.is_proof(Side::Guest, &other, &proof), "said again");
        }
        assert_eq!(format!("{ours:?}"), "Secret(..)");
    }

    /// By Python:
    /// `python3 -c "import hmac; print(hmac.new(bytes([7])*32, b'cachalot rank, host'+bytes([1])*32+bytes([2])*32, 'sha256').hexdigest())"`.
    #[test]
    fn a_proof_is_what_another_implementation_computes() {
        let nonces = Nonces {
            guest: [1; 32],
            host: [2; 32],
        };
        let proof = Secret([7; 32].into()).proof(Side::Host, &nonces);
        let hex: String = proof.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "14a7df133f5c9576ed4584be760c8e9b4964418afeee6d2823495e54ac616411"
        );
    }
}
