//! A directory of models that several processes share, within a limit.
//!
//! | in the directory | what |
//! |---|---|
//! | `FOLDER/` | a model, complete or being fetched |
//! | `FOLDER.lock` | held shared by every process that uses the model; holds its bytes as text, changed at each use |
//! | `.lock` | held for the moment in which room is made or a model is entered |
//!
//! Invariant: a model whose lock anyone holds is never removed, and the announced bytes of all models together stay
//! within the limit. The locks are the kernel's: they go with their process, however it ends.
//!
//! Surprise: lock files are opened, and removed, only under `.lock`. So nobody ever holds the lock of a file that has
//! been removed while another makes a new one of that name.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::LoadError;
use crate::download::write_error;

/// Held while the directory is looked through or changed.
const LOCK_FILE: &str = ".lock";
/// For counting files, and for removing those of a few models.
const DOOR_PATIENCE: Duration = Duration::from_secs(600);
/// Time between two looks at a lock that another process holds.
const LOOK: Duration = Duration::from_millis(200);
/// Added to a model's folder for the name of its lock.
const LOCK_SUFFIX: &str = ".lock";

/// A local model directory. One in the cache is not removed before this is dropped.
#[derive(Debug)]
pub struct Local {
    dir: PathBuf,
    lock: Option<File>,
}

impl Local {
    /// A directory that is not the cache's.
    pub fn outside(dir: PathBuf) -> Self {
        Self { dir, lock: None }
    }

    /// The directory, which now stays until the process ends.
    pub fn keep(self) -> PathBuf {
        if let Some(lock) = self.lock {
            // Descriptors are closed, and their locks given up, by the kernel.
            std::mem::forget(lock);
        }
        self.dir
    }
}

impl Deref for Local {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.dir
    }
}

/// Enters the model of `folder`, which takes `bytes`, and makes room for it where there is a limit.
///
/// # Errors
/// When the directory cannot be written, or the models in use leave too little of the limit.
pub(crate) fn enter(
    cache: &Path,
    folder: &str,
    bytes: u64,
    limit_bytes: Option<u64>,
) -> Result<Local, LoadError> {
    std::fs::create_dir_all(cache).map_err(|source| write_error(cache, 0, source))?;
    let door_path = cache.join(LOCK_FILE);
    let door = open_lock(&door_path)?;
    wait_for(&door, &door_path, DOOR_PATIENCE, || 0)?;
    if let Some(limit) = limit_bytes {
        make_room(cache, folder, bytes, limit)?;
    }
    let path = cache.join(format!("{folder}{LOCK_SUFFIX}"));
    let mut lock = open_lock(&path)?;
    let dir = cache.join(folder);
    let entered = lock
        .lock_shared()
        .and_then(|()| lock.set_len(0))
        // Also says when the model was last used.
        .and_then(|()| write!(lock, "{bytes}"))
        .and_then(|()| std::fs::create_dir_all(&dir));
    entered.map_err(|source| write_error(&dir, 0, source))?;
    Ok(Local {
        dir,
        lock: Some(lock),
    })
}

fn open_lock(path: &Path) -> Result<File, LoadError> {
    let mut options = OpenOptions::new();
    let opened = options.create(true).truncate(false).write(true).open(path);
    opened.map_err(|source| match source.kind() {
        ErrorKind::PermissionDenied => LoadError::CacheDenied {
            path: path.into(),
            source,
        },
        _ => write_error(path, 0, source),
    })
}

/// Locks a file. While another process holds it, `done` counts what that one has done; one that adds nothing for
/// `patience` is given up.
pub(crate) fn wait_for(
    file: &File,
    path: &Path,
    patience: Duration,
    mut done: impl FnMut() -> u64,
) -> Result<(), LoadError> {
    let (mut before, mut since) = (None, Instant::now());
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(source)) => return Err(write_error(path, 0, source)),
        }
        let now = Some(done());
        if now != before {
            if before.is_none() {
                tracing::info!(path = %path.display(), "waiting for another process");
            }
            (before, since) = (now, Instant::now());
        }
        if since.elapsed() >= patience {
            return Err(LoadError::Backend(format!(
                "{} has been locked for {} s by a process that does nothing with it; end that process",
                path.display(),
                patience.as_secs()
            )));
        }
        std::thread::sleep(LOOK.min(patience));
    }
}

/// A model in the cache.
struct Entry {
    folder: PathBuf,
    lock_path: PathBuf,
    /// Held by us; none where others hold it, who use the model.
    lock: Option<File>,
    bytes: u64,
    used: SystemTime,
}

/// Removes models that nobody uses, the one that was not used for longest first, until `bytes` more are within `limit`.
fn make_room(cache: &Path, folder: &str, bytes: u64, limit: u64) -> Result<(), LoadError> {
    let mut entries = entries(cache, folder)?;
    let in_use: u64 = entries
        .iter()
        .filter(|entry| entry.lock.is_none())
        .map(|entry| entry.bytes)
        .sum();
    if in_use.saturating_add(bytes) > limit {
        return Err(LoadError::CacheFull {
            folder: folder.into(),
            bytes,
            in_use,
            limit,
        });
    }
    entries.sort_by_key(|entry| entry.used);
    let mut there: u64 = entries.iter().map(|entry| entry.bytes).sum();
    for entry in entries.iter().filter(|entry| entry.lock.is_some()) {
        if there.saturating_add(bytes) <= limit {
            break;
        }
        remove(entry)?;
        there -= entry.bytes;
    }
    Ok(())
}

/// All models but the one of `folder`.
fn entries(cache: &Path, folder: &str) -> Result<Vec<Entry>, LoadError> {
    let failed = |source| LoadError::Read {
        path: cache.into(),
        source,
    };
    let mut entries = Vec::new();
    for file in std::fs::read_dir(cache).map_err(failed)? {
        let lock_path = file.map_err(failed)?.path();
        let name = lock_path.file_name().unwrap_or_default().to_string_lossy();
        let Some(other) = name.strip_suffix(LOCK_SUFFIX) else {
            continue;
        };
        // A hub names commits, and a folder may end as a lock does.
        if other.is_empty() || other == folder || !lock_path.is_file() {
            continue;
        }
        let text = std::fs::read_to_string(&lock_path).map_err(failed)?;
        let used = lock_path.metadata().and_then(|data| data.modified());
        let lock = open_lock(&lock_path)?;
        let lock = match lock.try_lock() {
            Ok(()) => Some(lock),
            Err(TryLockError::WouldBlock) => None,
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        };
        entries.push(Entry {
            folder: cache.join(other),
            // One that a process did not get to write has fetched nothing.
            bytes: text.parse().unwrap_or(0),
            used: used.map_err(failed)?,
            lock,
            lock_path,
        });
    }
    Ok(entries)
}

/// Removes a model whose lock we hold.
fn remove(entry: &Entry) -> Result<(), LoadError> {
    let failed = |source| LoadError::Write {
        path: entry.folder.clone(),
        source,
    };
    match std::fs::remove_dir_all(&entry.folder) {
        Err(source) if source.kind() != ErrorKind::NotFound => return Err(failed(source)),
        _ => {}
    }
    // Last: a removal that was cut short is tried again.
    std::fs::remove_file(&entry.lock_path).map_err(failed)?;
    let folder = entry.folder.display();
    tracing::info!(%folder, bytes = entry.bytes, "removed from the cache, which is limited");
    Ok(())
}
