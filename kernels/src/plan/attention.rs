//! Plans of attention: the cache write, decode in parts, the merge, prefill.
//!
//! Invariant: a context is cut at the same places whatever else is in the step.

use super::{
    Format, GRID_YZ_MAX, Launch, MLA_SPLIT_TOKENS, QUANT_GROUP, Unsupported, check, rows_check,
    width_check,
};

/// Bytes of a token in the latent cache: bf16 values; or fp8 codes, a float32 scale per 128 of them and bf16 rotary values.
pub fn mla_row_bytes(form: Format, latent: usize, rotary: usize) -> usize {
    match form {
        Format::Bf16 => 2 * (latent + rotary),
        Format::Fp8 => latent + latent / QUANT_GROUP * 4 + rotary * 2,
    }
}

/// Norm, rotation and paged write of a cache of the given form.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn mla_cache_write(
    form: Format,
    rows: usize,
    latent: usize,
    rotary: usize,
) -> Result<Launch, Unsupported> {
    rows_check("mla_cache_write", "rows", rows)?;
    check(
        "mla_cache_write",
        "latent",
        latent,
        form == Format::Bf16 || latent.is_multiple_of(4 * QUANT_GROUP),
        "multiples of 512 in fp8",
    )?;
    width_check("mla_cache_write", latent, 1024)?;
    check(
        "mla_cache_write",
        "rotary",
        rotary,
        rotary.is_multiple_of(8),
        "multiples of 8",
    )?;
    Ok(Launch {
        kernel: match form {
            Format::Bf16 => "mla_cache_write_bf16",
            Format::Fp8 => "mla_cache_write_fp8",
        },
        grid: [rows as u32, 1, 1],
        threads: 128,
        shared_bytes: 16,
    })
}

/// Parts that a context of `tokens` is split into.
pub fn mla_splits(tokens: usize) -> usize {
    tokens.div_ceil(MLA_SPLIT_TOKENS).max(1)
}

/// Absorbed decode over a cache of the given form; `splits` parts, of which a sequence uses [`mla_splits`].
///
/// # Errors
/// A head shape that was not instantiated.
pub fn mla_decode(
    form: Format,
    rows: usize,
    heads: usize,
    latent: usize,
    rotary: usize,
    splits: usize,
) -> Result<Launch, Unsupported> {
    rows_check("mla_decode", "rows", rows)?;
    rows_check("mla_decode", "heads", heads)?;
    check(
        "mla_decode",
        "splits",
        splits,
        (1..=GRID_YZ_MAX).contains(&splits),
        "1 to 65535",
    )?;
    let (kernel, shared_bytes) = match (form, latent, rotary) {
        (Format::Bf16, 512, 64) => ("mla_decode_bf16_512_64", 132_608),
        (Format::Bf16, 64, 32) => ("mla_decode_bf16_64_32", 25_088),
        (Format::Fp8, 512, 64) => ("mla_decode_fp8_512_64", 120_832),
        _ => {
            return Err(Unsupported {
                operation: "mla_decode",
                field: "latent",
                value: latent,
                allowed: "latent 512 with rotary 64, or in bf16 64 with 32",
            });
        }
    };
    Ok(Launch {
        kernel,
        grid: [rows as u32, heads.div_ceil(16) as u32, splits as u32],
        threads: 128,
        shared_bytes,
    })
}

/// Whose block tables the rows of a decode launch have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// All rows read one table: `blocks_stride` is 0.
    Shared,
    /// Each row has its own.
    Own,
}

/// Lines of (row, head) that a block of the Hopper decode takes.
const HOPPER_LINES: usize = 64;

