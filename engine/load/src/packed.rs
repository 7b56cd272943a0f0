//! A packed model: one file with every tensor in the layout that a backend computes with, to be mapped and used as it is.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `cachalot` |
//! | 4 | version, little-endian like all numbers |
//! | 4 | zero |
//! | 8 | length of the header |
//! | 32 | SHA-256 of the header |
//! | … | the header, [`PackedHeader`] as JSON |
//! | … | sections, the first at a page, each at a cache line, zeros between |
//!
//! Invariant: an open file has a header that is whole and of this version, and exactly the bytes that the header
//! describes. What the bytes mean is the backend's business: the header names its layout. Digests of the sections are
//! checked when asked for, since that reads the whole file.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Advice, Mmap};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::download::hex;
use crate::mapped::Mapped;
use crate::{LoadError, Progress};

/// Name of the file in a model directory.
pub const PACKED_FILE: &str = "model.packed";
const MAGIC: [u8; 8] = *b"cachalot";
const VERSION: u32 = 1;
/// Bytes before the header.
const PRELUDE: usize = 56;
/// A model with a hundred thousand tensors has a header of 25 MB.
const HEADER_BYTES_MAX: u64 = 256 << 20;
const PAGE: u64 = 4096;
const CACHE_LINE: u64 = 64;

/// What a packed file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PackedHeader {
    /// The backend's name for how sections are laid out; changes with every change of it.
    pub layout: String,
    /// Digest of the model's config.
    pub config: String,
    /// How the weights are kept, in words.
    pub form: String,
    /// In the order of the file.
    pub sections: Vec<Section>,
}

/// A tensor, or one of the parts that a tensor was split into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Section {
    /// The tensor, and after `#` the part.
    pub name: String,
    /// The form of its elements.
    pub form: String,
    /// Rows and columns; rows that stand for themselves in the layout.
    pub shape: [u64; 3],
    /// Length.
    pub bytes: u64,
    /// SHA-256 in hexadecimal digits.
    pub sha256: String,
}

impl PackedHeader {
    /// Where each section begins, and the file ends.
    fn offsets(&self, header_bytes: u64) -> Option<(Vec<u64>, u64)> {
        let mut at = (PRELUDE as u64 + header_bytes).next_multiple_of(PAGE);
        let mut offsets = Vec::with_capacity(self.sections.len());
        for section in &self.sections {
            offsets.push(at);
            at = at
                .checked_add(section.bytes)?
                .checked_next_multiple_of(CACHE_LINE)?;
        }
        Some((offsets, at))
    }

    /// Bytes of all sections.
    pub fn bytes(&self) -> u64 {
        self.sections.iter().map(|section| section.bytes).sum()
    }
}

/// Writes a packed file under another name and moves it into place when it is whole.
#[derive(Debug)]
pub struct PackedWriter {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    header: PackedHeader,
    header_bytes: usize,
    next: usize,
    at: u64,
}

impl PackedWriter {
    /// Begins `path`; digests in `header` are filled in later.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn create(path: &Path, mut header: PackedHeader) -> Result<Self, LoadError> {
        // As long as the digests that will take their place.
        for section in &mut header.sections {
            section.sha256 = "0".repeat(64);
        }
        let partial = path.with_extension("packed.partial");
        let file = File::create(&partial).map_err(|source| write_error(&partial, source))?;
        let header_bytes = to_json(&header)?.len();
        let mut writer = Self {
            path: path.to_owned(),
            file: BufWriter::with_capacity(1 << 20, file),
            partial,
            header,
            header_bytes,
            next: 0,
            at: 0,
        };
        writer.pad_to((PRELUDE + header_bytes) as u64, PAGE)?;
        Ok(writer)
    }

    /// Writes the next section.
    ///
    /// # Errors
    /// When the bytes are not as many as announced, or cannot be written.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        let section = self.header.sections.get_mut(self.next).ok_or_else(|| {
            LoadError::Backend("more sections than the packed file's header announces".into())
        })?;
        if section.bytes != bytes.len() as u64 {
            return Err(LoadError::Backend(format!(
                "packed section {} has {} bytes, {} were announced",
                section.name,
                bytes.len(),
                section.bytes
            )));
        }
        section.sha256 = hex(&Sha256::digest(bytes));
        self.next += 1;
        self.file
            .write_all(bytes)
            .map_err(|source| write_error(&self.partial, source))?;
        self.at += bytes.len() as u64;
        self.pad_to(self.at, CACHE_LINE)
    }

    /// Fills the header in and moves the file into place.
    ///
    /// # Errors
    /// When sections are missing or the file cannot be written.
    pub fn finish(mut self) -> Result<(), LoadError> {
        if self.next != self.header.sections.len() {
            return Err(LoadError::Backend(format!(
                "{} of {} packed sections were written",
                self.next,
                self.header.sections.len()
            )));
        }
        let json = to_json(&self.header)?;
        debug_assert_eq!(json.len(), self.header_bytes);
        let mut start = Vec::with_capacity(PRELUDE + json.len());
        start.extend(MAGIC);
        start.extend(VERSION.to_le_bytes());
        start.extend([0; 4]);
        start.extend((json.len() as u64).to_le_bytes());
        start.extend(Sha256::digest(&json));
        start.extend(json);
        let written = self
            .file
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.file.write_all(&start))
            .and_then(|()| self.file.flush())
            .and_then(|()| self.file.get_ref().sync_all())
            .and_then(|()| std::fs::rename(&self.partial, &self.path));
        written.map_err(|source| write_error(&self.path, source))
    }

    /// Zeros from the file's end, which is before `from`, to the next multiple of `unit` after `from`.
    fn pad_to(&mut self, from: u64, unit: u64) -> Result<(), LoadError> {
        let end = from.next_multiple_of(unit);
        let zeros = std::io::repeat(0);
        std::io::copy(
            &mut std::io::Read::take(zeros, end - self.at),
            &mut self.file,
        )
        .map_err(|source| write_error(&self.partial, source))?;
        self.at = end;
        Ok(())
    }
}

