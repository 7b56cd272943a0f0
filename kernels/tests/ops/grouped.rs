//! Grouped-query attention: what happens to a row's heads before it, and decode over the paged cache.

use half::bf16;
use kernels::params::{Address, GqaCacheWriteParams, GqaDecodeParams, MlaCombineParams};
use kernels::plan;
use kernels::reference;

use crate::attention::{short, table};
use crate::harness::{BF16, Lab, close, on_every_schedule};

const POSITIONS: usize = 50;

/// A step's fresh queries, keys and values, and what may be done to them.
struct Heads {
    rows: usize,
    heads: usize,
    kv_heads: usize,
    width: usize,
    block_size: usize,
    bias: bool,
    norm: bool,
}

impl Heads {
    /// Query, key or value heads of a row as they should be used.
    fn want(
        &self,
        fresh: &[bf16],
        bias: &[bf16],
        norm: Option<&[bf16]>,
        turn: Option<&[f32]>,
    ) -> Vec<f64> {
        let norm = norm.filter(|_| self.norm).map(reference::widen);
        reference::gqa_heads(
            &reference::widen(fresh),
            self.width,
            self.bias.then(|| reference::widen(bias)).as_deref(),
            norm.as_deref().map(|weight| (weight, 1e-6)),
            turn,
        )
    }

    fn check(&self, lab: &mut Lab) {
        let Self {
            rows,
            heads,
            kv_heads,
            width,
            block_size,
            ..
        } = *self;
        let (q_stride, kv_stride) = (heads * width + 8, kv_heads * width + 2);
        let q = lab.random.bf16s(rows * q_stride, 2.0);
        let k = lab.random.bf16s(rows * kv_stride, 2.0);
        let v = lab.random.bf16s(rows * kv_stride, 2.0);
        let biases = [heads, kv_heads, kv_heads].map(|n| lab.random.bf16s(n * width, 1.0));
        let norms = [0, 1].map(|_| lab.random.bf16s(width, 2.0));
        let blocks = rows.div_ceil(block_size) + 1;
        let slots_count = blocks * block_size;
        let mut slots: Vec<i64> = lab.random.shuffled(slots_count)[..rows]
            .iter()
            .map(|slot| *slot as i64)
            .collect();
        if rows > 3 {
            slots[2] = -1; // a padding row
            slots[3] = slots_count as i64; // outside: must not be written anywhere
        }
        let positions: Vec<i32> = (0..rows)
            .map(|_| lab.random.below(POSITIONS) as i32)
            .collect();
        let angles = table(POSITIONS, width);
        let (d_q, d_k, d_v) = (lab.upload(&q), lab.upload(&k), lab.upload(&v));
        let d_biases = [0, 1, 2].map(|i| lab.upload(&biases[i]));
        let d_norms = [0, 1].map(|i| lab.upload(&norms[i]));
        let (d_slots, d_positions, d_table) = (
            lab.upload(&slots),
            lab.upload(&positions),
            lab.upload(&angles),
        );
        let cache = lab.poisoned(slots_count * kv_heads * 2 * width * 2);
        let given = |there: bool, address: Address| if there { address } else { Address::NULL };
        lab.run(
            &plan::gqa_cache_write(rows, heads, kv_heads, width).expect("a plan"),
            &GqaCacheWriteParams {
                q: d_q.address(),
                k: d_k.address(),
                v: d_v.address(),
                q_bias: given(self.bias, d_biases[0].address()),
                k_bias: given(self.bias, d_biases[1].address()),
                v_bias: given(self.bias, d_biases[2].address()),
                q_norm: given(self.norm, d_norms[0].address()),
                k_norm: given(self.norm, d_norms[1].address()),
                positions: d_positions.address(),
                slots: d_slots.address(),
                table: d_table.address(),
                cache: cache.address(),
                slots_count: slots_count as i64,
                rows: rows as i32,
                heads: heads as i32,
                kv_heads: kv_heads as i32,
                width: width as i32,
                block_size: block_size as i32,
                q_stride: q_stride as i32,
                kv_stride: kv_stride as i32,
                positions_max: POSITIONS as i32,
                q_eps: 1e-6,
                k_eps: 1e-6,
            },
        );
        let got_q = lab.read_bf16(&d_q, q.len());
        let got = lab.read_bf16(&cache, slots_count * kv_heads * 2 * width);
        let mut want = vec![f64::NAN; got.len()];
        for row in 0..rows {
            let turn = &angles[positions[row] as usize * width..][..width];
            let fresh = &q[row * q_stride..][..q_stride];
            let (used, padding) = fresh.split_at(heads * width);
            let mut queries = self.want(used, &biases[0], Some(&norms[0]), Some(turn));
            queries.extend(reference::widen(padding));
            let got_row = &got_q[row * q_stride..][..q_stride];
            close(&format!("queries of {row}"), got_row, &queries, BF16, 1e-5);
            let slot = slots[row];
            if !(0..slots_count as i64).contains(&slot) {
                continue;
            }
            let of = |from: &[bf16]| from[row * kv_stride..][..kv_heads * width].to_vec();
            let keys = self.want(&of(&k), &biases[1], Some(&norms[1]), Some(turn));
            let values = self.want(&of(&v), &biases[2], None, None);
            for head in 0..kv_heads {
                for (kind, from) in [&keys, &values].into_iter().enumerate() {
                    let line = reference::gqa_line(slot as usize, block_size, kv_heads, head, kind);
                    want[line * width..][..width].copy_from_slice(&from[head * width..][..width]);
                }
            }
        }
        for (line, (got, want)) in got.chunks(width).zip(want.chunks(width)).enumerate() {
            if want[0].is_nan() {
                assert!(got.iter().all(|v| v.is_nan()), "line {line} was written");
            } else {
                close(&format!("line {line}"), got, want, BF16, 1e-5);
            }
        }
    }
}