/// [`mla_decode`] over a bf16 cache with wgmma, for devices of capability 9.0. Rows that share a table share blocks, as
/// many as their heads leave room for. It sums in another order than [`mla_decode`] does, so a caller uses one of the two
/// for all rows of a model.
///
/// # Errors
/// A head shape that was not instantiated.
pub fn hopper_mla_decode(
    rows: usize,
    heads: usize,
    latent: usize,
    rotary: usize,
    splits: usize,
    tables: Tables,
) -> Result<Launch, Unsupported> {
    let operation = "hopper_mla_decode";
    rows_check(operation, "rows", rows)?;
    rows_check(operation, "heads", heads)?;
    check(
        operation,
        "splits",
        splits,
        (1..=GRID_YZ_MAX).contains(&splits),
        "1 to 65535",
    )?;
    let (kernel, shared_bytes) = match (latent, rotary) {
        (512, 64) => ("hopper_mla_decode_bf16_512_64", 230_400),
        (64, 32) => ("hopper_mla_decode_bf16_64_32", 58_368),
        _ => {
            return Err(Unsupported {
                operation,
                field: "latent",
                value: latent,
                allowed: "latent 512 with rotary 64, or 64 with 32",
            });
        }
    };
    let rows_of_block = match tables {
        Tables::Shared => HOPPER_LINES / heads.min(HOPPER_LINES),
        Tables::Own => 1,
    };
    Ok(Launch {
        kernel,
        grid: [
            rows.div_ceil(rows_of_block) as u32,
            heads.div_ceil(HOPPER_LINES) as u32,
            splits as u32,
        ],
        threads: 384,
        shared_bytes,
    })
}

/// Bias, norm, rotation and paged write of grouped-query attention.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn gqa_cache_write(
    rows: usize,
    heads: usize,
    kv_heads: usize,
    width: usize,
) -> Result<Launch, Unsupported> {
    rows_check("gqa_cache_write", "rows", rows)?;
    gqa_heads_check("gqa_cache_write", heads, kv_heads)?;
    check(
        "gqa_cache_write",
        "width",
        width,
        width > 0 && width <= 128 && width.is_multiple_of(4),
        "multiples of 4 up to 128",
    )?;
    let warps = heads + 2 * kv_heads;
    Ok(Launch {
        kernel: "gqa_cache_write_bf16",
        grid: [rows as u32, warps.div_ceil(4) as u32, 1],
        threads: 128,
        shared_bytes: 0,
    })
}

/// Query heads that a block of grouped-query attention takes.
const GQA_HEADS: usize = 16;
/// Heads of rows that a block of its prefill takes.
const GQA_PREFILL_QUERIES: usize = 32;

fn gqa_heads_check(
    operation: &'static str,
    heads: usize,
    kv_heads: usize,
) -> Result<(), Unsupported> {
    check(
        operation,
        "key-value heads",
        kv_heads,
        kv_heads > 0 && heads.is_multiple_of(kv_heads),
        "divisors of the number of query heads",
    )?;
    check(
        operation,
        "heads",
        heads,
        (1..=GRID_YZ_MAX / 3).contains(&heads),
        "1 to 21845",
    )
}

/// Attention of rows to their contexts in parts of [`super::MLA_SPLIT_TOKENS`] over `width` values a head, a row per block.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn gqa_decode(
    rows: usize,
    heads: usize,
    kv_heads: usize,
    width: usize,
    splits: usize,
) -> Result<Launch, Unsupported> {
    let (kernel, shared_bytes) = match width {
        128 => ("gqa_decode_bf16_128", 104_960),
        64 => ("gqa_decode_bf16_64", 55_808),
        _ => return Err(gqa_width("gqa_decode", width)),
    };
    let launch = gqa("gqa_decode", [rows, heads, kv_heads, splits], 1)?;
    Ok(Launch {
        kernel,
        shared_bytes,
        ..launch
    })
}

/// The same for neighbouring rows over one block table, as many per block as 32 queries are.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn gqa_prefill(
    rows: usize,
    heads: usize,
    kv_heads: usize,
    width: usize,
    splits: usize,
) -> Result<Launch, Unsupported> {
    let (kernel, shared_bytes) = match width {
        128 => ("gqa_prefill_bf16_128", 105_472),
        64 => ("gqa_prefill_bf16_64", 56_320),
        _ => return Err(gqa_width("gqa_prefill", width)),
    };
    gqa_heads_check("gqa_prefill", heads, kv_heads)?;
    let together = GQA_PREFILL_QUERIES / (heads / kv_heads).clamp(1, GQA_HEADS);
    let launch = gqa("gqa_prefill", [rows, heads, kv_heads, splits], together)?;
    Ok(Launch {
        kernel,
        shared_bytes,
        ..launch
    })
}

