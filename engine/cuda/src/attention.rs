//! Which kernels a model's latent attention takes: the portable ones, or Hopper's.
//!
//! Hopper's sum in another order, so one of the two serves all rows of a model, from load to unload. Where neither was
//! asked for, Hopper's are taken on a device of capability 9.0 that passes a check: both attend to the same random
//! contexts, in a context of the device that may be lost, and must agree. Invariant: the choice depends on the device and the model alone.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use engine_model::{Attention as Layer, LatentAttention, Model};
use engine_spec::KvCacheDtype;
use half::bf16;
use kernels::driver::{Arena, Device, Part, Stream};
use kernels::params::{MlaCombineParams, MlaDecodeParams};
use kernels::plan::{self, Format, Launch, MLA_SPLIT_TOKENS, Tables, Unsupported};
use thiserror::Error;

use crate::layout::CudaLimits;
use crate::{CudaError, Gpu, trial};

/// The environment variable that chooses: `auto`, `portable` or `hopper`.
pub const VARIABLE: &str = "CACHALOT_CUDA_ATTENTION";

/// Kernels of latent attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKernels {
    /// They run from capability 8.0 on.
    Portable,
    /// Of capability 9.0.
    Hopper,
}

impl fmt::Display for AttentionKernels {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Portable => "portable",
            Self::Hopper => "hopper",
        })
    }
}

/// Which kernels were asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionChoice {
    /// Hopper's where they pass their check.
    #[default]
    Auto,
    /// These, unchecked.
    Forced(AttentionKernels),
}

/// A name of no kernels.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("attention kernels {0:?} do not exist; ask for auto, portable or hopper")]
pub struct UnknownKernels(String);

impl FromStr for AttentionChoice {
    type Err = UnknownKernels;

    fn from_str(name: &str) -> Result<Self, UnknownKernels> {
        match name {
            "auto" => Ok(Self::Auto),
            "portable" => Ok(Self::Forced(AttentionKernels::Portable)),
            "hopper" => Ok(Self::Forced(AttentionKernels::Hopper)),
            _ => Err(UnknownKernels(name.to_owned())),
        }
    }
}

/// The kernels that a model got, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChosenAttention {
    /// These.
    pub kernels: AttentionKernels,
    /// In words.
    pub reason: String,
}

impl fmt::Display for ChosenAttention {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.kernels, self.reason)
    }
}

/// The kernels of `model` on `gpu`.
///
/// # Errors
/// [`CudaError::Hung`]: a kernel that was tried does not end.
pub(crate) fn choose(
    gpu: &Gpu,
    model: &Model,
    kv_cache: KvCacheDtype,
) -> Result<ChosenAttention, CudaError> {
    let chosen = |kernels, reason: String| Ok(ChosenAttention { kernels, reason });
    if kv_cache == KvCacheDtype::Fp8 {
        let reason = "only they read a cache in eight bits".into();
        return chosen(AttentionKernels::Portable, reason);
    }
    if let AttentionChoice::Forced(kernels) = gpu.attention {
        return chosen(kernels, "as asked for".into());
    }
    let portable = |reason| chosen(AttentionKernels::Portable, reason);
    let (major, minor) = gpu.capability();
    if (major, minor) != (9, 0) {
        return portable(format!("the device is of capability {major}.{minor}"));
    }
    let Some(attention) = latent(model) else {
        return portable("the model has no latent attention".into());
    };
    let check = match Check::new(attention.heads, attention.latent, attention.rope) {
        Ok(check) => check,
        Err(unsupported) => return portable(unsupported.to_string()),
    };
    match gpu.tried.outcome(gpu, check)? {
        Ok(reason) => chosen(AttentionKernels::Hopper, reason),
        Err(reason) => portable(reason),
    }
}

/// Why Hopper's kernels are right for heads of a shape, or are not to be used.
type Verdicts = BTreeMap<[usize; 3], Result<String, String>>;

/// What came of checks on a device: for all models with heads of one shape, and clones of its [`Gpu`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Tried(Arc<Mutex<Verdicts>>);

impl Tried {
    /// Why Hopper's kernels are right on this device, or are not to be used.
    ///
    /// # Errors
    /// [`CudaError::Hung`].
    fn outcome(&self, gpu: &Gpu, check: Check) -> Result<Result<String, String>, CudaError> {
        let shape = [check.heads, check.latent, check.rotary];
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(outcome) = known.get(&shape) {
            return Ok(outcome.clone());
        }
        // A kernel that fails takes its context with it.
        let difference = gpu
            .device
            .apart()
            .map_err(CudaError::from)
            .and_then(|apart| check.difference(&apart));
        let outcome = match difference {
            Err(hung @ CudaError::Hung(_)) => return Err(hung),
            Err(problem) => Err(format!("Hopper's failed on this device: {problem}")),
            Ok(difference) => {
                let percent = 100.0 * difference;
                match difference <= DIFFERENCE_MAX {
                    true => Ok(format!(
                        "they agree with the portable ones within {percent:.2} %"
                    )),
                    false => Err(format!(
                        "Hopper's differ by {percent:.0} % of the largest value on this device"
                    )),
                }
            }
        };
        known.insert(shape, outcome.clone());
        Ok(outcome)
    }
}