fn write_error(path: &Path, source: std::io::Error) -> LoadError {
    LoadError::Write {
        path: path.to_owned(),
        source,
    }
}

fn to_json(header: &PackedHeader) -> Result<Vec<u8>, LoadError> {
    serde_json::to_vec(header).map_err(|error| LoadError::Backend(error.to_string()))
}

/// An open packed file.
#[derive(Debug)]
pub struct PackedModel {
    header: PackedHeader,
    offsets: Vec<u64>,
    map: Arc<Mmap>,
}

impl PackedModel {
    /// Maps the file at `path` and checks its header.
    ///
    /// # Errors
    /// Names what was found and expected.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let read_error = |source| LoadError::Read {
            path: path.into(),
            source,
        };
        let file = File::open(path).map_err(read_error)?;
        // SAFETY: the map is only read; see the note on files that shrink in `checkpoint`.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(read_error)?;
        let (header, offsets) = read_header(&map, map.len() as u64)?;
        // A hint; without it pages come one fault at a time.
        let _ = map.advise(Advice::WillNeed);
        Ok(Self {
            header,
            offsets,
            map: Arc::new(map),
        })
    }

    /// What the file says it holds.
    pub fn header(&self) -> &PackedHeader {
        &self.header
    }

    /// Bytes of all sections.
    pub fn bytes(&self) -> u64 {
        self.header.bytes()
    }

    /// The bytes of a section.
    pub fn section(&self, index: usize) -> Option<Mapped> {
        let begin = *self.offsets.get(index)? as usize;
        let end = begin + self.header.sections.get(index)?.bytes as usize;
        Mapped::new(&self.map, begin..end)
    }

    /// Reads everything and compares it with the digests; `progress` counts bytes.
    ///
    /// # Errors
    /// Names the first section that differs.
    pub fn verify(&self, progress: &Progress) -> Result<(), LoadError> {
        progress.begin(self.bytes());
        for (index, section) in self.header.sections.iter().enumerate() {
            let bytes = self.section(index);
            let found = hex(&Sha256::digest(bytes.as_deref().unwrap_or_default()));
            if found != section.sha256 {
                return Err(LoadError::Corrupt {
                    file: PACKED_FILE.into(),
                    problem: format!(
                        "section {} has the digest {found}, expected {}; pack the model again",
                        section.name, section.sha256
                    ),
                });
            }
            progress.add(section.bytes);
        }
        Ok(())
    }
}

fn malformed(problem: String) -> LoadError {
    LoadError::Malformed {
        file: PACKED_FILE.into(),
        problem,
    }
}

fn truncated(problem: String) -> LoadError {
    LoadError::Truncated {
        file: PACKED_FILE.into(),
        problem,
    }
}

/// The header in the first bytes of a file of `file_bytes`, which must be as long as it says, and where each section
/// begins.
pub(crate) fn read_header(
    start: &[u8],
    file_bytes: u64,
) -> Result<(PackedHeader, Vec<u64>), LoadError> {
    let (prelude, rest) = split_prelude(start)?;
    let length = header_bytes(prelude)?;
    let Some(json) = rest.get(..length as usize) else {
        return Err(truncated(format!(
            "header of {length} bytes in a file of {file_bytes} bytes"
        )));
    };
    let (found, expected) = (hex(&Sha256::digest(json)), hex(&prelude[24..]));
    if found != expected {
        return Err(LoadError::Corrupt {
            file: PACKED_FILE.into(),
            problem: format!(
                "the header has the digest {found}, expected {expected}; pack the model again"
            ),
        });
    }
    let header: PackedHeader = serde_json::from_slice(json)
        .map_err(|error| malformed(format!("header is not valid: {error}")))?;
    let (offsets, end) = header
        .offsets(length)
        .ok_or_else(|| malformed("the sections' lengths overflow".into()))?;
    if file_bytes != end {
        return Err(truncated(format!(
            "{file_bytes} bytes, its header describes {end}; pack the model again"
        )));
    }
    Ok((header, offsets))
}

/// Where the header ends, told from the first bytes of a file.
pub(crate) fn header_end(start: &[u8]) -> Result<u64, LoadError> {
    let (prelude, _) = split_prelude(start)?;
    Ok(PRELUDE as u64 + header_bytes(prelude)?)
}

fn split_prelude(start: &[u8]) -> Result<(&[u8; PRELUDE], &[u8]), LoadError> {
    let short = || truncated(format!("{} bytes, too short for a header", start.len()));
    start.split_first_chunk().ok_or_else(short)
}

/// Length of the header.
fn header_bytes(prelude: &[u8; PRELUDE]) -> Result<u64, LoadError> {
    if prelude[..8] != MAGIC {
        return Err(malformed("does not begin as a packed model does".into()));
    }
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| prelude[at + byte]));
    let version = word(8);
    if version != VERSION {
        return Err(malformed(format!(
            "version {version}, this engine reads version {VERSION}; pack the model again"
        )));
    }
    let length = u64::from(word(16)) | u64::from(word(20)) << 32;
    if length > HEADER_BYTES_MAX {
        return Err(malformed(format!(
            "header length {length} exceeds the limit of {HEADER_BYTES_MAX} bytes"
        )));
    }
    Ok(length)
}