/// Either of them, with `together` rows per block.
fn gqa(
    operation: &'static str,
    [rows, heads, kv_heads, splits]: [usize; 4],
    together: usize,
) -> Result<Launch, Unsupported> {
    rows_check(operation, "rows", rows)?;
    gqa_heads_check(operation, heads, kv_heads)?;
    check(
        operation,
        "splits",
        splits,
        (1..=GRID_YZ_MAX).contains(&splits),
        "1 to 65535",
    )?;
    let passes = (heads / kv_heads).div_ceil(GQA_HEADS);
    Ok(Launch {
        kernel: "",
        grid: [
            rows.div_ceil(together) as u32,
            (kv_heads * passes) as u32,
            splits as u32,
        ],
        threads: 128,
        shared_bytes: 0,
    })
}

fn gqa_width(operation: &'static str, value: usize) -> Unsupported {
    Unsupported {
        operation,
        field: "head width",
        value,
        allowed: "64 and 128",
    }
}

/// Merge of the parts of either decode.
///
/// # Errors
/// A dimension that the kernel does not take.
pub fn mla_combine(rows: usize, heads: usize) -> Result<Launch, Unsupported> {
    rows_check("mla_combine", "rows", rows)?;
    check(
        "mla_combine",
        "heads",
        heads,
        (1..=GRID_YZ_MAX).contains(&heads),
        "1 to 65535",
    )?;
    Ok(Launch {
        kernel: "mla_combine_bf16",
        grid: [rows as u32, heads as u32, 1],
        threads: 128,
        shared_bytes: 0,
    })
}

/// Causal attention of whole prompts; `queries_max` is the longest sequence's.
///
/// # Errors
/// A head shape that was not instantiated.
pub fn mla_prefill(
    sequences: usize,
    queries_max: usize,
    heads: usize,
    nope: usize,
    rotary: usize,
    value: usize,
) -> Result<Launch, Unsupported> {
    prefill_check("mla_prefill", sequences, queries_max, heads)?;
    let kernel = match (nope, rotary, value) {
        (128, 64, 128) => "mla_prefill_bf16_128_64_128",
        (32, 32, 32) => "mla_prefill_bf16_32_32_32",
        _ => {
            return Err(Unsupported {
                operation: "mla_prefill",
                field: "nope",
                value: nope,
                allowed: "nope, rotary, value of 128, 64, 128 or 32, 32, 32",
            });
        }
    };
    // As struct Shared of the kernel: q, then two stages of 32 keys and values, rows padded by 16 bytes.
    let (width, padded) = (nope + rotary + 8, value + 8);
    let shared_bytes = 2 * (64 * width + 2 * 32 * (width + padded));
    Ok(Launch {
        kernel,
        grid: [
            queries_max.div_ceil(64) as u32,
            heads as u32,
            sequences as u32,
        ],
        threads: 128,
        shared_bytes: shared_bytes as u32,
    })
}

fn prefill_check(
    operation: &'static str,
    sequences: usize,
    queries_max: usize,
    heads: usize,
) -> Result<(), Unsupported> {
    rows_check(operation, "queries_max", queries_max)?;
    check(
        operation,
        "sequences",
        sequences,
        (1..=GRID_YZ_MAX).contains(&sequences),
        "1 to 65535",
    )?;
    check(
        operation,
        "heads",
        heads,
        (1..=GRID_YZ_MAX).contains(&heads),
        "1 to 65535",
    )
}

/// [`mla_prefill`] with wgmma, for devices of capability 9.0. It sums in another order.
///
/// # Errors
/// A head shape that was not instantiated.
pub fn hopper_mla_prefill(
    sequences: usize,
    queries_max: usize,
    heads: usize,
    nope: usize,
    rotary: usize,
    value: usize,
) -> Result<Launch, Unsupported> {
    prefill_check("hopper_mla_prefill", sequences, queries_max, heads)?;
    let (kernel, shared_bytes) = match (nope, rotary, value) {
        (128, 64, 128) => ("hopper_mla_prefill_bf16_128_64_128", 214_016),
        (32, 32, 32) => ("hopper_mla_prefill_bf16_32_32_32", 82_944),
        _ => {
            return Err(Unsupported {
                operation: "hopper_mla_prefill",
                field: "nope",
                value: nope,
                allowed: "nope, rotary, value of 128, 64, 128 or 32, 32, 32",
            });
        }
    };
    Ok(Launch {
        kernel,
        grid: [
            queries_max.div_ceil(128) as u32,
            heads as u32,
            sequences as u32,
        ],
        threads: 384,
        shared_bytes,
    })
}
