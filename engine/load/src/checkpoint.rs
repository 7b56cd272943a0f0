//! A model directory, opened and checked against what the model expects.
//!
//! Files are mapped, not read: opening costs the headers only, whatever the size of the weights. Invariant: an open
//! checkpoint has every expected tensor, of the right shape and dtype, wholly inside its file.
//!
//! Surprise: a mapped file must not shrink while it is in use; the kernel would kill the process with SIGBUS. Model
//! directories are written once and then only read (an image, a read-only claim, a cache filled by renames).

mod integers;
pub(crate) mod share;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use engine_model::{Attention, Model, TensorRole, TensorSpec, WeightId};
use engine_spec::{ModelConfig, StoredDtype, StoredIntegers, WeightBlocks};
use memmap2::Mmap;
use serde::Deserialize;

use crate::LoadError;
use crate::header::{self, FloatType, Header, TensorHeader};

pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
pub(crate) const CONFIG_FILE: &str = "config.json";
/// Config and index are read whole; real ones have kilobytes and at most 10 MB.
const JSON_BYTES_MAX: u64 = 64 << 20;
/// Appended to a weight's name for its block scales.
const SCALE_SUFFIX: &str = "_scale_inv";

/// Where a tensor is.
#[derive(Clone, Debug)]
pub(crate) struct Location {
    shard: usize,
    header: TensorHeader,
    dtype: FloatType,
}

/// An opened model directory.
#[derive(Debug)]
pub struct Checkpoint {
    maps: Vec<Mmap>,
    weights: Vec<Weight>,
    blocks: Option<WeightBlocks>,
    integers: Option<StoredIntegers>,
}

/// Where a tensor is, and its block scales.
pub(crate) type Weight = (Location, Option<Location>);

/// A weight file without its data.
#[derive(Debug)]
pub(crate) struct Shard {
    pub file: String,
    pub bytes: u64,
    pub header: Header,
}

/// A tensor as stored.
#[derive(Clone, Copy, Debug)]
pub struct StoredTensor<'a> {
    /// What was expected and found.
    pub spec: &'a TensorSpec,
    /// Stored element type.
    pub dtype: FloatType,
    /// The elements, row-major; not necessarily aligned.
    pub bytes: &'a [u8],
    /// Block scales of an FP8 matrix.
    pub scales: Option<Scales<'a>>,
}

impl StoredTensor<'_> {
    /// Bytes of the elements and their scales.
    pub fn stored_bytes(&self) -> u64 {
        let scales = self.scales.map_or(0, |scales| scales.bytes.len());
        (self.bytes.len() + scales) as u64
    }
}

/// Multipliers of an FP8 or integer matrix, one for each block of [`WeightBlocks`].
#[derive(Clone, Copy, Debug)]
pub struct Scales<'a> {
    /// F32, BF16, F16 or F8_E8M0.
    pub dtype: FloatType,
    /// Row-major over blocks.
    pub bytes: &'a [u8],
    /// Block size.
    pub blocks: WeightBlocks,
    /// Bits of an element.
    pub bits: u32,
    /// Rows of the first block that come before the tensor's first row, where it is a rank's share.
    pub rows_before: usize,
}

/// Where a backend's weights come from.
pub trait TensorSource: Sync {
    /// Bytes of all tensors of `model` as stored.
    fn stored_bytes(&self, model: &Model) -> u64;

