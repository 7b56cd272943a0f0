//! The digest of what a model's weight files hold, for a replacement that must be the announced one.
//!
//! It is what `sha256sum *.safetensors | sha256sum` prints in the model's directory, or the same of the one packed file,
//! so that anyone can compute it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::LoadError;
use crate::download::hex;
use crate::packed::PACKED_FILE;
use crate::progress::Progress;

/// Bytes read at once.
const PIECE_BYTES: usize = 1 << 20;

/// Reads all weight files of a directory; `progress` counts their bytes.
///
/// # Errors
/// There are none, or one cannot be read.
pub fn content_digest(dir: &Path, progress: &Progress) -> Result<String, LoadError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| LoadError::Read { path, source }
    };
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .map_err(failed(dir))?
        .map(|entry| entry.map(|entry| entry.path()).map_err(failed(dir)))
        .collect::<Result<_, _>>()?;
    let is_packed = files.iter().any(|path| path.ends_with(PACKED_FILE));
    files.retain(|path| match is_packed {
        true => path.ends_with(PACKED_FILE),
        false => path.extension().is_some_and(|e| e == "safetensors"),
    });
    files.sort();
    if files.is_empty() {
        return Err(LoadError::NotFound(format!(
            "{} has no weight files (*.safetensors or {PACKED_FILE})",
            dir.display()
        )));
    }
    let mut total = 0;
    for path in &files {
        total += std::fs::metadata(path).map_err(failed(path))?.len();
    }
    progress.begin(total);
    let mut listing = Sha256::new();
    let mut piece = vec![0; PIECE_BYTES];
    for path in &files {
        let mut file = File::open(path).map_err(failed(path))?;
        let mut hash = Sha256::new();
        loop {
            let count = file.read(&mut piece).map_err(failed(path))?;
            if count == 0 {
                break;
            }
            hash.update(&piece[..count]);
            progress.add(count as u64);
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        listing.update(format!("{}  {name}\n", hex(&hash.finalize())));
    }
    Ok(format!("sha256:{}", hex(&listing.finalize())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_that_of_the_coreutils() {
        let dir = tempfile::tempdir().unwrap();
        let progress = Progress::default();
        let error = content_digest(dir.path(), &progress).unwrap_err();
        assert!(error.to_string().contains("no weight files"), "{error}");
        std::fs::write(dir.path().join("b.safetensors"), b"beta\n").unwrap();
        std::fs::write(dir.path().join("a.safetensors"), b"alpha\n").unwrap();
        std::fs::write(dir.path().join("config.json"), b"{}").unwrap();
        // printf 'alpha\n' >a.safetensors; printf 'beta\n' >b.safetensors; sha256sum *.safetensors | sha256sum
        let expected = "e55864cf62225ab342cc4bd9b49bfa2d4b89daf09d0bd06084f93ac935965771";
        let found = content_digest(dir.path(), &progress).unwrap();
        assert_eq!(found, format!("sha256:{expected}"));
        assert_eq!((progress.done(), progress.total()), (11, 11));
        std::fs::write(dir.path().join("b.safetensors"), b"beta!").unwrap();
        assert_ne!(content_digest(dir.path(), &progress).unwrap(), found);
        // Where there is a packed file, it is what an engine reads.
        std::fs::write(dir.path().join(PACKED_FILE), b"packed").unwrap();
        let packed = content_digest(dir.path(), &progress).unwrap();
        std::fs::write(dir.path().join("a.safetensors"), b"other").unwrap();
        assert_eq!(content_digest(dir.path(), &progress).unwrap(), packed);
    }
}