#[test]
fn grouped_heads_are_finished_and_put_in_their_slots() {
    on_every_schedule("gqa cache write", |lab| {
        for (rows, heads, kv_heads, width, block_size, bias, norm) in [
            (1, 32, 8, 128, 64, false, false),
            (7, 7, 1, 64, 16, true, false),
            (64, 5, 5, 128, 7, false, true),
            (129, 2, 1, 12, 16, true, true),
        ] {
            Heads {
                rows,
                heads,
                kv_heads,
                width,
                block_size,
                bias,
                norm,
            }
            .check(lab);
        }
    });
}

/// A paged cache of keys and values, and decode over it.
struct Decode {
    heads: usize,
    kv_heads: usize,
    width: usize,
    block_size: usize,
    lengths: Vec<i32>,
    blocks: Vec<i32>,
    blocks_stride: usize,
    cache: Vec<bf16>,
    queries: Vec<bf16>,
    /// All rows are of one sequence and use its table.
    is_chunk: bool,
}

/// Which kernel attends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Row,
    Chunk,
}

impl Decode {
    /// `rows` tokens of one sequence, after `before` others.
    fn chunk(lab: &mut Lab, shape: [usize; 4], before: usize, rows: usize) -> Self {
        let [heads, _, width, _] = shape;
        let last = (before + rows) as i32;
        let mut chunk = Self::new(lab, shape, &[last]);
        chunk.lengths = (before as i32 + 1..=last).collect();
        chunk.queries = lab.random.bf16s(rows * heads * width, 1.0);
        chunk.is_chunk = true;
        chunk
    }

    fn new(
        lab: &mut Lab,
        [heads, kv_heads, width, block_size]: [usize; 4],
        lengths: &[i32],
    ) -> Self {
        let used = |length: &i32| (*length as usize).div_ceil(block_size);
        let blocks_stride = lengths.iter().map(used).max().unwrap_or(0).max(1);
        let total: usize = lengths.iter().map(used).sum();
        let mut order = lab.random.shuffled(total + 2).into_iter();
        let mut blocks = Vec::new();
        for length in lengths {
            // What lies past a sequence's end in its table must not be looked at.
            blocks.extend((0..blocks_stride).map(|i| match i < used(length) {
                true => order.next().expect("a block") as i32,
                false => -7,
            }));
        }
        let per_block = kv_heads * 2 * block_size * width;
        let mut decode = Self {
            heads,
            kv_heads,
            width,
            block_size,
            lengths: lengths.to_vec(),
            blocks,
            blocks_stride,
            cache: lab.random.bf16s((total + 2) * per_block, 1.0),
            queries: lab.random.bf16s(lengths.len() * heads * width, 1.0),
            is_chunk: false,
        };
        // Slots past a sequence's end hold NaN: reading one shows.
        for (row, length) in lengths.iter().enumerate() {
            for token in *length as usize..used(length) * block_size {
                for head in 0..kv_heads {
                    for kind in 0..2 {
                        let line = decode.line(row, head, kind, token);
                        decode.cache[line..][..width].fill(bf16::NAN);
                    }
                }
            }
        }
        decode
    }

