//! The one argument of each kernel, byte for byte as `cuda/common/params.h` declares it.
//!
//! Invariant: sizes are checked here at compile time, there by static asserts, and against the compiled kernels by the
//! tests. Meanings, shapes and units are in the header; strides count elements.

use std::mem::size_of;

/// An address in device memory; 0 is null.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address(pub u64);

impl Address {
    /// No buffer.
    pub const NULL: Self = Self(0);

    /// This many bytes further; the last address when there is none.
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A kernel's argument: plain data without padding bytes, passed by value.
pub trait Params: sealed::Sealed + Copy {
    /// Shows `visit` every address in it, null ones too.
    fn addresses(&self, visit: &mut dyn FnMut(Address));
    /// Shows `visit` every tensor map in it.
    fn maps(&self, visit: &mut dyn FnMut(&TensorMap));
}

/// A member of an argument.
trait Field {
    /// What it points at.
    fn address(&self) -> Option<Address> {
        None
    }
    /// What hides where it points.
    fn map(&self) -> Option<&TensorMap> {
        None
    }
}
impl Field for i32 {}
impl Field for i64 {}
impl Field for f32 {}
impl<const N: usize> Field for [i32; N] {}
impl Field for Address {
    fn address(&self) -> Option<Address> {
        Some(*self)
    }
}
impl Field for TensorMap {
    fn map(&self) -> Option<&TensorMap> {
        Some(self)
    }
}

macro_rules! params {
    ($(#[$doc:meta])* $name:ident, $bytes:literal, { $($(#[$field_doc:meta])* $field:ident : $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),* }
        const _: () = assert!(size_of::<$name>() == $bytes);
        impl sealed::Sealed for $name {}
        impl Params for $name {
            fn addresses(&self, visit: &mut dyn FnMut(Address)) {
                $(if let Some(address) = Field::address(&self.$field) {
                    visit(address);
                })*
            }
            fn maps(&self, _visit: &mut dyn FnMut(&$crate::params::TensorMap)) {
                $(if let Some(map) = Field::map(&self.$field) {
                    _visit(map);
                })*
            }
        }
    };
}

mod attention;
mod hopper;
mod sampling;

pub use attention::{
    CacheWriteParams, GqaCacheWriteParams, GqaDecodeParams, MlaCombineParams, MlaDecodeParams,
    MlaPrefillParams,
};
pub use hopper::{HopperGemmParams, TensorShape};
pub use sampling::{LogprobsParams, SAMPLE_NUMBERS, SampleAdjustParams, SampleParams};

params!(
    /// `out[row] = table[tokens[row]]`.
    EmbedParams, 40, {
        /// bf16 `[vocabulary, width]`.
        table: Address,
        /// u32 `[rows]`.
        tokens: Address,
        /// bf16 `[rows, width]`.
        out: Address,
        /// Tokens.
        rows: i32,
        /// Values per row, a multiple of 8.
        width: i32,
        /// Rows of the table.
        vocabulary: i32,
        /// 1 where unknown tokens are another rank's: their rows are zeros. 0: they are NaN.
        elsewhere: i32,
    }
);

params!(
    /// `residual += x; out = norm(residual) * weight`.
    RmsNormParams, 64, {
        /// bf16 `[rows, x_stride]`.
        x: Address,
        /// bf16 `[rows, width]`, or null: `x` itself is normed.
        residual: Address,
        /// bf16 `[width]`.
        weight: Address,
        /// bf16 or e4m3 `[rows, out_stride]`.
        out: Address,
        /// f32 `[rows, ceil(width / 128)]` for fp8.
        scales: Address,
        /// Tokens.
        rows: i32,
        /// Values per row, a multiple of 8 up to 16384.
        width: i32,
        /// Between rows of `x`.
        x_stride: i32,
        /// Between rows of `out`.
        out_stride: i32,
        /// Added to the mean square.
        eps: f32,
        /// 1 rounds scales up to powers of two (`ue8m0`).
        power_of_two_scales: i32,
    }
);

params!(
    /// SwiGLU or quantisation of rows.
    ActivationParams, 48, {
        /// bf16 `[rows, x_stride]`; gated kernels read `2 * width` values.
        x: Address,
        /// bf16 or e4m3 `[rows, out_stride]`.
        out: Address,
        /// f32 `[rows, scales_stride]` for fp8, one for each 128 columns.
        scales: Address,
        /// Tokens.
        rows: i32,
        /// Values per row of `out`, a multiple of 8.
        width: i32,
        /// Between rows of `x`.
        x_stride: i32,
        /// Between rows of `out`.
        out_stride: i32,
        /// 1 rounds scales up to powers of two (`ue8m0`).
        power_of_two_scales: i32,
        /// Between rows of `scales`.
        scales_stride: i32,
    }
);

params!(
    /// `c[m, n] = a[m, k] b[n, k]^T`, batched or grouped.
    GemmParams, 136, {
        /// bf16 or e4m3 `[m, lda]`.
        a: Address,
        /// bf16 or e4m3 `[n, ldb]`, one per batch or expert.
        b: Address,
        /// bf16 or f32 `[m, ldc]`.
        c: Address,
        /// f32 `[m, a_scales_stride]` for fp8.
        a_scales: Address,
        /// f32 `[ceil(n / 128), b_scales_stride]` for fp8.
        b_scales: Address,
        /// Grouped: i32 row of `a` for each row of `c`, or null.
        a_rows: Address,
        /// Grouped: i32 `{expert, first row}` per tile.
        tiles: Address,
        /// Grouped: i32 `[experts + 1]`.
        offsets: Address,
        /// Between batches of `a`.
        a_batch: i64,
        /// Between batches or experts of `b`.
        b_batch: i64,
        /// Between batches of `c`.
        c_batch: i64,
        /// Between batches or experts of `b_scales`.
        b_scales_batch: i64,
        /// Rows of `a`.
        m: i32,
        /// Rows of `b`.
        n: i32,
        /// Columns of both.
        k: i32,
        /// Between rows of `a`.
        lda: i32,
        /// Between rows of `b`.
        ldb: i32,
        /// Between rows of `c`.
        ldc: i32,
        /// Between rows of `a_scales`.
        a_scales_stride: i32,
        /// Between rows of `b_scales`.
        b_scales_stride: i32,
        /// 1 writes f32 instead of bf16.
        c_is_float32: i32,
        /// Zero.
        reserved: i32,
    }
);

params!(
    /// Logits to chosen experts and their weights.
    GateParams, 72, {
        /// f32 `[rows, experts]`.
        logits: Address,
        /// f32 `[experts]` or null.
        bias: Address,
        /// i32 `[rows, top_k]`, ascending.
        chosen: Address,
        /// f32 `[rows, top_k]`.
        weights: Address,
        /// Tokens.
        rows: i32,
        /// At most 512.
        experts: i32,
        /// At most 32.
        top_k: i32,
        /// Of equal size, at most 32.
        groups: i32,
        /// Groups a token may use.
        groups_per_token: i32,
        /// 1 is softmax, 0 sigmoid.
        softmax: i32,
        /// 1 scores a group by the sum of its two best, 0 by its best.
        group_top_two: i32,
        /// 1 divides by the sum of the chosen.
        normalise: i32,
        /// Factor on the weights.
        scale: f32,
        /// Zero.
        reserved: i32,
    }
);

params!(
    /// Stable sort of (token, choice) pairs by expert; tiles are of the experts held, which they count from the first one.
    PermuteParams, 64, {
        /// i32 `[tokens, top_k]`.
        chosen: Address,
        /// i32 `[experts + 1]`.
        offsets: Address,
        /// i32 `[tokens * top_k]`.
        row_token: Address,
        /// i32 `[tokens, top_k]`.
        slot_row: Address,
        /// i32 `[tiles, 2]`.
        tiles: Address,
        /// Rows of `chosen`.
        tokens: i32,
        /// Columns of `chosen`.
        top_k: i32,
        /// Experts.
        experts: i32,
        /// Rows of a tile of the grouped GEMM.
        tile_rows: i32,
        /// The first expert that is held.
        first_expert: i32,
        /// Experts that are held.
        experts_held: i32,
    }
);

params!(
    /// Weighted sum of the experts' rows of each token.
    CombineParams, 56, {
        /// bf16 `[tokens * top_k, y_stride]`.
        y: Address,
        /// i32 `[tokens, top_k]`.
        slot_row: Address,
        /// f32 `[tokens, top_k]`.
        weights: Address,
        /// bf16 `[tokens, width]` or null.
        shared: Address,
        /// bf16 `[tokens, width]`.
        out: Address,
        /// Rows of `out`.
        tokens: i32,
        /// Choices per token.
        top_k: i32,
        /// Values per row, a multiple of 8.
        width: i32,
        /// Between rows of `y`.
        y_stride: i32,
    }
);

params!(
    /// Rotation of part of every head, in place.
    RopeParams, 56, {
        /// bf16 `[rows, row_stride]`.
        x: Address,
        /// i32 `[rows]`.
        positions: Address,
        /// f32 `[positions_max, rotary / 2, {cos, sin}]`.
        table: Address,
        /// Tokens.
        rows: i32,
        /// Heads per token.
        heads: i32,
        /// Between rows.
        row_stride: i32,
        /// Between heads.
        head_stride: i32,
        /// Of the rotated part in a head.
        offset: i32,
        /// Values rotated, even.
        rotary: i32,
        /// Rows of the table.
        positions_max: i32,
        /// 0 pairs neighbours, 1 pairs halves.
        half_split: i32,
    }
);

params!(
    /// The most probable token of each row.
    GreedyParams, 48, {
        /// f32 `[rows, stride]`.
        logits: Address,
        /// i32 `[rows]`.
        tokens: Address,
        /// f32 `[rows]`, natural, of the chosen token.
        log_probabilities: Address,
        /// i32 `[rows]`: the first token whose logit is not finite, or -1.
        broken: Address,
        /// Rows.
        rows: i32,
        /// Logits per row.
        vocabulary: i32,
        /// Between rows.
        stride: i32,
        /// Zero.
        reserved: i32,
    }
);

params!(
    /// Copies cache blocks within every layer.
    CopyBlocksParams, 40, {
        /// `[layers, layer_bytes]`, blocks of `block_bytes`.
        cache: Address,
        /// i32 `[pairs, {from, to}]`; one outside the cache copies nothing.
        pairs: Address,
        /// Between layers, a multiple of 16.
        layer_bytes: i64,
        /// Between blocks, a multiple of 16.
        block_bytes: i32,
        /// Blocks per layer.
        blocks: i32,
        /// Layers.
        layers: i32,
        /// Zero.
        reserved: i32,
    }
);

params!(
    /// Packs a rank's columns of whole rows into its slot, or lays all other ranks' slots out in the rows.
    ShareColumnsParams, 40, {
        /// `[count, units * unit_bytes]`.
        rows: Address,
        /// `[ranks, count, largest share * unit_bytes]`.
        slots: Address,
        /// Rows.
        count: i32,
        /// Units of a row, dealt out in order; the first ranks get those that are left over.
        units: i32,
        /// Bytes of a unit, even.
        unit_bytes: i32,
        /// Ranks that share them.
        ranks: i32,
        /// This one.
        rank: i32,
        /// 0 packs, 1 unpacks.
        unpack: i32,
    }
);

/// A tensor map: the driver's 128 opaque bytes, made by [`crate::driver::Device::tensor_map`].
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TensorMap(pub [u64; 16]);
const _: () = assert!(size_of::<TensorMap>() == 128);
