//! Attention: rotation, cache write, decode over the paged cache, prefill.

use half::bf16;
use kernels::driver::Buffer;
use kernels::params::{
    CacheWriteParams, MlaCombineParams, MlaDecodeParams, MlaPrefillParams, RopeParams,
};
use kernels::plan::{self, Format};
use kernels::reference;

use crate::harness::{BF16, Lab, close, on_every_schedule};

/// `[positions, rotary / 2, {cos, sin}]`.
pub fn table(positions: usize, rotary: usize) -> Vec<f32> {
    (0..positions * rotary / 2)
        .flat_map(|index| {
            let (position, pair) = (index / (rotary / 2), index % (rotary / 2));
            let angle = position as f64 * 10_000f64.powf(-2.0 * pair as f64 / rotary as f64);
            [angle.cos() as f32, angle.sin() as f32]
        })
        .collect()
}

#[test]
fn rope_rotates_pairs_and_leaves_the_rest() {
    on_every_schedule("rope", |lab| {
        for (rows, heads, rotary, offset, padding) in [
            (1, 128, 64, 128, 0),
            (7, 16, 64, 128, 8),
            (129, 3, 32, 0, 5),
            (64, 1, 2, 3, 0),
        ] {
            for half_split in [false, true] {
                let head = offset + rotary + padding;
                let x = lab.random.bf16s(rows * heads * head, 2.0);
                let positions: Vec<i32> = (0..rows).map(|_| lab.random.below(50) as i32).collect();
                let angles = table(50, rotary);
                let (d_x, d_positions, d_table) =
                    (lab.upload(&x), lab.upload(&positions), lab.upload(&angles));
                lab.run(
                    &plan::rope(rows, heads, rotary).expect("a plan"),
                    &RopeParams {
                        x: d_x.address(),
                        positions: d_positions.address(),
                        table: d_table.address(),
                        rows: rows as i32,
                        heads: heads as i32,
                        row_stride: (heads * head) as i32,
                        head_stride: head as i32,
                        offset: offset as i32,
                        rotary: rotary as i32,
                        positions_max: 50,
                        half_split: i32::from(half_split),
                    },
                );
                let mut want = reference::widen(&x);
                for (index, part) in want.chunks_mut(head).enumerate() {
                    let position = positions[index / heads] as usize;
                    reference::rotate(
                        &mut part[offset..offset + rotary],
                        &angles[position * rotary..][..rotary],
                        half_split,
                    );
                }
                close("rope", &lab.read_bf16(&d_x, x.len()), &want, BF16, 1e-6);
            }
        }
    });
}

#[test]
fn a_position_outside_the_table_gives_nan() {
    on_every_schedule("rope outside", |lab| {
        let x = lab.random.bf16s(2 * 8, 1.0);
        let (d_x, d_positions, d_table) = (
            lab.upload(&x),
            lab.upload(&[49, 50]),
            lab.upload(&table(50, 8)),
        );
        lab.run(
            &plan::rope(2, 1, 8).expect("a plan"),
            &RopeParams {
                x: d_x.address(),
                positions: d_positions.address(),
                table: d_table.address(),
                rows: 2,
                heads: 1,
                row_stride: 8,
                head_stride: 8,
                offset: 0,
                rotary: 8,
                positions_max: 50,
                half_split: 0,
            },
        );
        let got = lab.read_bf16(&d_x, 16);
        assert!(
            got[..8].iter().all(|v| v.is_finite()) && got[8..].iter().all(|v| v.is_nan()),
            "{got:?}"
        );
    });
}