/// Kernels to load beside the portable ones.
///
/// # Errors
/// A head shape that Hopper's do not take.
pub(crate) fn launches(
    kernels: AttentionKernels,
    model: &Model,
    limits: &CudaLimits,
) -> Result<Vec<Launch>, Unsupported> {
    match (kernels, latent(model)) {
        (AttentionKernels::Hopper, Some(attention)) => Ok(vec![plan::hopper_mla_decode(
            1,
            attention.heads,
            attention.latent,
            attention.rope,
            limits.splits_max(),
            Tables::Own,
        )?]),
        _ => Ok(Vec::new()),
    }
}

fn latent(model: &Model) -> Option<&LatentAttention> {
    model
        .layers
        .iter()
        .find_map(|layer| match &layer.attention {
            Layer::Latent(attention) => Some(attention),
            Layer::Grouped(_) => None,
        })
}

/// Both round probabilities and outputs to bfloat16 (2^-9 each) at different maxima; a wrong layout is off by about 1.
const DIFFERENCE_MAX: f32 = 0.03;
/// More than a tile, and less than one: every barrier of the pipeline meets both.
const CONTEXTS: [usize; 2] = [150, 37];
const BLOCK: usize = 16;

/// Two rows that attend by both kinds of kernels.
struct Check {
    heads: usize,
    latent: usize,
    rotary: usize,
    portable: Launch,
    hopper: [(Launch, Tables); 2],
}

/// Where its data lies.
struct Places {
    queries: Part,
    cache: Part,
    blocks: Part,
    lengths: Part,
    partial: Part,
    lse: Part,
    out: Part,
}

impl Check {
    fn new(heads: usize, latent: usize, rotary: usize) -> Result<Self, Unsupported> {
        // Four heads are enough, and leave room for both rows in a block.
        let (rows, heads) = (CONTEXTS.len(), heads.min(4));
        let hopper = |tables| {
            plan::hopper_mla_decode(rows, heads, latent, rotary, 1, tables).map(|l| (l, tables))
        };
        Ok(Self {
            heads,
            latent,
            rotary,
            portable: plan::mla_decode(Format::Bf16, rows, heads, latent, rotary, 1)?,
            hopper: [hopper(Tables::Own)?, hopper(Tables::Shared)?],
        })
    }

    /// Blocks of the longest context; both rows read the same ones, the second fewer.
    fn table_length() -> usize {
        CONTEXTS[0].div_ceil(BLOCK)
    }

    fn difference(&self, device: &Arc<Device>) -> Result<f32, CudaError> {
        let (rows, width, table) = (
            CONTEXTS.len(),
            self.latent + self.rotary,
            Self::table_length(),
        );
        let outputs = rows * self.heads * self.latent;
        let sizes = [
            rows * self.heads * width * 2,
            table * BLOCK * width * 2,
            rows * table * 4,
            rows * 4,
            outputs * 4,
            rows * self.heads * 4,
            outputs * 2,
        ];
        let starts = sizes.iter().scan(0, |end, bytes| {
            let start = *end;
            *end += bytes.next_multiple_of(256);
            Some(start)
        });
        let starts: Vec<usize> = starts.collect();
        let total = sizes.iter().map(|bytes| bytes.next_multiple_of(256)).sum();
        let arena = Arena::new(device, total)?;
        let stream = device.stream()?;
        let part = |index: usize| arena.part(starts[index], sizes[index]);
        let places = Places {
            queries: part(0)?,
            cache: part(1)?,
            blocks: part(2)?,
            lengths: part(3)?,
            partial: part(4)?,
            lse: part(5)?,
            out: part(6)?,
        };
        device.load(&[
            self.portable,
            self.hopper[0].0,
            plan::mla_combine(rows, self.heads)?,
        ])?;
        let queries = random(1, rows * self.heads * width);
        arena.write(&stream, places.queries, &queries)?;
        arena.write(&stream, places.cache, &random(2, table * BLOCK * width))?;
        let blocks: Vec<i32> = (0..rows * table).map(|i| (i % table) as i32).collect();
        arena.write(&stream, places.blocks, &blocks)?;
        arena.write(&stream, places.lengths, &CONTEXTS.map(|c| c as i32))?;
        let outcome = self.worst(&arena, &stream, &places);
        trial::leave((arena, stream, device.clone()), &outcome);
        outcome
    }

