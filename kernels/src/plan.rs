//! Which kernel, grid and shared memory for a shape: pure, total and printable.
//!
//! Invariant: a plan depends on the shape alone, never on what else runs, and the two kernels a GEMM may get agree bit
//! for bit, so a row's result does not depend on how many rows came with it.

use std::fmt;

use thiserror::Error;

mod attention;
mod hopper;
mod sampling;

pub use attention::{
    Tables, gqa_cache_write, gqa_decode, gqa_prefill, hopper_mla_decode, hopper_mla_prefill,
    mla_cache_write, mla_combine, mla_decode, mla_prefill, mla_row_bytes, mla_splits,
};
pub use hopper::{
    HOPPER_COLUMNS, HOPPER_PARTIAL_BYTES, HOPPER_TICKET_BYTES, HopperPlan, hopper_gemm,
    hopper_gemm_share, hopper_grouped_gemm, hopper_grouped_tile_rows, hopper_kernels,
};
pub use sampling::{logprobs, mask_words, sample, sample_adjust};

/// A kernel to launch and how; the arguments are in [`crate::params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Its name in the fatbin.
    pub kernel: &'static str,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads per block.
    pub threads: u32,
    /// Dynamic shared memory.
    pub shared_bytes: u32,
}

impl fmt::Display for Launch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.grid;
        write!(
            formatter,
            "{} grid {x} x {y} x {z}, {} threads, {} bytes shared",
            self.kernel, self.threads, self.shared_bytes
        )
    }
}

/// A shape that no kernel takes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{operation}: {field} is {value}, but the kernels take {allowed}")]
pub struct Unsupported {
    /// What was asked for.
    pub operation: &'static str,
    /// The dimension.
    pub field: &'static str,
    /// What it was.
    pub value: usize,
    /// What it may be.
    pub allowed: &'static str,
}

/// Values of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// 16-bit brain float.
    Bf16,
    /// e4m3 with a scale per 1x128 (activations) or 128x128 (weights).
    Fp8,
}

impl Format {
    /// Of a value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }

    /// Values in the 16 bytes that a thread loads at once.
    pub const fn per_vector(self) -> usize {
        match self {
            Self::Bf16 => 8,
            Self::Fp8 => 16,
        }
    }
}

/// Columns that share an fp8 scale.
pub const QUANT_GROUP: usize = 128;
/// Tokens per part of MLA decode: 8 parts at 4K context, so that one sequence fills a device of 132 processors with 16
/// blocks of heads; fixed, because the order of the merge is part of the result.
pub const MLA_SPLIT_TOKENS: usize = 512;

/// Rows that a block of the weight-streaming GEMM takes, in two sizes.
const STREAM_ROWS: [usize; 2] = [16, 32];
const STREAM_COLUMNS: usize = 16;
const STREAM_THREADS: u32 = 256;
const TILE_ROWS: usize = 64;
const TILE_COLUMNS: usize = 64;
const TILE_THREADS: u32 = 128;
const TILE_SHARED_BYTES: u32 = 49_152;

const GRID_YZ_MAX: usize = 65_535;

fn check(
    operation: &'static str,
    field: &'static str,
    value: usize,
    valid: bool,
    allowed: &'static str,
) -> Result<(), Unsupported> {
    if valid {
        Ok(())
    } else {
        Err(Unsupported {
            operation,
            field,
            value,
            allowed,
        })
    }
}

fn rows_check(
    operation: &'static str,
    field: &'static str,
    value: usize,
) -> Result<(), Unsupported> {
    check(
        operation,
        field,
        value,
        (1..=i32::MAX as usize).contains(&value),
        "1 to 2147483647",
    )
}

fn width_check(operation: &'static str, width: usize, max: usize) -> Result<(), Unsupported> {
    check(
        operation,
        "width",
        width,
        width > 0 && width.is_multiple_of(8) && width <= max,
        "a multiple of 8 within the kernel's bound",
    )
}

