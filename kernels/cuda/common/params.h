// The one argument of each kernel. Mirrored by src/params.rs; both sides check the sizes.
// Strides count elements, rows are major unless said otherwise, "fp8" is e4m3 with a float32 scale per 1x128 (activations)
// or 128x128 (weights).
#pragma once

// out[row] = table[tokens[row]]
struct EmbedParams {
    const bf16* table; // [vocabulary, width]
    const uint32_t* tokens;
    bf16* out; // [rows, width]
    int32_t rows, width, vocabulary;
    int32_t elsewhere; // unknown tokens are another rank's: their rows are zeros, not NaN
};
static_assert(sizeof(EmbedParams) == 40, "src/params.rs mirrors this");

// residual += x (when residual is given); out = residual * rsqrt(mean(residual^2) + eps) * weight
struct RmsNormParams {
    const bf16* x;   // [rows, x_stride]
    bf16* residual;  // [rows, width] or null: x itself is normed
    const bf16* weight;
    void* out;       // bf16 or e4m3 [rows, out_stride]
    float* scales;   // fp8: [rows, ceil(width / 128)]
    int32_t rows, width, x_stride, out_stride;
    float eps;
    int32_t power_of_two_scales;
};
static_assert(sizeof(RmsNormParams) == 64, "src/params.rs mirrors this");

// out = silu(x[:, :width]) * x[:, width:2 width], or out = x when the kernel only quantises
struct ActivationParams {
    const bf16* x; // [rows, x_stride]
    void* out;     // [rows, out_stride]
    float* scales; // fp8: [rows, scales_stride]
    int32_t rows, width, x_stride, out_stride;
    int32_t power_of_two_scales, scales_stride;
};
static_assert(sizeof(ActivationParams) == 48, "src/params.rs mirrors this");

// c[m, n] = a[m, k] b[n, k]^T, batched over grid z, or grouped over experts.
struct GemmParams {
    const void* a;         // bf16 or e4m3 [m, lda]
    const void* b;         // bf16 or e4m3 [n, ldb], one such matrix per batch or expert
    void* c;               // bf16 or float32 [m, ldc]
    const float* a_scales; // fp8: [m, a_scales_stride]
    const float* b_scales; // fp8: [ceil(n / 128), b_scales_stride]
    const int32_t* a_rows; // grouped: row of a for each row of c; null is the identity
    const int32_t* tiles;  // grouped: {expert, first row} per tile, expert -1 is no tile
    const int32_t* offsets; // grouped: [experts + 1] first rows
    int64_t a_batch, b_batch, c_batch, b_scales_batch;
    int32_t m, n, k, lda, ldb, ldc;
    int32_t a_scales_stride, b_scales_stride;
    int32_t c_is_float32, reserved;
};
static_assert(sizeof(GemmParams) == 136, "src/params.rs mirrors this");

// Which experts a token uses. Lower index wins ties; choices are listed in ascending expert order.
struct GateParams {
    const float* logits; // [rows, experts]
    const float* bias;   // [experts] or null: added for the choice only
    int32_t* chosen;     // [rows, top_k]
    float* weights;      // [rows, top_k]
    int32_t rows, experts, top_k, groups, groups_per_token;
    int32_t softmax;        // 0: sigmoid
    int32_t group_top_two;  // group score: 0 its best, 1 the sum of its two best
    int32_t normalise;
    float scale;
    int32_t reserved;
};
static_assert(sizeof(GateParams) == 72, "src/params.rs mirrors this");

// Sorts (token, choice) pairs by expert, stably. Tiles are of the experts held, which they count from the first one.
struct PermuteParams {
    const int32_t* chosen; // [tokens, top_k]
    int32_t* offsets;      // [experts + 1]
    int32_t* row_token;    // [tokens * top_k] token of each sorted row
    int32_t* slot_row;     // [tokens, top_k] sorted row of each pair
    int32_t* tiles;        // [tokens * top_k / tile_rows + experts] x {expert, first row}
    int32_t tokens, top_k, experts, tile_rows;
    int32_t first_expert, experts_held;
};
static_assert(sizeof(PermuteParams) == 64, "src/params.rs mirrors this");

// out[t] = sum over choices, in order, of weights * y[slot_row] (+ shared[t])
struct CombineParams {
    const bf16* y; // [tokens * top_k, y_stride]
    const int32_t* slot_row;
    const float* weights;
    const bf16* shared; // [tokens, width] or null
    bf16* out;          // [tokens, width]
    int32_t tokens, top_k, width, y_stride;
};
static_assert(sizeof(CombineParams) == 56, "src/params.rs mirrors this");