    fn worst(&self, arena: &Arena, stream: &Stream, places: &Places) -> Result<f32, CudaError> {
        let wanted = self.attend(arena, stream, places, &self.portable, Tables::Own)?;
        let mut worst = 0f32;
        for (launch, tables) in &self.hopper {
            let found = self.attend(arena, stream, places, launch, *tables)?;
            worst = worst.max(difference(&found, &wanted));
        }
        Ok(worst)
    }

    /// Outputs of all rows by the decode of `launch`.
    fn attend(
        &self,
        arena: &Arena,
        stream: &Stream,
        places: &Places,
        launch: &Launch,
        tables: Tables,
    ) -> Result<Vec<f32>, CudaError> {
        let (rows, heads, width) = (CONTEXTS.len(), self.heads, self.latent + self.rotary);
        // NaN, so that what is not written shows.
        arena.fill(stream, places.partial, 0xFF)?;
        arena.fill(stream, places.lse, 0xFF)?;
        let decode = MlaDecodeParams {
            q_latent: places.queries.address(),
            q_rope: places.queries.address().offset(self.latent as u64 * 2),
            cache: places.cache.address(),
            blocks: places.blocks.address(),
            lengths: places.lengths.address(),
            partial: places.partial.address(),
            lse: places.lse.address(),
            rows: rows as i32,
            heads: heads as i32,
            ql_row: (heads * width) as i32,
            ql_head: width as i32,
            qr_row: (heads * width) as i32,
            qr_head: width as i32,
            block_size: BLOCK as i32,
            blocks_stride: match tables {
                Tables::Shared => 0,
                Tables::Own => Self::table_length() as i32,
            },
            splits: 1,
            split_tokens: MLA_SPLIT_TOKENS as i32,
            scale: 0.1,
            reserved: 0,
        };
        arena.launch(stream, launch, &decode)?;
        let combine = MlaCombineParams {
            partial: places.partial.address(),
            lse: places.lse.address(),
            lengths: places.lengths.address(),
            out: places.out.address(),
            rows: rows as i32,
            heads: heads as i32,
            splits: 1,
            split_tokens: MLA_SPLIT_TOKENS as i32,
            latent: self.latent as i32,
            out_row: (heads * self.latent) as i32,
            out_head: self.latent as i32,
            reserved: 0,
        };
        arena.launch(stream, &plan::mla_combine(rows, heads)?, &combine)?;
        trial::end(stream, "a trial of Hopper's attention")?;
        let mut out = vec![bf16::ZERO; rows * heads * self.latent];
        arena.read(stream, places.out, &mut out)?;
        Ok(out.iter().map(|value| value.to_f32()).collect())
    }
}

/// The largest difference, relative to the largest wanted value; infinite when a value is no number.
fn difference(found: &[f32], wanted: &[f32]) -> f32 {
    let largest = wanted
        .iter()
        .fold(0f32, |most, value| most.max(value.abs()));
    let worst = found
        .iter()
        .zip(wanted)
        .fold(0f32, |worst, (found, wanted)| {
            let error = (found - wanted).abs();
            if error.is_nan() {
                f32::INFINITY
            } else {
                worst.max(error)
            }
        });
    worst / largest.max(f32::MIN_POSITIVE)
}

/// Values in [-1, 1), the same on every machine (SplitMix64: Steele, Lea, Flood 2014).
fn random(seed: u64, count: usize) -> Vec<bf16> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) >> 40
    };
    (0..count)
        .map(|_| bf16::from_f32(next() as f32 / (1u32 << 23) as f32 - 1.0))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_kernels() {
        assert_eq!("auto".parse(), Ok(AttentionChoice::Auto));
        for kernels in [AttentionKernels::Portable, AttentionKernels::Hopper] {
            assert_eq!(
                kernels.to_string().parse(),
                Ok(AttentionChoice::Forced(kernels))
            );
        }
        let unknown = "ampere"
            .parse::<AttentionChoice>()
            .expect_err("no such kernels");
        assert!(
            unknown.to_string().contains("\"ampere\"") && unknown.to_string().contains("portable")
        );
    }

    #[test]
    fn a_value_that_is_no_number_differs_from_everything() {
        assert_eq!(difference(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert_eq!(difference(&[1.0, 1.5], &[1.0, 2.0]), 0.25);
        assert_eq!(difference(&[f32::NAN, 2.0], &[1.0, 2.0]), f32::INFINITY);
    }
}
