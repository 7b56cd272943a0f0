//! The fp8 form of the latent cache: 512 codes, four float32 scales, 64 rotary bf16 values; 656 bytes a token.

use half::bf16;
use kernels::params::{CacheWriteParams, CopyBlocksParams, MlaCombineParams, MlaDecodeParams};
use kernels::plan::{self, Format, QUANT_GROUP};
use kernels::reference::{self, e4m3_value};

use crate::attention::{short, table};
use crate::harness::{BF16, Lab, close, on_every_schedule};

const LATENT: usize = 512;
const ROTARY: usize = 64;
const ROW: usize = 656;

/// A stored row as values: what its codes and scales stand for, and the rotary part.
fn values(row: &[u8]) -> (Vec<f64>, Vec<f32>, Vec<f64>) {
    let (codes, rest) = row.split_at(LATENT);
    let (scales, rotary) = rest.split_at(LATENT / QUANT_GROUP * 4);
    let scales: Vec<f32> = scales
        .chunks(4)
        .map(|b| f32::from_le_bytes(b.try_into().expect("four bytes")))
        .collect();
    let latent = codes
        .iter()
        .enumerate()
        .map(|(i, code)| e4m3_value(*code) * f64::from(scales[i / QUANT_GROUP]))
        .collect();
    let rotary = rotary
        .chunks(2)
        .map(|b| f64::from(bf16::from_le_bytes([b[0], b[1]]).to_f32()))
        .collect();
    (latent, scales, rotary)
}

#[test]
fn a_row_is_normed_quantised_rotated_and_put_in_its_slot() {
    assert_eq!(plan::mla_row_bytes(Format::Fp8, LATENT, ROTARY), ROW);
    on_every_schedule("fp8 cache write", |lab| {
        for (rows, stride) in [(1, 576), (7, 2112), (64, 576), (129, 584)] {
            let mut kv = lab.random.bf16s(rows * stride, 2.0);
            if rows > 5 {
                kv[5 * stride + 300] = bf16::NAN;
            }
            let weight = lab.random.bf16s(LATENT, 2.0);
            let slots_count = rows + 5;
            let mut slots: Vec<i64> = lab.random.shuffled(slots_count)[..rows]
                .iter()
                .map(|slot| *slot as i64)
                .collect();
            if rows > 3 {
                slots[2] = -1; // a padding row
                slots[3] = slots_count as i64; // outside: must not be written anywhere
            }
            let positions: Vec<i32> = (0..rows).map(|_| lab.random.below(50) as i32).collect();
            let angles = table(50, ROTARY);
            let (d_kv, d_weight, d_slots) =
                (lab.upload(&kv), lab.upload(&weight), lab.upload(&slots));
            let (d_positions, d_table) = (lab.upload(&positions), lab.upload(&angles));
            let cache = lab.poisoned(slots_count * ROW);
            lab.run(
                &plan::mla_cache_write(Format::Fp8, rows, LATENT, ROTARY).expect("a plan"),
                &CacheWriteParams {
                    kv: d_kv.address(),
                    weight: d_weight.address(),
                    positions: d_positions.address(),
                    slots: d_slots.address(),
                    table: d_table.address(),
                    cache: cache.address(),
                    slots_count: slots_count as i64,
                    rows: rows as i32,
                    kv_stride: stride as i32,
                    latent: LATENT as i32,
                    rotary: ROTARY as i32,
                    positions_max: 50,
                    eps: 1e-6,
                },
            );
            let got = lab.read::<u8>(&cache, slots_count * ROW);
            for slot in 0..slots_count {
                let stored = &got[slot * ROW..][..ROW];
                let Some(row) = slots.iter().position(|s| *s == slot as i64) else {
                    assert!(stored.iter().all(|b| *b == 0xFF), "slot {slot} was written");
                    continue;
                };
                let (latent, scales, rotary) = values(stored);
                if row == 5 {
                    // The sum of squares is broken, and so is every scale.
                    assert!(scales.iter().all(|scale| scale.is_nan()), "{scales:?}");
                    continue;
                }
                let want = reference::mla_cache_row(
                    &reference::widen(&kv[row * stride..][..LATENT + ROTARY]),
                    &reference::widen(&weight),
                    f64::from(1e-6f32),
                    &angles[positions[row] as usize * ROTARY..][..ROTARY],
                );
                let (want, turned) = want.split_at(LATENT);
                for (group, part) in want.chunks(QUANT_GROUP).enumerate() {
                    let amax = part.iter().fold(1e-4f64, |best, v| best.max(v.abs()));
                    let scale = f64::from(scales[group]);
                    assert!((scale - amax / 448.0).abs() <= 1e-5 * scale, "row {row}");
                    // Half of the last of three bits of mantissa, or of the smallest step.
                    let found = &latent[group * QUANT_GROUP..][..QUANT_GROUP];
                    close("latent", found, part, 1.0 / 15.9, scale / 1023.0);
                }
                close("rotary", &rotary, turned, BF16, 1e-6);
            }
        }
    });
}