    /// Where a token's key or value begins.
    fn line(&self, row: usize, kv_head: usize, kind: usize, token: usize) -> usize {
        let table = if self.is_chunk { 0 } else { row };
        let block = self.blocks[table * self.blocks_stride + token / self.block_size] as usize;
        let slot = block * self.block_size + token % self.block_size;
        reference::gqa_line(slot, self.block_size, self.kv_heads, kv_head, kind) * self.width
    }

    fn run(&self, lab: &Lab, rows: std::ops::Range<usize>, scale: f32) -> Vec<f64> {
        self.run_by(lab, By::Row, rows, scale)
    }

    fn run_by(&self, lab: &Lab, by: By, rows: std::ops::Range<usize>, scale: f32) -> Vec<f64> {
        let (count, row) = (rows.len(), self.heads * self.width);
        let lengths = &self.lengths[rows.clone()];
        let used = |length: &i32| plan::mla_splits(*length as usize);
        let splits = lengths.iter().map(used).max().unwrap_or(1);
        let d_queries = lab.upload(&self.queries[rows.start * row..rows.end * row]);
        let d_cache = lab.upload(&self.cache);
        let tables = match self.is_chunk {
            true => &self.blocks[..],
            false => &self.blocks[rows.start * self.blocks_stride..rows.end * self.blocks_stride],
        };
        let (d_blocks, d_lengths) = (lab.upload(tables), lab.upload(lengths));
        let partial = lab.poisoned(count * row * splits * 4);
        let lse = lab.poisoned(count * self.heads * splits * 4);
        let out = lab.poisoned(count * row * 2);
        let plan = match by {
            By::Row => plan::gqa_decode,
            By::Chunk => plan::gqa_prefill,
        };
        lab.run(
            &plan(count, self.heads, self.kv_heads, self.width, splits).expect("a plan"),
            &GqaDecodeParams {
                q: d_queries.address(),
                cache: d_cache.address(),
                blocks: d_blocks.address(),
                lengths: d_lengths.address(),
                partial: partial.address(),
                lse: lse.address(),
                rows: count as i32,
                heads: self.heads as i32,
                kv_heads: self.kv_heads as i32,
                q_row: row as i32,
                block_size: self.block_size as i32,
                blocks_stride: match self.is_chunk {
                    true => 0,
                    false => self.blocks_stride as i32,
                },
                splits: splits as i32,
                split_tokens: plan::MLA_SPLIT_TOKENS as i32,
                scale,
                reserved: 0,
            },
        );
        // Parts past a row's end are not even begun.
        let written = lab.read::<u32>(&lse, count * self.heads * splits);
        for (index, bits) in written.iter().enumerate() {
            let length = lengths[index / (self.heads * splits)];
            let begun = length > 0 && index % splits < used(&length);
            assert_eq!(begun, *bits != u32::MAX, "part {index}");
        }
        lab.run(
            &plan::mla_combine(count, self.heads).expect("a plan"),
            &MlaCombineParams {
                partial: partial.address(),
                lse: lse.address(),
                lengths: d_lengths.address(),
                out: out.address(),
                rows: count as i32,
                heads: self.heads as i32,
                splits: splits as i32,
                split_tokens: plan::MLA_SPLIT_TOKENS as i32,
                latent: self.width as i32,
                out_row: row as i32,
                out_head: self.width as i32,
                reserved: 0,
            },
        );
        lab.read_bf16(&out, count * row)
    }

    fn want(&self, row: usize, head: usize, scale: f32) -> Vec<f64> {
        let kv_head = head / (self.heads / self.kv_heads);
        let of_kind = |kind: usize| -> Vec<Vec<f64>> {
            (0..self.lengths[row] as usize)
                .map(|token| {
                    let line = self.line(row, kv_head, kind, token);
                    reference::widen(&self.cache[line..][..self.width])
                })
                .collect()
        };
        if self.lengths[row] == 0 {
            return vec![0.0; self.width];
        }
        let place = (row * self.heads + head) * self.width;
        let query = reference::widen(&self.queries[place..][..self.width]);
        reference::attend(&query, &of_kind(0), &of_kind(1), f64::from(scale)).0
    }
}