fn stream_shared_bytes(rows: usize) -> u32 {
    (8 * rows * STREAM_COLUMNS * 4) as u32
}

/// `c[m, n] = a[m, k] b[n, k]^T`, `batch` times.
///
/// # Errors
/// A dimension that the kernels do not take.
pub fn gemm(
    format: Format,
    m: usize,
    n: usize,
    k: usize,
    batch: usize,
) -> Result<Launch, Unsupported> {
    rows_check("gemm", "m", m)?;
    rows_check("gemm", "n", n)?;
    check(
        "gemm",
        "k",
        k,
        k > 0 && k.is_multiple_of(format.per_vector()),
        "whole 16-byte vectors: multiples of 8 in bf16, of 16 in fp8",
    )?;
    check(
        "gemm",
        "batch",
        batch,
        (1..=GRID_YZ_MAX).contains(&batch),
        "1 to 65535",
    )?;
    check(
        "gemm",
        "batch",
        batch,
        batch == 1 || format == Format::Bf16,
        "1 in fp8, whose activation scales have no batches",
    )?;
    check(
        "gemm",
        "m",
        m,
        m.div_ceil(TILE_ROWS) <= GRID_YZ_MAX,
        "up to 4194240 rows",
    )?;
    let stream = |kernel, rows: usize| Launch {
        kernel,
        grid: [
            n.div_ceil(STREAM_COLUMNS) as u32,
            m.div_ceil(rows) as u32,
            batch as u32,
        ],
        threads: STREAM_THREADS,
        shared_bytes: stream_shared_bytes(rows),
    };
    Ok(match (format, m) {
        (Format::Bf16, 0..=16) => stream("gemm_bf16_stream16", STREAM_ROWS[0]),
        (Format::Bf16, 17..=32) => stream("gemm_bf16_stream32", STREAM_ROWS[1]),
        (Format::Fp8, 0..=16) => stream("gemm_fp8_stream16", STREAM_ROWS[0]),
        (Format::Fp8, 17..=32) => stream("gemm_fp8_stream32", STREAM_ROWS[1]),
        _ => Launch {
            kernel: match format {
                Format::Bf16 => "gemm_bf16_tile",
                Format::Fp8 => "gemm_fp8_tile",
            },
            grid: [
                n.div_ceil(TILE_COLUMNS) as u32,
                m.div_ceil(TILE_ROWS) as u32,
                batch as u32,
            ],
            threads: TILE_THREADS,
            shared_bytes: TILE_SHARED_BYTES,
        },
    })
}

/// Rows of a tile of the grouped GEMM: the planner of [`permute`] and [`grouped_gemm`] must be asked with the same
/// numbers.
pub fn grouped_tile_rows(rows: usize, experts: usize) -> usize {
    // Below 16 rows per expert on average, most tiles of 64 would be padding.
    if rows <= 16 * experts {
        STREAM_ROWS[0]
    } else {
        TILE_ROWS
    }
}

/// Tiles that `rows` rows of `experts` experts may need; the list is this long, with holes.
pub fn grouped_tiles(rows: usize, experts: usize) -> usize {
    rows / grouped_tile_rows(rows, experts) + experts
}