/// Rows of the fp8 form behind block tables, and queries.
struct Cached {
    heads: usize,
    block_size: usize,
    lengths: Vec<i32>,
    blocks: Vec<i32>,
    blocks_stride: usize,
    bytes: Vec<u8>,
    queries: Vec<bf16>,
}

impl Cached {
    fn new(lab: &mut Lab, heads: usize, block_size: usize, lengths: &[i32]) -> Self {
        let used = |length: &i32| (*length as usize).div_ceil(block_size);
        let blocks_stride = lengths.iter().map(used).max().unwrap_or(1);
        let total: usize = lengths.iter().map(used).sum();
        let mut order = lab.random.shuffled(total).into_iter();
        let mut blocks = vec![-7; lengths.len() * blocks_stride];
        // What no sequence holds is NaN: scales and rotary values of all bits set.
        let mut bytes = vec![0xFF; (total + 1) * block_size * ROW];
        for (row, length) in lengths.iter().enumerate() {
            for block in 0..used(length) {
                blocks[row * blocks_stride + block] = order.next().expect("a block") as i32;
            }
            for token in 0..*length as usize {
                let block = blocks[row * blocks_stride + token / block_size] as usize;
                let stored = &mut bytes[(block * block_size + token % block_size) * ROW..][..ROW];
                stored[..LATENT].copy_from_slice(&lab.random.codes(LATENT));
                for group in 0..LATENT / QUANT_GROUP {
                    let scale = (lab.random.float(1.0).abs() + 0.1) / 448.0;
                    stored[LATENT + 4 * group..][..4].copy_from_slice(&scale.to_le_bytes());
                }
                for (at, value) in lab.random.bf16s(ROTARY, 1.0).into_iter().enumerate() {
                    stored[ROW - 2 * ROTARY + 2 * at..][..2].copy_from_slice(&value.to_le_bytes());
                }
            }
        }
        let queries = lab
            .random
            .bf16s(lengths.len() * heads * (LATENT + ROTARY), 1.0);
        Self {
            heads,
            block_size,
            lengths: lengths.to_vec(),
            blocks,
            blocks_stride,
            bytes,
            queries,
        }
    }