#[test]
fn the_cache_row_is_normed_rotated_and_put_in_its_slot() {
    on_every_schedule("cache write", |lab| {
        for (rows, latent, rotary, stride) in [
            (1, 512, 64, 576),
            (7, 512, 64, 2112),
            (64, 64, 32, 96),
            (129, 24, 8, 40),
        ] {
            let width = latent + rotary;
            let kv = lab.random.bf16s(rows * stride, 2.0);
            let weight = lab.random.bf16s(latent, 2.0);
            let slots_count = rows + 5;
            let mut slots: Vec<i64> = lab.random.shuffled(slots_count)[..rows]
                .iter()
                .map(|s| *s as i64)
                .collect();
            if rows > 3 {
                slots[2] = -1; // a padding row
                slots[3] = slots_count as i64; // outside: must not be written anywhere
            }
            let positions: Vec<i32> = (0..rows).map(|_| lab.random.below(50) as i32).collect();
            let angles = table(50, rotary);
            let (d_kv, d_weight, d_slots) =
                (lab.upload(&kv), lab.upload(&weight), lab.upload(&slots));
            let (d_positions, d_table) = (lab.upload(&positions), lab.upload(&angles));
            let cache = lab.poisoned(slots_count * width * 2);
            lab.run(
                &plan::mla_cache_write(Format::Bf16, rows, latent, rotary).expect("a plan"),
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
                    latent: latent as i32,
                    rotary: rotary as i32,
                    positions_max: 50,
                    eps: 1e-6,
                },
            );
            let got = lab.read_bf16(&cache, slots_count * width);
            let mut written = vec![false; slots_count];
            for (row, slot) in slots
                .iter()
                .enumerate()
                .filter(|(_, s)| (0..slots_count as i64).contains(*s))
            {
                let slot = *slot as usize;
                written[slot] = true;
                let want = reference::mla_cache_row(
                    &reference::widen(&kv[row * stride..][..width]),
                    &reference::widen(&weight),
                    1e-6,
                    &angles[positions[row] as usize * rotary..][..rotary],
                );
                close(
                    &format!("slot {slot}"),
                    &got[slot * width..][..width],
                    &want,
                    BF16,
                    1e-6,
                );
            }
            for slot in (0..slots_count).filter(|slot| !written[*slot]) {
                assert!(
                    got[slot * width..][..width].iter().all(|v| v.is_nan()),
                    "slot {slot} was written"
                );
            }
        }
    });
}

/// A paged cache with random rows, and decode over it.
struct Decode {
    heads: usize,
    latent: usize,
    rotary: usize,
    block_size: usize,
    lengths: Vec<i32>,
    blocks: Vec<i32>,
    blocks_stride: usize,
    cache: Vec<bf16>,
    queries: Vec<bf16>,
}

impl Decode {
    fn new(
        lab: &mut Lab,
        heads: usize,
        latent: usize,
        rotary: usize,
        block_size: usize,
        lengths: &[i32],
    ) -> Self {
        let width = latent + rotary;
        let blocks_stride = lengths
            .iter()
            .map(|l| (*l as usize).div_ceil(block_size))
            .max()
            .unwrap_or(0)
            .max(1);
        let total: usize = lengths
            .iter()
            .map(|l| (*l as usize).div_ceil(block_size))
            .sum();
        let mut order = lab.random.shuffled(total + 2).into_iter();
        let mut blocks = Vec::new();
        for length in lengths {
            let used = (*length as usize).div_ceil(block_size);
            // What lies past a sequence's end in its table must not be looked at.
            blocks.extend((0..blocks_stride).map(|i| {
                if i < used {
                    order.next().expect("a block") as i32
                } else {
                    -7
                }
            }));
        }
        let mut cache = lab.random.bf16s((total + 2) * block_size * width, 1.0);
        // Slots past a sequence's end hold NaN: reading one shows.
        for (row, length) in lengths.iter().enumerate() {
            let used = (*length as usize).div_ceil(block_size);
            for token in *length as usize..used * block_size {
                let block = blocks[row * blocks_stride + token / block_size] as usize;
                cache[(block * block_size + token % block_size) * width..][..width].fill(bf16::NAN);
            }
        }
        let queries = lab.random.bf16s(lengths.len() * heads * width, 1.0);
        Self {
            heads,
            latent,
            rotary,
            block_size,
            lengths: lengths.to_vec(),
            blocks,
            blocks_stride,
            cache,
            queries,
        }
    }

