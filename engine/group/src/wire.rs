//! The head of every message between ranks.
//!
//! Twenty-four bytes, little-endian: a magic number, what kind it is, the number of the operation, and the bytes that
//! follow.

/// Bytes of a head.
pub(crate) const HEAD: usize = 24;
const MAGIC: u32 = u32::from_le_bytes(*b"cgr1");

/// What a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A rank's pieces of a buffer.
    Pieces,
    /// A rank's pieces of a buffer, for rank 0.
    PiecesForLeader,
    /// Here.
    Barrier,
    /// From rank 0 to all.
    Broadcast,
}

impl Kind {
    const ALL: [Self; 4] = [
        Self::Pieces,
        Self::PiecesForLeader,
        Self::Barrier,
        Self::Broadcast,
    ];
}

/// See the module's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub kind: Kind,
    /// Counts all operations of the group.
    pub operation: u64,
    pub bytes: u64,
}

impl Head {
    pub fn encode(self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..4].copy_from_slice(&MAGIC.to_le_bytes());
        head[4..8].copy_from_slice(&(self.kind as u32).to_le_bytes());
        head[8..16].copy_from_slice(&self.operation.to_le_bytes());
        head[16..].copy_from_slice(&self.bytes.to_le_bytes());
        head
    }

    /// `None` where it is no head.
    pub fn decode(head: &[u8; HEAD]) -> Option<Self> {
        let (words, _) = head.as_chunks::<4>();
        let [magic, kind, a, b, c, d] = *words else {
            return None;
        };
        let long = |low: [u8; 4], high: [u8; 4]| {
            u64::from(u32::from_le_bytes(low)) | u64::from(u32::from_le_bytes(high)) << 32
        };
        if u32::from_le_bytes(magic) != MAGIC {
            return None;
        }
        Some(Self {
            kind: *Kind::ALL.get(u32::from_le_bytes(kind) as usize)?,
            operation: long(a, b),
            bytes: long(c, d),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_comes_back_and_nothing_else_is_one() {
        for kind in Kind::ALL {
            let head = Head {
                kind,
                operation: 0x0102_0304_0506_0708,
                bytes: u64::MAX - 7,
            };
            let mut bytes = head.encode();
            assert_eq!(Head::decode(&bytes), Some(head));
            bytes[4] = 9;
            assert_eq!(Head::decode(&bytes), None, "no such kind");
        }
        assert_eq!(Head::decode(&[0; HEAD]), None, "no magic number");
        assert_eq!(Head::decode(b"GET / HTTP/1.1\r\nhost: a\r"), None);
    }
}