// Rotates `rotary` values at `offset` of every head in place.
struct RopeParams {
    bf16* x; // [rows, row_stride], heads head_stride apart
    const int32_t* positions;
    const float* table; // [positions_max, rotary / 2, {cos, sin}]
    int32_t rows, heads, row_stride, head_stride, offset, rotary, positions_max;
    int32_t half_split; // 0: pairs (2i, 2i + 1); 1: pairs (i, i + rotary / 2)
};
static_assert(sizeof(RopeParams) == 56, "src/params.rs mirrors this");

// Bytes of a token in the fp8 form of the latent cache: codes, a float32 scale per 128 of them, bf16 rotary values.
CONSTANT int mla_fp8_row_bytes(int latent, int rotary) { return latent + latent / QUANT_GROUP * 4 + rotary * 2; }

// cache[slot] = { norm(kv[:latent]) * weight, rope(kv[latent:latent + rotary]) }
struct CacheWriteParams {
    const bf16* kv; // [rows, kv_stride]
    const bf16* weight;
    const int32_t* positions;
    const int64_t* slots; // block * block_size + offset; negative writes nothing
    const float* table;   // [positions_max, rotary / 2, {cos, sin}]
    void* cache;          // bf16 [slots_count, latent + rotary], or slots_count rows of the fp8 form
    int64_t slots_count;
    int32_t rows, kv_stride, latent, rotary, positions_max;
    float eps;
};
static_assert(sizeof(CacheWriteParams) == 80, "src/params.rs mirrors this");

// One query row per sequence against its paged cache; a part of `split_tokens` tokens per block of the grid.
struct MlaDecodeParams {
    const bf16* q_latent; // [rows, ql_row], heads ql_head apart
    const bf16* q_rope;   // [rows, qr_row], heads qr_head apart
    const void* cache;    // bf16 [blocks, block_size, latent + rotary], or such rows of the fp8 form
    const int32_t* blocks; // [rows, blocks_stride]
    const int32_t* lengths; // [rows] tokens to attend to
    float* partial;        // [rows, heads, splits, latent]
    float* lse;            // [rows, heads, splits], base 2
    int32_t rows, heads, ql_row, ql_head, qr_row, qr_head;
    int32_t block_size, blocks_stride, splits, split_tokens;
    float scale;
    int32_t reserved;
};
static_assert(sizeof(MlaDecodeParams) == 104, "src/params.rs mirrors this");

// Merges the parts of MlaDecodeParams, or of GqaDecodeParams (whose width is `latent` here), in ascending order.
struct MlaCombineParams {
    const float* partial;
    const float* lse;
    const int32_t* lengths;
    bf16* out; // [rows, out_row], heads out_head apart
    int32_t rows, heads, splits, split_tokens, latent, out_row, out_head, reserved;
};
static_assert(sizeof(MlaCombineParams) == 64, "src/params.rs mirrors this");

// Heads of a row of grouped-query attention: bias, norm, half-split rotation; queries in place, keys and values to the cache.
struct GqaCacheWriteParams {
    bf16* q;       // [rows, q_stride], heads width apart
    const bf16* k; // [rows, kv_stride], heads width apart
    const bf16* v; // [rows, kv_stride], heads width apart
    const bf16* q_bias; // [heads, width] or null
    const bf16* k_bias; // [kv_heads, width] or null
    const bf16* v_bias; // [kv_heads, width] or null
    const bf16* q_norm; // [width] or null
    const bf16* k_norm; // [width] or null
    const int32_t* positions;
    const int64_t* slots; // block * block_size + offset; negative writes nothing
    const float* table;   // [positions_max, width / 2, {cos, sin}]
    bf16* cache;          // [blocks, kv_heads, {key, value}, block_size, width]
    int64_t slots_count;
    int32_t rows, heads, kv_heads, width, block_size, q_stride, kv_stride, positions_max;
    float q_eps, k_eps;
};
static_assert(sizeof(GqaCacheWriteParams) == 144, "src/params.rs mirrors this");

// One query row per sequence against its paged cache; a part of `split_tokens` tokens per block of the grid.
struct GqaDecodeParams {
    const bf16* q;          // [rows, q_row], heads width apart
    const bf16* cache;      // [blocks, kv_heads, {key, value}, block_size, width]
    const int32_t* blocks;  // [rows, blocks_stride]
    const int32_t* lengths; // [rows] tokens to attend to
    float* partial;         // [rows, heads, splits, width]
    float* lse;             // [rows, heads, splits], base 2
    int32_t rows, heads, kv_heads, q_row, block_size, blocks_stride, splits, split_tokens;
    float scale;
    int32_t reserved;
};
static_assert(sizeof(GqaDecodeParams) == 88, "src/params.rs mirrors this");