    /// Decodes; with `moved`, after the first block of the first row was copied to the free one and its table changed.
    fn run(&self, lab: &Lab, scale: f32, moved: bool) -> Vec<f64> {
        let (rows, heads, width) = (self.lengths.len(), self.heads, LATENT + ROTARY);
        let used = |length: &i32| plan::mla_splits(*length as usize);
        let splits = self.lengths.iter().map(used).max().unwrap_or(1);
        let cache = lab.upload(&self.bytes);
        let mut blocks = self.blocks.clone();
        if moved {
            let block_bytes = self.block_size * ROW;
            let count = self.bytes.len() / block_bytes;
            let pairs = lab.upload(&[blocks[0], count as i32 - 1]);
            blocks[0] = count as i32 - 1;
            lab.run(
                &plan::copy_blocks(1, 1, block_bytes).expect("a plan"),
                &CopyBlocksParams {
                    cache: cache.address(),
                    pairs: pairs.address(),
                    layer_bytes: self.bytes.len() as i64,
                    block_bytes: block_bytes as i32,
                    blocks: count as i32,
                    layers: 1,
                    reserved: 0,
                },
            );
        }
        let (d_queries, d_blocks) = (lab.upload(&self.queries), lab.upload(&blocks));
        let d_lengths = lab.upload(&self.lengths);
        let partial = lab.poisoned(rows * heads * splits * LATENT * 4);
        let lse = lab.poisoned(rows * heads * splits * 4);
        let out = lab.poisoned(rows * heads * LATENT * 2);
        lab.run(
            &plan::mla_decode(Format::Fp8, rows, heads, LATENT, ROTARY, splits).expect("a plan"),
            &MlaDecodeParams {
                q_latent: d_queries.address(),
                q_rope: d_queries.address().offset(LATENT as u64 * 2),
                cache: cache.address(),
                blocks: d_blocks.address(),
                lengths: d_lengths.address(),
                partial: partial.address(),
                lse: lse.address(),
                rows: rows as i32,
                heads: heads as i32,
                ql_row: (heads * width) as i32,
                ql_head: width as i32,
                qr_row: (heads * width) as i32,
                qr_head: width as i32,
                block_size: self.block_size as i32,
                blocks_stride: self.blocks_stride as i32,
                splits: splits as i32,
                split_tokens: plan::MLA_SPLIT_TOKENS as i32,
                scale,
                reserved: 0,
            },
        );
        lab.run(
            &plan::mla_combine(rows, heads).expect("a plan"),
            &MlaCombineParams {
                partial: partial.address(),
                lse: lse.address(),
                lengths: d_lengths.address(),
                out: out.address(),
                rows: rows as i32,
                heads: heads as i32,
                splits: splits as i32,
                split_tokens: plan::MLA_SPLIT_TOKENS as i32,
                latent: LATENT as i32,
                out_row: (heads * LATENT) as i32,
                out_head: LATENT as i32,
                reserved: 0,
            },
        );
        lab.read_bf16(&out, rows * heads * LATENT)
    }

    fn want(&self, row: usize, head: usize, scale: f32) -> Vec<f64> {
        // The tensor core multiplies bf16: a value is its code times its scale, rounded once.
        let narrow = |v: &f64| f64::from(bf16::from_f32(*v as f32).to_f32());
        let keys: Vec<Vec<f64>> = (0..self.lengths[row] as usize)
            .map(|token| {
                let block =
                    self.blocks[row * self.blocks_stride + token / self.block_size] as usize;
                let at = (block * self.block_size + token % self.block_size) * ROW;
                let (latent, _, rotary) = values(&self.bytes[at..][..ROW]);
                latent.iter().map(narrow).chain(rotary).collect()
            })
            .collect();
        let latents: Vec<Vec<f64>> = keys.iter().map(|key| key[..LATENT].to_vec()).collect();
        let width = LATENT + ROTARY;
        let query = reference::widen(&self.queries[(row * self.heads + head) * width..][..width]);
        reference::attend(&query, &keys, &latents, f64::from(scale)).0
    }
}

#[test]
fn decode_reads_fp8_rows_and_copied_blocks() {
    on_every_schedule("fp8 decode", |lab| {
        for (heads, block_size, lengths) in [
            (16, 64, vec![1, 45, 530]),
            (3, 7, vec![33, 96]),
            (128, 16, vec![37]),
            (1, 4, short(lab, 7)),
            (1, 4, short(lab, 64)),
            (2, 4, short(lab, 129)),
        ] {
            let cached = Cached::new(lab, heads, block_size, &lengths);
            let got = cached.run(lab, 0.13, false);
            for row in 0..lengths.len() {
                for head in 0..heads {
                    close(
                        &format!("row {row} head {head}"),
                        &got[(row * heads + head) * LATENT..][..LATENT],
                        &cached.want(row, head, 0.13),
                        2.0 * BF16,
                        2e-3,
                    );
                }
            }
            assert_eq!(cached.run(lab, 0.13, true), got);
        }
    });
}
