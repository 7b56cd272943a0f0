//! The start of a model from files: device, weights, first token, and what the bytes alone would take.
//!
//! Surprise: the rates are measured after the start, in the process that was timed, so that they are of the same files in the
//! same page cache and of the same device, and cost the start nothing.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use engine_core::argmax;
use engine_cuda::CudaExecutor;
use engine_load::{Progress, read_config};
use kernels::driver::{Arena, Device, Staging};
use serde_json::json;

use crate::{Outcome, choices, driver, entry, gpu_over, limits, step};

/// Tokens of the prompt, and positions that there is room for.
const PROMPT: usize = 16;
const POSITIONS: usize = 512;
/// Read or copied at once, and of everything at most.
const CHUNK: usize = 8 << 20;
const SAMPLE: usize = 8 << 30;
/// Copies of a chunk that are timed.
const COPIES: usize = 512;
const COPIES_EMULATED: usize = 2;
/// As many as load weights.
const THREADS: usize = 4;

/// Gigabytes a second that so many threads read from the weight files.
fn read_rate(files: &[PathBuf], threads: usize) -> Result<f64, Box<dyn Error>> {
    let mut chunks = Vec::new();
    let mut opened = Vec::new();
    for path in files {
        let file = File::open(path)?;
        let count = (file.metadata()?.len() as usize).div_ceil(CHUNK);
        chunks.extend((0..count).map(|chunk| (opened.len(), (chunk * CHUNK) as u64)));
        opened.push(file);
    }
    chunks.truncate(SAMPLE / CHUNK);
    let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
    let work = || {
        let mut room = vec![0u8; CHUNK];
        while let Some((file, at)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            // A file's last chunk is short.
            let count = opened[*file].read_at(&mut room, *at).unwrap_or(0);
            done.fetch_add(count as u64, Ordering::Relaxed);
        }
    };
    let begin = Instant::now();
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    Ok(done.into_inner() as f64 / begin.elapsed().as_secs_f64() / 1e9)
}

/// Gigabytes a second from pinned memory to the device.
fn copy_rate(device: &Arc<Device>, copies: usize) -> Result<f64, Box<dyn Error>> {
    let (arena, stream) = (Arena::new(device, CHUNK)?, device.stream()?);
    let part = arena.part(0, CHUNK)?;
    let mut staging = [Staging::new(device, CHUNK)?, Staging::new(device, CHUNK)?];
    for staging in &mut staging {
        staging.send(&stream, &arena, part, CHUNK)?;
    }
    stream.synchronize()?;
    let begin = Instant::now();
    for turn in 0..copies {
        staging[turn % 2].send(&stream, &arena, part, CHUNK)?;
    }
    stream.synchronize()?;
    Ok((copies * CHUNK) as f64 / begin.elapsed().as_secs_f64() / 1e9)
}

/// The weight files of a model directory.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// From the opening of the driver to the first token of a prompt.
pub fn start(dir: &Path) -> Outcome {
    let begin = Instant::now();
    let driver = driver()?;
    let device = Device::open(&driver, 0)?;
    let gpu = gpu_over(device.clone())?;
    let opened = begin.elapsed().as_secs_f64();
    let config = read_config(dir)?;
    let limits = limits(&config, POSITIONS, 1, POSITIONS);
    let progress = Progress::default();
    let mut executor = CudaExecutor::load(&gpu, dir, &config, limits, &progress)?;
    let loaded = begin.elapsed().as_secs_f64();
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| i % config.vocab_size).collect();
    let logits = step(&mut executor, vec![entry(1, &prompt, 0, 0)])?;
    let token = argmax(logits.row(0)).0;
    let all = begin.elapsed().as_secs_f64();

    let bytes = progress.done() as f64;
    let files = weight_files(dir)?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let read = read_rate(&files, THREADS.min(processors))?;
    let read_by_all = read_rate(&files, processors)?;
    let copies = match driver.emulation_schedule(0) {
        true => COPIES_EMULATED,
        false => COPIES,
    };
    let copy = copy_rate(&device, copies)?;
    let load = loaded - opened;
    Ok(json!({
        "choices": choices(&gpu, &executor), "token": token, "bytes": bytes, "prompt_tokens": PROMPT,
        "open_seconds": opened, "load_seconds": load, "first_token_seconds": all - loaded, "start_seconds": all,
        "load_gb_per_s": bytes / load / 1e9, "read_gb_per_s": read, "read_by_all_gb_per_s": read_by_all,
        "copy_gb_per_s": copy, "bound_seconds": bytes / read_by_all.min(copy) / 1e9,
        "share_of_bound": bytes / read_by_all.min(copy) / 1e9 / load,
    }))
}