#[test]
fn grouped_decode_attends_to_the_paged_context() {
    on_every_schedule("gqa decode", |lab| {
        for (shape, lengths, scale) in [
            ([8, 2, 128, 64], vec![1, 45, 530], 0.088),
            ([7, 1, 64, 16], vec![0, 33, 1100, 512, 513], 0.125),
            ([36, 2, 64, 7], vec![96, 16], 0.125),
            ([3, 3, 128, 8], vec![17, 64], 0.088),
            ([2, 1, 64, 4], short(lab, 7), 0.125),
            ([2, 2, 64, 4], short(lab, 64), 0.125),
            ([2, 1, 64, 4], short(lab, 129), 0.125),
        ] {
            let [heads, _, width, _] = shape;
            let decode = Decode::new(lab, shape, &lengths);
            let got = decode.run(lab, 0..lengths.len(), scale);
            for row in 0..lengths.len() {
                for head in 0..heads {
                    // Probabilities are rounded to bf16 before they meet the values.
                    close(
                        &format!("{shape:?} row {row} head {head}"),
                        &got[(row * heads + head) * width..][..width],
                        &decode.want(row, head, scale),
                        2.0 * BF16,
                        2e-3,
                    );
                }
            }
        }
    });
}

/// A large score must not drown the others, nor overflow: the maximum is taken out of every exponent.
#[test]
fn grouped_decode_survives_large_scores() {
    on_every_schedule("gqa large", |lab| {
        let decode = Decode::new(lab, [4, 1, 64, 16], &[200]);
        let got = decode.run(lab, 0..1, 40.0);
        for head in 0..4 {
            let part = &got[head * 64..][..64];
            close(
                "large scores",
                part,
                &decode.want(0, head, 40.0),
                0.02,
                0.02,
            );
        }
    });
}

#[test]
fn a_grouped_decoded_row_is_the_same_bits_in_any_batch() {
    on_every_schedule("gqa alone", |lab| {
        let lengths = [700, 40, 1300];
        let decode = Decode::new(lab, [8, 2, 64, 16], &lengths);
        let all = decode.run(lab, 0..3, 0.125);
        for row in 0..3 {
            let alone = decode.run(lab, row..row + 1, 0.125);
            assert_eq!(alone, all[row * 8 * 64..(row + 1) * 8 * 64], "row {row}");
        }
    });
}

/// Groups of 4, 7, 1, 18 (two passes), 5 and 16; chunks that begin and end within a part, cross one, and fill blocks of rows
/// or leave the last one short.
#[test]
fn grouped_prefill_attends_with_the_bits_of_decode() {
    on_every_schedule("gqa prefill", |lab| {
        for (shape, before, rows) in [
            ([8, 2, 128, 64], 0, 13),
            ([7, 1, 64, 16], 505, 18),
            ([2, 2, 64, 7], 30, 40),
            ([36, 2, 64, 16], 9, 5),
            ([5, 1, 128, 8], 1020, 9),
            ([16, 1, 64, 64], 60, 3),
            ([4, 2, 64, 16], 3, 64),
            ([1, 1, 64, 16], 0, 129),
        ] {
            let [heads, _, width, _] = shape;
            let chunk = Decode::chunk(lab, shape, before, rows);
            let got = chunk.run_by(lab, By::Chunk, 0..rows, 0.125);
            let row = heads * width;
            let name = format!("{shape:?}: {rows} rows after {before}");
            assert!(
                got == chunk.run(lab, 0..rows, 0.125),
                "{name}: a row by itself"
            );
            // Cut elsewhere, rows share blocks with others.
            let cut = rows / 2;
            let mut parts = chunk.run_by(lab, By::Chunk, 0..cut, 0.125);
            parts.extend(chunk.run_by(lab, By::Chunk, cut..rows, 0.125));
            assert!(got == parts, "{name}: in two chunks");
            for index in [0, rows / 2, rows - 1] {
                for head in 0..heads {
                    close(
                        &format!("{name}, row {index} head {head}"),
                        &got[index * row + head * width..][..width],
                        &chunk.want(index, head, 0.125),
                        2.0 * BF16,
                        2e-3,
                    );
                }
            }
        }
    });
}