    /// Calls `take` once with tensor `id` of `model`, the one that the source is for.
    fn read(&self, model: &Model, id: WeightId, take: &mut dyn FnMut(&StoredTensor<'_>));
}

impl TensorSource for Checkpoint {
    fn stored_bytes(&self, model: &Model) -> u64 {
        self.expected_bytes(model)
    }

    fn read(&self, model: &Model, id: WeightId, take: &mut dyn FnMut(&StoredTensor<'_>)) {
        take(&self.tensor(model, id));
    }
}

/// Reads and checks `config.json` of a model directory.
///
/// # Errors
/// When the directory or file is not there, or the config cannot be served.
pub fn read_config(dir: &Path) -> Result<ModelConfig, LoadError> {
    if !dir.is_dir() {
        return Err(LoadError::NotFound(format!(
            "model directory {} does not exist",
            dir.display()
        )));
    }
    let path = dir.join(CONFIG_FILE);
    if !path.is_file() {
        return Err(LoadError::NotFound(format!(
            "{} does not exist; a model directory holds config.json, tokenizer.json and *.safetensors",
            path.display()
        )));
    }
    parse_config(&read_json(&path)?, path)
}

pub(crate) fn parse_config(text: &str, path: PathBuf) -> Result<ModelConfig, LoadError> {
    ModelConfig::from_hf_json(text).map_err(|source| LoadError::Config { path, source })
}

impl Checkpoint {
    /// Opens the weight files of `dir` and checks them against `model`.
    ///
    /// # Errors
    /// Names shard, tensor, expected and found.
    pub fn open(dir: &Path, config: &ModelConfig, model: &Model) -> Result<Self, LoadError> {
        let (maps, shards): (Vec<Mmap>, Vec<Shard>) = open_shards(dir)?.into_iter().unzip();
        Ok(Self {
            maps,
            weights: check(&shards, config, model)?,
            blocks: config.weight_blocks,
            integers: config.integers,
        })
    }

    /// A tensor of `model`, the one this checkpoint was opened for.
    pub fn tensor<'a>(&'a self, model: &'a Model, id: WeightId) -> StoredTensor<'a> {
        let (location, scales) = &self.weights[id.index()];
        let spec = &model.tensors[id.index()];
        let (blocks, bits) = match self.integers {
            Some(integers) => (Some(row_blocks(spec, integers)), integers.bits),
            None => (self.blocks, 8),
        };
        let whole = StoredTensor {
            spec,
            dtype: location.dtype,
            bytes: self.bytes(location),
            scales: scales.as_ref().zip(blocks).map(|(scales, blocks)| Scales {
                dtype: scales.dtype,
                bytes: self.bytes(scales),
                blocks,
                bits,
                rows_before: 0,
            }),
        };
        share::of(whole)
    }

    /// Bytes of all tensors of `model`, the one this checkpoint was opened for, as stored.
    pub fn expected_bytes(&self, model: &Model) -> u64 {
        let ids = (0..model.tensors.len()).map(|index| WeightId(index as u32));
        ids.map(|id| self.tensor(model, id).stored_bytes()).sum()
    }

    fn bytes(&self, location: &Location) -> &[u8] {
        &self.maps[location.shard][location.header.begin..location.header.end]
    }
}

/// Finds every expected tensor in the headers and checks it against the config.
pub(crate) fn check(
    shards: &[Shard],
    config: &ModelConfig,
    model: &Model,
) -> Result<Vec<Weight>, LoadError> {
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, shard) in shards.iter().enumerate() {
        for name in shard.header.keys() {
            if let Some(earlier) = places.insert(name, index) {
                return Err(LoadError::Malformed {
                    file: shard.file.clone(),
                    problem: format!("tensor {name} is also in {}", shards[earlier].file),
                });
            }
        }
    }
    refuse_contradictions(shards, model)?;
    require_prediction(&places, config, model)?;
    let mut weights = Vec::with_capacity(model.tensors.len());
    let ups: Vec<WeightId> = model
        .layers
        .iter()
        .filter_map(|layer| match &layer.attention {
            Attention::Latent(attention) => Some(attention.kv_up),
            Attention::Grouped(_) => None,
        })
        .collect();
    for (index, spec) in model.tensors.iter().enumerate() {
        if let (Some(stored), TensorRole::Matrix) = (config.integers, spec.role) {
            // A key-value up-projection is wide in memory, and may be so in the files.
            let is_up = ups.contains(&WeightId(index as u32));
            if !(is_up
                && places.contains_key(spec.name.as_str())
                && !integers::is_stored(shards, &places, spec))
            {
                weights.push(integers::locate(shards, &places, spec, stored)?);
                continue;
            }
        }
        let location = locate(shards, &places, spec, config)?;
        let scales = match (location.dtype, config.weight_blocks) {
            (FloatType::F8E4m3, Some(blocks)) => {
                Some(locate_scales(shards, &places, spec, blocks)?)
            }
            _ => None,
        };
        weights.push((location, scales));
    }
    Ok(weights)
}

fn open_shards(dir: &Path) -> Result<Vec<(Mmap, Shard)>, LoadError> {
    let index = dir.join(INDEX_FILE);
    if index.is_file() {
        let index = Index::parse(&read_json(&index)?)?;
        let mut shards = Vec::new();
        for (file, tensor) in index.files()? {
            let path = dir.join(file);
            if !path.is_file() {
                return Err(index.absent(file, tensor, &dir.display().to_string()));
            }
            shards.push(open_shard(&path)?);
        }
        index.check(shards.iter().map(|(_, shard)| shard))?;
        return Ok(shards);
    }
    let single = dir.join(SINGLE_FILE);
    if single.is_file() {
        return Ok(vec![open_shard(&single)?]);
    }
    Err(LoadError::Missing(format!(
        "{} has neither {SINGLE_FILE} nor {INDEX_FILE}",
        dir.display()
    )))
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
pub(crate) struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    pub fn parse(text: &str) -> Result<Self, LoadError> {
        serde_json::from_str(text)
            .map_err(|error| Self::malformed(format!("not a weight index: {error}")))
    }

    fn malformed(problem: String) -> LoadError {
        LoadError::Malformed {
            file: INDEX_FILE.into(),
            problem,
        }
    }

    /// Each weight file, in name order, with one of the tensors that are said to be in it.
    pub fn files(&self) -> Result<BTreeMap<&str, &str>, LoadError> {
        let mut files = BTreeMap::new();
        for (tensor, file) in &self.weight_map {
            let plain = Path::new(file)
                .file_name()
                .is_some_and(|name| name == file.as_str());
            if !plain {
                return Err(Self::malformed(format!(
                    "tensor {tensor} is in \"{file}\", which is not a plain file name"
                )));
            }
            files.entry(file.as_str()).or_insert(tensor.as_str());
        }
        Ok(files)
    }

    /// The error for a file that is not there.
    pub fn absent(&self, file: &str, tensor: &str, place: &str) -> LoadError {
        LoadError::Missing(format!(
            "{INDEX_FILE} places tensor {tensor} in {file}, which is not in {place}"
        ))
    }

    /// Every tensor must be where the index says.
    pub fn check<'a>(&self, shards: impl Iterator<Item = &'a Shard>) -> Result<(), LoadError> {
        let headers: BTreeMap<&str, &Header> = shards
            .map(|shard| (shard.file.as_str(), &shard.header))
            .collect();
        for (tensor, file) in &self.weight_map {
            let found = headers
                .get(file.as_str())
                .is_some_and(|header| header.contains_key(tensor));
            if !found {
                return Err(LoadError::Missing(format!(
                    "{INDEX_FILE} places tensor {tensor} in {file}, which does not contain it"
                )));
            }
        }
        Ok(())
    }
}

fn open_shard(path: &Path) -> Result<(Mmap, Shard), LoadError> {
    let read_error = |source| LoadError::Read {
        path: path.into(),
        source,
    };
    let file = file_name(path);
    let opened = File::open(path).map_err(read_error)?;
    let bytes = opened.metadata().map_err(read_error)?.len();
    if bytes == 0 {
        return Err(LoadError::Truncated {
            file,
            problem: "the file is empty".into(),
        });
    }
    // SAFETY: the map is only read; see the module's note on files that shrink.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&opened) }.map_err(read_error)?;
    let length = header::header_bytes(&file, &map, bytes)? as usize;
    let header = header::parse(&file, &map[8..8 + length], bytes)?;
    Ok((
        map,
        Shard {
            file,
            bytes,
            header,
        },
    ))
}

/// The headers of a local model's weight files.
pub(crate) fn local_shards(dir: &Path) -> Result<Vec<Shard>, LoadError> {
    // Mapping reads no data either, and shares the checks.
    Ok(open_shards(dir)?
        .into_iter()
        .map(|(_, shard)| shard)
        .collect())
}

/// Whoever asks for drafts of a checkpoint without a prediction layer should read that, not the name of a tensor alone.
fn require_prediction(
    places: &BTreeMap<&str, usize>,
    config: &ModelConfig,
    model: &Model,
) -> Result<(), LoadError> {
    let Some(prediction) = &model.prediction else {
        return Ok(());
    };
    let name = &model.tensors[prediction.join.index()].name;
    // Half a layer is a broken checkpoint: the search for its tensors names the first one that is not there.
    if places
        .keys()
        .any(|place| place.starts_with(&prediction.prefix))
    {
        return Ok(());
    }
    let says = match config.mtp_layers {
        0 => "num_nextn_predict_layers of config.json is 0 or absent".to_owned(),
        count => format!("num_nextn_predict_layers of config.json is {count}"),
    };
    Err(LoadError::NoPredictionLayer(format!(
        "numSpeculativeTokens is above 0, but tensor {name} is not in the files, so there is no prediction layer to draft \
         with ({says}); leave it out, or serve a checkpoint that has the layer"
    )))
}

/// Tensors whose presence says that the config describes another model.
fn refuse_contradictions(shards: &[Shard], model: &Model) -> Result<(), LoadError> {
    let unused = |name: &str| {
        model
            .unused_prefixes
            .iter()
            .any(|prefix| name.starts_with(prefix))
    };
    for shard in shards {
        for name in shard.header.keys().filter(|name| !unused(name)) {
            let contradiction = model
                .forbidden_suffixes
                .iter()
                .find(|(suffix, _)| name.ends_with(suffix));
            if let Some((_, field)) = contradiction {
                return Err(LoadError::Mismatch {
                    file: shard.file.clone(),
                    tensor: name.clone(),
                    problem: format!(
                        "is in the file, but {field} of {CONFIG_FILE} describes a model without it"
                    ),
                });
            }
        }
    }
    Ok(())
}

fn locate(
    shards: &[Shard],
    places: &BTreeMap<&str, usize>,
    spec: &TensorSpec,
    config: &ModelConfig,
) -> Result<Location, LoadError> {
    let location = find(shards, places, &spec.name, &spec.stored_shape())?;
    let stored = match config.stored_dtype {
        StoredDtype::Float32 => FloatType::F32,
        StoredDtype::Bfloat16 => FloatType::Bf16,
        StoredDtype::Float16 => FloatType::F16,
        StoredDtype::Float8E4m3 => FloatType::F8E4m3,
    };
    use FloatType::{Bf16, F16, F32};
    let expected: &[FloatType] = match spec.role {
        TensorRole::Matrix => &[stored],
        TensorRole::Table if stored == FloatType::F8E4m3 => &[Bf16, F32],
        TensorRole::Table => &[stored],
        TensorRole::Precise => &[F32, Bf16, F16],
    };
    if expected.contains(&location.dtype) {
        return Ok(location);
    }
    let expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
    Err(LoadError::Mismatch {
        file: shards[location.shard].file.clone(),
        tensor: spec.name.clone(),
        problem: format!(
            "dtype {}, expected {} by the dtype and quantization_config of {CONFIG_FILE}",
            location.dtype,
            expected.join(" or ")
        ),
    })
}

/// Each row has scales of its own.
fn row_blocks(spec: &TensorSpec, integers: StoredIntegers) -> WeightBlocks {
    let columns = spec.shape.last().map_or(1, |columns| *columns as u32);
    WeightBlocks {
        rows: 1,
        columns: integers.group.unwrap_or(columns),
        power_of_two: false,
    }
}

fn locate_scales(
    shards: &[Shard],
    places: &BTreeMap<&str, usize>,
    spec: &TensorSpec,
    blocks: WeightBlocks,
) -> Result<Location, LoadError> {
    let size = [blocks.rows, blocks.columns];
    let shape: Vec<usize> = spec
        .stored_shape()
        .iter()
        .zip(size)
        .map(|(length, block)| length.div_ceil(block as usize))
        .collect();
    let name = format!("{}{SCALE_SUFFIX}", spec.name);
    let location = find(shards, places, &name, &shape)?;
    match location.dtype {
        FloatType::F32 | FloatType::Bf16 | FloatType::F8E8m0 => Ok(location),
        found => Err(LoadError::Mismatch {
            file: shards[location.shard].file.clone(),
            tensor: name,
            problem: format!("dtype {found}, expected F32, BF16 or F8_E8M0"),
        }),
    }
}

fn find(
    shards: &[Shard],
    places: &BTreeMap<&str, usize>,
    name: &str,
    shape: &[usize],
) -> Result<Location, LoadError> {
    let Some(&shard) = places.get(name) else {
        let files = match shards {
            [only] => only.file.clone(),
            many => format!("any of {} shards", many.len()),
        };
        return Err(LoadError::Missing(format!(
            "tensor {name} {shape:?}, which {CONFIG_FILE} calls for, is not in {files}"
        )));
    };
    let header = shards[shard].header[name].clone();
    let mismatch = |problem| LoadError::Mismatch {
        file: shards[shard].file.clone(),
        tensor: name.into(),
        problem,
    };
    if header.shape != shape {
        return Err(mismatch(format!(
            "shape {:?}, expected {shape:?}",
            header.shape
        )));
    }
    let Some(dtype) = header.float_type() else {
        return Err(mismatch(format!(
            "dtype {} is not one that weights are served from (F32, BF16, F16, F8_E4M3)",
            header.dtype
        )));
    };
    Ok(Location {
        shard,
        header,
        dtype,
    })
}

fn read_json(path: &Path) -> Result<String, LoadError> {
    let read_error = |source| LoadError::Read {
        path: PathBuf::from(path),
        source,
    };
    let bytes = std::fs::metadata(path).map_err(read_error)?.len();
    if bytes > JSON_BYTES_MAX {
        return Err(LoadError::Malformed {
            file: file_name(path),
            problem: format!("{bytes} bytes, the limit is {JSON_BYTES_MAX}"),
        });
    }
    std::fs::read_to_string(path).map_err(read_error)
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}
