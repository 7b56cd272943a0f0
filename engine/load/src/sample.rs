//! A digest of what a model is, in little time: for ranks to find out that they serve the same one.
//!
//! It covers the config, the names and sizes of the weight files, and pieces spread evenly over each. Two fine-tunes of a
//! model differ in most of their bytes, and so in these; two copies that differ in a single place may not.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::LoadError;
use crate::checkpoint::CONFIG_FILE;
use crate::download::hex;
use crate::packed::PACKED_FILE;

/// Pieces of a file.
const PIECES: u64 = 64;
/// Bytes of a piece.
const PIECE_BYTES: usize = 256;

/// Reads a few kilobytes of every weight file in a directory.
///
/// # Errors
/// A file cannot be read.
pub fn sample_digest(dir: &Path) -> Result<String, LoadError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| LoadError::Read { path, source }
    };
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .map_err(failed(dir))?
        .map(|entry| entry.map(|entry| entry.path()).map_err(failed(dir)))
        .collect::<Result<_, _>>()?;
    files.retain(|path| {
        path.ends_with(PACKED_FILE) || path.extension().is_some_and(|e| e == "safetensors")
    });
    files.sort();
    let mut hash = Sha256::new();
    let config = dir.join(CONFIG_FILE);
    hash.update(std::fs::read(&config).map_err(failed(&config))?);
    let mut piece = [0; PIECE_BYTES];
    for path in &files {
        let file = File::open(path).map_err(failed(path))?;
        let bytes = file.metadata().map_err(failed(path))?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        hash.update(format!("\n{name} {bytes}\n"));
        let room = bytes.saturating_sub(PIECE_BYTES as u64);
        let pieces = PIECES.min(bytes.div_ceil(PIECE_BYTES as u64));
        for index in 0..pieces {
            let at = match pieces {
                1 => 0,
                _ => (u128::from(room) * u128::from(index) / u128::from(pieces - 1)) as u64,
            };
            let part = &mut piece[..PIECE_BYTES.min(bytes as usize)];
            file.read_exact_at(part, at).map_err(failed(path))?;
            hash.update(part);
        }
    }
    Ok(format!("sample:{}", hex(&hash.finalize())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_bytes_names_sizes_and_configs_give_other_digests() {
        let dir = tempfile::tempdir().unwrap();
        let write =
            |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        let digest = || sample_digest(dir.path()).unwrap();
        assert!(sample_digest(dir.path()).is_err(), "no config.json");
        write("config.json", b"{}");
        write("tokenizer.json", b"{}");
        let mut seen = vec![digest()];
        let mut weights = vec![7u8; 100_000];
        write("a.safetensors", &weights);
        seen.push(digest());
        assert_eq!(digest(), seen[1]);
        weights.push(7);
        write("a.safetensors", &weights);
        seen.push(digest());
        weights.iter_mut().for_each(|byte| *byte += 1);
        write("a.safetensors", &weights);
        seen.push(digest());
        write("b.safetensors", b"");
        seen.push(digest());
        write("config.json", b"{ }");
        seen.push(digest());
        // What is no weight does not count.
        write("tokenizer.json", b"{ }");
        assert_eq!(Some(digest()), seen.last().cloned());
        let all = seen.len();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), all);
    }
}