/// `c[row] = a[a_rows[row]] b[expert of row]^T` over rows sorted by expert.
///
/// # Errors
/// A dimension that the kernels do not take.
pub fn grouped_gemm(
    format: Format,
    rows: usize,
    n: usize,
    k: usize,
    experts: usize,
) -> Result<Launch, Unsupported> {
    rows_check("grouped_gemm", "rows", rows)?;
    rows_check("grouped_gemm", "n", n)?;
    check(
        "grouped_gemm",
        "k",
        k,
        k > 0 && k.is_multiple_of(format.per_vector()),
        "whole 16-byte vectors: multiples of 8 in bf16, of 16 in fp8",
    )?;
    let tiles = grouped_tiles(rows, experts);
    check(
        "grouped_gemm",
        "tiles",
        tiles,
        tiles <= GRID_YZ_MAX,
        "up to 65535; split the step",
    )?;
    let streams = grouped_tile_rows(rows, experts) == STREAM_ROWS[0];
    let columns = if streams {
        STREAM_COLUMNS
    } else {
        TILE_COLUMNS
    };
    Ok(Launch {
        kernel: match (format, streams) {
            (Format::Bf16, true) => "grouped_gemm_bf16_stream16",
            (Format::Bf16, false) => "grouped_gemm_bf16_tile",
            (Format::Fp8, true) => "grouped_gemm_fp8_stream16",
            (Format::Fp8, false) => "grouped_gemm_fp8_tile",
        },
        grid: [n.div_ceil(columns) as u32, tiles as u32, 1],
        threads: if streams {
            STREAM_THREADS
        } else {
            TILE_THREADS
        },
        shared_bytes: if streams {
            stream_shared_bytes(STREAM_ROWS[0])
        } else {
            TILE_SHARED_BYTES
        },
    })
}

/// Embedding lookup.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn embed(rows: usize, width: usize) -> Result<Launch, Unsupported> {
    rows_check("embed", "rows", rows)?;
    width_check("embed", width, 1 << 20)?;
    Ok(Launch {
        kernel: "embed_bf16",
        grid: [rows as u32, 1, 1],
        threads: 128,
        shared_bytes: 0,
    })
}

/// Residual add, RMSNorm and quantisation.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn rms_norm(out: Format, rows: usize, width: usize) -> Result<Launch, Unsupported> {
    rows_check("rms_norm", "rows", rows)?;
    width_check("rms_norm", width, 16_384)?;
    Ok(Launch {
        kernel: match out {
            Format::Bf16 => "rms_norm_bf16",
            Format::Fp8 => "rms_norm_fp8",
        },
        grid: [rows as u32, 1, 1],
        threads: 256,
        shared_bytes: 32,
    })
}

/// What [`activation`] computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) * up`.
    Swiglu(Format),
    /// bf16 to fp8.
    Quantise,
}

/// SwiGLU or quantisation.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn activation(what: Activation, rows: usize, width: usize) -> Result<Launch, Unsupported> {
    rows_check("activation", "rows", rows)?;
    width_check("activation", width, GRID_YZ_MAX * 1024)?;
    Ok(Launch {
        kernel: match what {
            Activation::Swiglu(Format::Bf16) => "swiglu_bf16",
            Activation::Swiglu(Format::Fp8) => "swiglu_fp8",
            Activation::Quantise => "quantise_fp8",
        },
        grid: [rows as u32, width.div_ceil(1024) as u32, 1],
        threads: 128,
        shared_bytes: 0,
    })
}

/// The gate's choice.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn gate(
    rows: usize,
    experts: usize,
    top_k: usize,
    groups: usize,
    groups_per_token: usize,
) -> Result<Launch, Unsupported> {
    rows_check("gate", "rows", rows)?;
    check(
        "gate",
        "experts",
        experts,
        (1..=512).contains(&experts),
        "1 to 512",
    )?;
    check(
        "gate",
        "groups",
        groups,
        (1..=32).contains(&groups) && experts.is_multiple_of(groups),
        "1 to 32 equal groups",
    )?;
    check(
        "gate",
        "groups_per_token",
        groups_per_token,
        (1..=groups).contains(&groups_per_token),
        "1 to groups",
    )?;
    let open = experts / groups * groups_per_token;
    check(
        "gate",
        "top_k",
        top_k,
        (1..=open.min(32)).contains(&top_k),
        "1 to 32 within the open groups",
    )?;
    Ok(Launch {
        kernel: "gate_f32",
        grid: [rows.div_ceil(4) as u32, 1, 1],
        threads: 128,
        shared_bytes: 0,
    })
}

