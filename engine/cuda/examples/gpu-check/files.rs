//! Weight files of a model that is not at hand: its names, shapes and dtypes, and random values, in the form that models are
//! published in.
//!
//! Invariant: a file is written by all threads at once, each tensor in its place, so that what is left is what a download
//! leaves: whole files, in the page cache where there is room.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use engine_load::{Dummy, FloatType, StoredTensor, TensorSource};
use engine_model::{Model, TensorRole, TensorSpec, WeightId};
use engine_spec::{ModelConfig, StoredDtype};
use serde_json::{Map, Value, json};

use crate::Outcome;

/// Files of V2-Lite as published.
const SHARDS: usize = 4;

/// Where a tensor is.
struct Place {
    shard: usize,
    /// From the beginning of the shard's data.
    begin: usize,
    bytes: usize,
}

/// What [`Dummy`] gives for it.
fn dtype_of(config: &ModelConfig, spec: &TensorSpec) -> FloatType {
    match (spec.role, config.stored_dtype) {
        (TensorRole::Precise, _) | (_, StoredDtype::Float32) => FloatType::F32,
        (_, StoredDtype::Float16) => FloatType::F16,
        _ => FloatType::Bf16,
    }
}

/// Tensors in their order, each shard about as long as the others.
fn places(config: &ModelConfig, model: &Model) -> Vec<Place> {
    let sizes: Vec<usize> = model
        .tensors
        .iter()
        .map(|spec| spec.elements() * dtype_of(config, spec).bytes())
        .collect();
    let shard_bytes = sizes.iter().sum::<usize>().div_ceil(SHARDS).max(1);
    let (mut before, mut shard, mut begin) = (0, 0, 0);
    let mut found = Vec::with_capacity(sizes.len());
    for bytes in sizes {
        if before / shard_bytes > shard {
            (shard, begin) = (shard + 1, 0);
        }
        found.push(Place {
            shard,
            begin,
            bytes,
        });
        (before, begin) = (before + bytes, begin + bytes);
    }
    found
}

fn file_name(shard: usize) -> String {
    format!("model-{:05}-of-{SHARDS:05}.safetensors", shard + 1)
}

/// Opens every shard and writes its header: the files, and where their data begin.
fn open(
    dir: &Path,
    config: &ModelConfig,
    model: &Model,
    places: &[Place],
) -> std::io::Result<Vec<(File, u64)>> {
    let shards = places.last().map_or(0, |place| place.shard + 1);
    let mut files = Vec::with_capacity(shards);
    for shard in 0..shards {
        let mut header = Map::new();
        for (spec, place) in model.tensors.iter().zip(places) {
            if place.shard == shard {
                let dtype = dtype_of(config, spec).to_string();
                let offsets = [place.begin, place.begin + place.bytes];
                header.insert(
                    spec.name.clone(),
                    json!({"dtype": dtype, "shape": spec.shape, "data_offsets": offsets}),
                );
            }
        }
        let mut text = Value::Object(header).to_string();
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        let file = File::create(dir.join(file_name(shard)))?;
        file.write_all_at(&(text.len() as u64).to_le_bytes(), 0)?;
        file.write_all_at(text.as_bytes(), 8)?;
        files.push((file, 8 + text.len() as u64));
    }
    Ok(files)
}

/// Fills the shards, on as many threads as there are processors.
fn fill(
    config: &ModelConfig,
    model: &Model,
    places: &[Place],
    files: &[(File, u64)],
) -> Result<(), String> {
    let weights = Dummy::new(config, 1);
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let put = |tensor: &StoredTensor<'_>, place: &Place| {
        let (file, data) = &files[place.shard];
        if tensor.bytes.len() != place.bytes {
            let name = &tensor.spec.name;
            return Err(format!("{name} has {} bytes", tensor.bytes.len()));
        }
        let written = file.write_all_at(tensor.bytes, data + place.begin as u64);
        written.map_err(|error| error.to_string())
    };
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(place) = places.get(index) else {
                break;
            };
            let mut outcome = Ok(());
            weights.read(model, WeightId(index as u32), &mut |tensor| {
                outcome = put(tensor, place);
            });
            if let (Err(error), Ok(mut failed)) = (outcome, failed.lock()) {
                *failed = Some(error);
                next.store(places.len(), Ordering::Relaxed); // ends the others
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    match failed.into_inner() {
        Ok(None) => Ok(()),
        Ok(Some(error)) => Err(error),
        Err(_) => Err("a writing thread panicked".into()),
    }
}

/// Writes config, index and weight files of `path`'s model to `dir`.
pub fn write(path: &Path, dir: &Path) -> Outcome {
    let text = std::fs::read_to_string(path)?;
    let config = ModelConfig::from_hf_json(&text)?;
    if config.weight_blocks.is_some() || config.integers.is_some() {
        return Err("scaled weights are not written: take a config of bf16 or float32".into());
    }
    let model = engine_model::build(&config);
    let begin = Instant::now();
    std::fs::create_dir_all(dir)?;
    let places = places(&config, &model);
    let files = open(dir, &config, &model, &places)?;
    fill(&config, &model, &places, &files)?;
    let names = model.tensors.iter().map(|spec| spec.name.clone());
    let shards = places.iter().map(|place| file_name(place.shard).into());
    let map: Map<String, Value> = names.zip(shards).collect();
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(dir.join("model.safetensors.index.json"), index)?;
    std::fs::write(dir.join("config.json"), text)?;
    let bytes: usize = places.iter().map(|place| place.bytes).sum();
    Ok(json!({"bytes": bytes, "files": files.len(), "seconds": begin.elapsed().as_secs_f64()}))
}