// Causal attention over whole sequences; the last query sees the last key.
struct MlaPrefillParams {
    const bf16* q;      // [queries, q_row], heads q_head apart: nope | rope
    const bf16* kv;     // [keys, kv_row], heads kv_head apart: key nope | value
    const bf16* k_rope; // [keys, rope_row], shared by the heads
    bf16* out;          // [queries, out_row], heads out_head apart
    float* lse;         // [queries, heads], natural; null writes none
    const int32_t* q_offsets; // [sequences + 1]
    const int32_t* k_offsets; // [sequences + 1]
    int32_t sequences, heads, q_row, q_head, kv_row, kv_head, rope_row, out_row, out_head;
    float scale;
    int32_t reserved[2];
};
static_assert(sizeof(MlaPrefillParams) == 104, "src/params.rs mirrors this");

// tokens = argmax of each row, the lower token among equals.
struct GreedyParams {
    const float* logits; // [rows, stride]
    int32_t* tokens;
    float* log_probabilities; // natural, of the chosen token
    int32_t* broken;          // first token whose logit is not finite, or -1
    int32_t rows, vocabulary, stride, reserved;
};
static_assert(sizeof(GreedyParams) == 48, "src/params.rs mirrors this");

// out = logits with bias, penalties and mask of each row.
struct SampleAdjustParams {
    const float* logits; // [rows, stride]
    float* out;          // [rows, stride]
    uint32_t* counts;    // [rows, stride], scratch
    const float* numbers; // [rows, {temperature, top_p, min_p, presence, frequency, repetition}]
    const int32_t* tokens;  // of all rows: prompt, output, prompt, output ...
    const int32_t* offsets; // [2 * rows + 1]: a row's prompt begins at 2 row, its output at 2 row + 1
    const int32_t* bias_tokens;  // of all rows, each token of a row once
    const float* bias;           // one for each
    const int32_t* bias_offsets; // [rows + 1] or null
    const uint32_t* mask;        // [rows, mask_stride], bit i % 32 of word i / 32 allows token i; or null
    int32_t rows, vocabulary, stride, mask_stride;
};
static_assert(sizeof(SampleAdjustParams) == 96, "src/params.rs mirrors this");

// chosen = the next token of each row; -1 when nothing is allowed.
struct SampleParams {
    const float* logits;  // [rows, stride]; minus infinity is never drawn
    const float* numbers; // as SampleAdjustParams
    const int32_t* top_k; // [rows]; 0 keeps all
    const int64_t* draws; // [rows, {seed, choice, position}]
    int32_t* chosen;
    int32_t rows, vocabulary, stride, reserved;
};
static_assert(sizeof(SampleParams) == 56, "src/params.rs mirrors this");

// Natural log-probabilities of the rows' tokens and of their `top` most probable ones, best first.
struct LogprobsParams {
    const float* logits; // [rows, stride]
    const int32_t* tokens;
    float* chosen;
    int32_t* top_tokens; // [rows, top]
    float* top_values;   // [rows, top]
    int32_t* broken;     // first token whose logit is not finite, or -1
    int32_t rows, vocabulary, stride, top;
};
static_assert(sizeof(LogprobsParams) == 64, "src/params.rs mirrors this");

// Cache block pairs[i][1] = cache block pairs[i][0], in every layer.
struct CopyBlocksParams {
    unsigned char* cache; // [layers, layer_bytes], blocks of block_bytes
    const int32_t* pairs; // [pairs, {from, to}]
    int64_t layer_bytes;
    int32_t block_bytes, blocks, layers, reserved;
};
static_assert(sizeof(CopyBlocksParams) == 40, "src/params.rs mirrors this");

// Packs a rank's columns of whole rows into its slot, or lays all other ranks' slots out in the rows.
struct ShareColumnsParams {
    unsigned char* rows;  // [count, units * unit_bytes]
    unsigned char* slots; // [ranks, count, largest share * unit_bytes]
    int32_t count, units, unit_bytes; // units are dealt out in order, the first ranks getting those that are left over
    int32_t ranks, rank, unpack;
};
static_assert(sizeof(ShareColumnsParams) == 40, "src/params.rs mirrors this");