/// The sort of [`crate::params::PermuteParams`].
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn permute(tokens: usize, top_k: usize, experts: usize) -> Result<Launch, Unsupported> {
    rows_check("permute", "tokens * top_k", tokens * top_k)?;
    rows_check("permute", "experts", experts)?;
    Ok(Launch {
        kernel: "permute",
        grid: [experts as u32, 1, 1],
        threads: 256,
        shared_bytes: 64,
    })
}

/// The experts' weighted sum.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn combine(tokens: usize, width: usize) -> Result<Launch, Unsupported> {
    rows_check("combine", "tokens", tokens)?;
    width_check("combine", width, GRID_YZ_MAX * 1024)?;
    Ok(Launch {
        kernel: "combine_bf16",
        grid: [tokens as u32, width.div_ceil(1024) as u32, 1],
        threads: 128,
        shared_bytes: 0,
    })
}

/// Rotation in place.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn rope(rows: usize, heads: usize, rotary: usize) -> Result<Launch, Unsupported> {
    rows_check("rope", "rows", rows)?;
    check(
        "rope",
        "rotary",
        rotary,
        rotary > 0 && rotary.is_multiple_of(2),
        "even numbers",
    )?;
    let pairs = heads * rotary / 2;
    check(
        "rope",
        "heads",
        heads,
        heads > 0 && pairs.div_ceil(128) <= GRID_YZ_MAX,
        "1 or more",
    )?;
    Ok(Launch {
        kernel: "rope_bf16",
        grid: [rows as u32, pairs.div_ceil(128) as u32, 1],
        threads: 128,
        shared_bytes: 0,
    })
}

/// Greedy sampling.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn greedy(rows: usize, vocabulary: usize) -> Result<Launch, Unsupported> {
    rows_check("greedy", "rows", rows)?;
    rows_check("greedy", "vocabulary", vocabulary)?;
    Ok(Launch {
        kernel: "greedy_f32",
        grid: [rows as u32, 1, 1],
        threads: 512,
        shared_bytes: 256,
    })
}

/// Copies of cache blocks.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn copy_blocks(pairs: usize, layers: usize, block_bytes: usize) -> Result<Launch, Unsupported> {
    rows_check("copy_blocks", "pairs", pairs)?;
    rows_check("copy_blocks", "block_bytes", block_bytes)?;
    check(
        "copy_blocks",
        "block_bytes",
        block_bytes,
        block_bytes.is_multiple_of(16),
        "multiples of 16",
    )?;
    check(
        "copy_blocks",
        "layers",
        layers,
        (1..=GRID_YZ_MAX).contains(&layers),
        "1 to 65535",
    )?;
    Ok(Launch {
        kernel: "copy_blocks",
        grid: [pairs as u32, layers as u32, 1],
        threads: 256,
        shared_bytes: 0,
    })
}

/// Packing or unpacking of the columns that `ranks` share: `units` of `unit_bytes` a row.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn share_columns(
    rows: usize,
    units: usize,
    unit_bytes: usize,
    ranks: usize,
    unpack: bool,
) -> Result<Launch, Unsupported> {
    rows_check("share_columns", "rows", rows)?;
    rows_check("share_columns", "units", units)?;
    check(
        "share_columns",
        "ranks",
        ranks,
        (1..=GRID_YZ_MAX).contains(&ranks),
        "1 to 65535",
    )?;
    // A row's bytes are an int in the kernel.
    let row_bytes = units.saturating_mul(unit_bytes);
    check(
        "share_columns",
        "unit_bytes",
        unit_bytes,
        unit_bytes > 0 && unit_bytes.is_multiple_of(2) && row_bytes <= i32::MAX as usize,
        "even numbers, with rows of at most 2147483647 bytes",
    )?;
    Ok(Launch {
        kernel: "share_columns",
        grid: [rows as u32, if unpack { ranks as u32 } else { 1 }, 1],
        threads: 256,
        shared_bytes: 0,
    })
}

#[cfg(test)]
mod tests;
