//! Arguments of the attention kernels.

use super::{Address, Field, Params, sealed};
use std::mem::size_of;

params!(
    /// Norm, rotation and paged write of a latent cache row.
    CacheWriteParams, 80, {
        /// bf16 `[rows, kv_stride]`.
        kv: Address,
        /// bf16 `[latent]`.
        weight: Address,
        /// i32 `[rows]`.
        positions: Address,
        /// i64 `[rows]`; negative writes nothing.
        slots: Address,
        /// f32 `[positions_max, rotary / 2, {cos, sin}]`.
        table: Address,
        /// bf16 `[slots_count, latent + rotary]`, or rows of the fp8 form.
        cache: Address,
        /// Rows of the cache.
        slots_count: i64,
        /// Tokens.
        rows: i32,
        /// Between rows of `kv`.
        kv_stride: i32,
        /// A multiple of 8 up to 1024.
        latent: i32,
        /// Even.
        rotary: i32,
        /// Rows of the table.
        positions_max: i32,
        /// Added to the mean square.
        eps: f32,
    }
);

params!(
    /// Absorbed MLA decode of one part of the context.
    MlaDecodeParams, 104, {
        /// bf16 `[rows, ql_row]`.
        q_latent: Address,
        /// bf16 `[rows, qr_row]`.
        q_rope: Address,
        /// bf16 `[blocks, block_size, latent + rotary]`, or such rows of the fp8 form.
        cache: Address,
        /// i32 `[rows, blocks_stride]`.
        blocks: Address,
        /// i32 `[rows]`.
        lengths: Address,
        /// f32 `[rows, heads, splits, latent]`.
        partial: Address,
        /// f32 `[rows, heads, splits]`, base 2.
        lse: Address,
        /// Query rows.
        rows: i32,
        /// Heads.
        heads: i32,
        /// Between rows of `q_latent`.
        ql_row: i32,
        /// Between heads of `q_latent`.
        ql_head: i32,
        /// Between rows of `q_rope`.
        qr_row: i32,
        /// Between heads of `q_rope`.
        qr_head: i32,
        /// Tokens per cache block.
        block_size: i32,
        /// Between rows of `blocks`.
        blocks_stride: i32,
        /// Parts that `partial` has room for.
        splits: i32,
        /// Tokens per part.
        split_tokens: i32,
        /// Softmax scale.
        scale: f32,
        /// Zero.
        reserved: i32,
    }
);

params!(
    /// Bias, norm and rotation of a row's heads in grouped-query attention; keys and values to the cache.
    GqaCacheWriteParams, 144, {
        /// bf16 `[rows, q_stride]`, changed in place.
        q: Address,
        /// bf16 `[rows, kv_stride]`.
        k: Address,
        /// bf16 `[rows, kv_stride]`.
        v: Address,
        /// bf16 `[heads, width]` or null.
        q_bias: Address,
        /// bf16 `[kv_heads, width]` or null.
        k_bias: Address,
        /// bf16 `[kv_heads, width]` or null.
        v_bias: Address,
        /// bf16 `[width]` or null.
        q_norm: Address,
        /// bf16 `[width]` or null.
        k_norm: Address,
        /// i32 `[rows]`.
        positions: Address,
        /// i64 `[rows]`: `block * block_size + offset`; negative writes nothing.
        slots: Address,
        /// f32 `[positions_max, width / 2, {cos, sin}]`.
        table: Address,
        /// bf16 `[blocks, kv_heads, {key, value}, block_size, width]`.
        cache: Address,
        /// Positions that the cache holds.
        slots_count: i64,
        /// Tokens.
        rows: i32,
        /// Query heads.
        heads: i32,
        /// Key-value heads.
        kv_heads: i32,
        /// Values per head.
        width: i32,
        /// Tokens per cache block.
        block_size: i32,
        /// Between rows of `q`.
        q_stride: i32,
        /// Between rows of `k` and of `v`.
        kv_stride: i32,
        /// Rows of the table.
        positions_max: i32,
        /// Added to the mean square of a query.
        q_eps: f32,
        /// Added to the mean square of a key.
        k_eps: f32,
    }
);

params!(
    /// Grouped-query decode of one part of the context.
    GqaDecodeParams, 88, {
        /// bf16 `[rows, q_row]`, heads `width` apart.
        q: Address,
        /// bf16 `[blocks, kv_heads, {key, value}, block_size, width]`.
        cache: Address,
        /// i32 `[rows, blocks_stride]`.
        blocks: Address,
        /// i32 `[rows]`.
        lengths: Address,
        /// f32 `[rows, heads, splits, width]`.
        partial: Address,
        /// f32 `[rows, heads, splits]`, base 2.
        lse: Address,
        /// Query rows.
        rows: i32,
        /// Query heads.
        heads: i32,
        /// Key-value heads.
        kv_heads: i32,
        /// Between rows of `q`.
        q_row: i32,
        /// Tokens per cache block.
        block_size: i32,
        /// Between rows of `blocks`.
        blocks_stride: i32,
        /// Parts that `partial` has room for.
        splits: i32,
        /// Tokens per part.
        split_tokens: i32,
        /// Softmax scale.
        scale: f32,
        /// Zero.
        reserved: i32,
    }
);

params!(
    /// Merges the parts of [`MlaDecodeParams`], or of [`GqaDecodeParams`], whose width is `latent` here.
    MlaCombineParams, 64, {
        /// f32 `[rows, heads, splits, latent]`.
        partial: Address,
        /// f32 `[rows, heads, splits]`.
        lse: Address,
        /// i32 `[rows]`.
        lengths: Address,
        /// bf16 `[rows, out_row]`.
        out: Address,
        /// Query rows.
        rows: i32,
        /// Heads.
        heads: i32,
        /// Parts that `partial` has room for.
        splits: i32,
        /// Tokens per part.
        split_tokens: i32,
        /// Even.
        latent: i32,
        /// Between rows of `out`.
        out_row: i32,
        /// Between heads of `out`.
        out_head: i32,
        /// Zero.
        reserved: i32,
    }
);

params!(
    /// Causal MLA attention of whole sequences.
    MlaPrefillParams, 104, {
        /// bf16 `[queries, q_row]`.
        q: Address,
        /// bf16 `[keys, kv_row]`: per head key then value.
        kv: Address,
        /// bf16 `[keys, rope_row]`.
        k_rope: Address,
        /// bf16 `[queries, out_row]`.
        out: Address,
        /// f32 `[queries, heads]`, natural, or null.
        lse: Address,
        /// i32 `[sequences + 1]`.
        q_offsets: Address,
        /// i32 `[sequences + 1]`.
        k_offsets: Address,
        /// Sequences.
        sequences: i32,
        /// Heads.
        heads: i32,
        /// Between rows of `q`.
        q_row: i32,
        /// Between heads of `q`.
        q_head: i32,
        /// Between rows of `kv`.
        kv_row: i32,
        /// Between heads of `kv`.
        kv_head: i32,
        /// Between rows of `k_rope`.
        rope_row: i32,
        /// Between rows of `out`.
        out_row: i32,
        /// Between heads of `out`.
        out_head: i32,
        /// Softmax scale.
        scale: f32,
        /// Zero.
        reserved: [i32; 2],
    }
);