    fn run(&self, lab: &Lab, rows: std::ops::Range<usize>, scale: f32) -> Vec<f64> {
        let (width, heads) = (self.latent + self.rotary, self.heads);
        let count = rows.len();
        let lengths = &self.lengths[rows.clone()];
        let splits = lengths
            .iter()
            .map(|l| plan::mla_splits(*l as usize))
            .max()
            .unwrap_or(1);
        let d_queries =
            lab.upload(&self.queries[rows.start * heads * width..rows.end * heads * width]);
        let d_cache = lab.upload(&self.cache);
        let d_blocks = lab
            .upload(&self.blocks[rows.start * self.blocks_stride..rows.end * self.blocks_stride]);
        let d_lengths = lab.upload(lengths);
        let partial = lab.poisoned(count * heads * splits * self.latent * 4);
        let lse = lab.poisoned(count * heads * splits * 4);
        let out = lab.poisoned(count * heads * self.latent * 2);
        lab.run(
            &plan::mla_decode(Format::Bf16, count, heads, self.latent, self.rotary, splits)
                .expect("a plan"),
            &MlaDecodeParams {
                q_latent: d_queries.address(),
                q_rope: d_queries.address().offset(self.latent as u64 * 2),
                cache: d_cache.address(),
                blocks: d_blocks.address(),
                lengths: d_lengths.address(),
                partial: partial.address(),
                lse: lse.address(),
                rows: count as i32,
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
        // Parts past a row's end are not even begun.
        let written = lab.read::<u32>(&lse, count * heads * splits);
        for (index, bits) in written.iter().enumerate() {
            let used = plan::mla_splits(lengths[index / (heads * splits)] as usize);
            let begun = lengths[index / (heads * splits)] > 0 && index % splits < used;
            assert_eq!(begun, *bits != u32::MAX, "part {index}");
        }
        self.combine(lab, count, splits, &partial, &lse, &d_lengths, &out)
    }

    #[allow(clippy::too_many_arguments)]
    fn combine(
        &self,
        lab: &Lab,
        rows: usize,
        splits: usize,
        partial: &Buffer,
        lse: &Buffer,
        lengths: &Buffer,
        out: &Buffer,
    ) -> Vec<f64> {
        lab.run(
            &plan::mla_combine(rows, self.heads).expect("a plan"),
            &MlaCombineParams {
                partial: partial.address(),
                lse: lse.address(),
                lengths: lengths.address(),
                out: out.address(),
                rows: rows as i32,
                heads: self.heads as i32,
                splits: splits as i32,
                split_tokens: plan::MLA_SPLIT_TOKENS as i32,
                latent: self.latent as i32,
                out_row: (self.heads * self.latent) as i32,
                out_head: self.latent as i32,
                reserved: 0,
            },
        );
        lab.read_bf16(out, rows * self.heads * self.latent)
    }

    fn want(&self, row: usize, head: usize, scale: f32) -> Vec<f64> {
        let width = self.latent + self.rotary;
        let keys: Vec<Vec<f64>> = (0..self.lengths[row] as usize)
            .map(|token| {
                let block =
                    self.blocks[row * self.blocks_stride + token / self.block_size] as usize;
                reference::widen(
                    &self.cache[(block * self.block_size + token % self.block_size) * width..]
                        [..width],
                )
            })
            .collect();
        let values: Vec<Vec<f64>> = keys.iter().map(|key| key[..self.latent].to_vec()).collect();
        if keys.is_empty() {
            return vec![0.0; self.latent];
        }
        let query = reference::widen(&self.queries[(row * self.heads + head) * width..][..width]);
        reference::attend(&query, &keys, &values, f64::from(scale)).0
    }
}

/// Contexts of `rows` sequences, a few tokens each.
pub fn short(lab: &mut Lab, rows: usize) -> Vec<i32> {
    (0..rows).map(|_| 1 + lab.random.below(9) as i32).collect()
}

#[test]
fn decode_attends_to_the_paged_context() {
    on_every_schedule("decode", |lab| {
        for (heads, latent, rotary, block_size, lengths, scale) in [
            (16, 512, 64, 64, vec![1, 45, 530], 0.13),
            (3, 64, 32, 16, vec![0, 33, 1100, 512, 513], 0.2),
            (20, 64, 32, 7, vec![96, 31], 0.2),
            (128, 512, 64, 16, vec![37], 0.13),
            (1, 64, 32, 4, short(lab, 7), 0.2),
            (1, 64, 32, 4, short(lab, 64), 0.2),
            (17, 64, 32, 4, short(lab, 129), 0.2),
        ] {
            let decode = Decode::new(lab, heads, latent, rotary, block_size, &lengths);
            let got = decode.run(lab, 0..lengths.len(), scale);
            for row in 0..lengths.len() {
                for head in 0..heads {
                    let part = &got[(row * heads + head) * latent..][..latent];
                    // Probabilities are rounded to bf16 before they meet the values.
                    close(
                        &format!("row {row} head {head}"),
                        part,
                        &decode.want(row, head, scale),
                        2.0 * BF16,
                        2e-3,
                    );
                }
            }
        }
    });
}

#[test]
fn a_decoded_row_is_the_same_bits_in_any_batch() {
    on_every_schedule("decode alone", |lab| {
        let lengths = [700, 40, 1300];
        let decode = Decode::new(lab, 16, 64, 32, 16, &lengths);
        let all = decode.run(lab, 0..3, 0.2);
        for row in 0..3 {
            let alone = decode.run(lab, row..row + 1, 0.2);
            assert_eq!(alone, all[row * 16 * 64..(row + 1) * 16 * 64], "row {row}");
        }
    });
}

#[test]
fn prefill_is_causal_attention_of_each_sequence() {
    on_every_schedule("prefill", |lab| {
        for (heads, nope, rotary, value, lengths, scale) in [
            (2, 128, 64, 128, vec![(7, 7), (65, 65)], 0.13),
            (3, 32, 32, 32, vec![(1, 1), (64, 64), (129, 129)], 0.2),
            (1, 32, 32, 32, vec![(5, 40), (70, 101)], 0.2), // chunks behind a prefix
        ] {
            let (width, kv_head) = (nope + rotary, nope + value);
            let queries: usize = lengths.iter().map(|(q, _)| q).sum();
            let keys: usize = lengths.iter().map(|(_, k)| k).sum();
            let (mut q_offsets, mut k_offsets) = (vec![0i32], vec![0i32]);
            for (q, k) in &lengths {
                q_offsets.push(q_offsets.last().copied().unwrap_or(0) + *q as i32);
                k_offsets.push(k_offsets.last().copied().unwrap_or(0) + *k as i32);
            }
            let q = lab.random.bf16s(queries * heads * width, 1.0);
            let kv = lab.random.bf16s(keys * heads * kv_head, 1.0);
            let rope = lab.random.bf16s(keys * (rotary + 8), 1.0);
            let (d_q, d_kv, d_rope) = (lab.upload(&q), lab.upload(&kv), lab.upload(&rope));
            let (d_q_offsets, d_k_offsets) = (lab.upload(&q_offsets), lab.upload(&k_offsets));
            let out = lab.poisoned(queries * heads * value * 2);
            let lse = lab.poisoned(queries * heads * 4);
            let queries_max = lengths.iter().map(|(q, _)| *q).max().unwrap_or(0);
            lab.run(
                &plan::mla_prefill(lengths.len(), queries_max, heads, nope, rotary, value)
                    .expect("a plan"),
                &MlaPrefillParams {
                    q: d_q.address(),
                    kv: d_kv.address(),
                    k_rope: d_rope.address(),
                    out: out.address(),
                    lse: lse.address(),
                    q_offsets: d_q_offsets.address(),
                    k_offsets: d_k_offsets.address(),
                    sequences: lengths.len() as i32,
                    heads: heads as i32,
                    q_row: (heads * width) as i32,
                    q_head: width as i32,
                    kv_row: (heads * kv_head) as i32,
                    kv_head: kv_head as i32,
                    rope_row: (rotary + 8) as i32,
                    out_row: (heads * value) as i32,
                    out_head: value as i32,
                    scale,
                    reserved: [0; 2],
                },
            );
            let got = lab.read_bf16(&out, queries * heads * value);
            let got_lse = lab.read_f32(&lse, queries * heads);
            for (sequence, (q_len, k_len)) in lengths.iter().enumerate() {
                for (i, head) in (0..*q_len).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                    let at = q_offsets[sequence] as usize + i;
                    let query = reference::widen(&q[(at * heads + head) * width..][..width]);
                    let (mut visible, mut values) = (Vec::new(), Vec::new());
                    for key in 0..=i + k_len - q_len {
                        let key = k_offsets[sequence] as usize + key;
                        let row = &kv[(key * heads + head) * kv_head..][..kv_head];
                        let mut k = reference::widen(&row[..nope]);
                        k.extend(reference::widen(&rope[key * (rotary + 8)..][..rotary]));
                        visible.push(k);
                        values.push(reference::widen(&row[nope..]));
                    }
                    let (want, want_lse) =
                        reference::attend(&query, &visible, &values, f64::from(scale));
                    let what = format!("sequence {sequence} query {i} head {head}");
                    close(
                        &what,
                        &got[(at * heads + head) * value..][..value],
                        &want,
                        2.0 * BF16,
                        3e-3,
                    );
                    close(
                        &what,
                        &[got_lse[at * heads + head]],
                        &[want_lse],
                        1e-4,
                        2e-3,
                    );
                }
            }
        }
    });
}
