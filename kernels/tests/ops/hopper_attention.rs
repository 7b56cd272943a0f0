//! Hopper's attention kernels against float64, and against themselves in other company.

use std::ops::Range;

use half::bf16;
use kernels::params::{MlaCombineParams, MlaDecodeParams, MlaPrefillParams};
use kernels::plan::{self, Tables};
use kernels::reference;

use crate::harness::{BF16, Lab, close, on_every_schedule};

/// Whether the device has what these kernels are made of.
fn is_hopper(lab: &Lab) -> bool {
    lab.device.capability() == (9, 0)
}

/// A head shape: heads, latent and rotary values.
#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    latent: usize,
    rotary: usize,
}

impl Shape {
    fn width(self) -> usize {
        self.latent + self.rotary
    }
}

const fn published(heads: usize) -> Shape {
    Shape {
        heads,
        latent: 512,
        rotary: 64,
    }
}

const fn small(heads: usize) -> Shape {
    Shape {
        heads,
        latent: 64,
        rotary: 32,
    }
}

/// Rows with random queries over a paged cache of random tokens.
struct Decode {
    shape: Shape,
    tables: Tables,
    block_size: usize,
    lengths: Vec<i32>,
    /// Blocks of each row, or of all.
    blocks: Vec<Vec<i32>>,
    cache: Vec<bf16>,
    queries: Vec<bf16>,
}

impl Decode {
    fn new(
        lab: &mut Lab,
        shape: Shape,
        tables: Tables,
        block_size: usize,
        lengths: &[i32],
    ) -> Self {
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let contexts = match tables {
            Tables::Shared => vec![longest],
            Tables::Own => lengths.to_vec(),
        };
        let used = |context: i32| (context as usize).div_ceil(block_size);
        let total: usize = contexts.iter().map(|context| used(*context)).sum();
        let mut order = lab.random.shuffled(total + 2).into_iter();
        let mut cache = lab
            .random
            .bf16s((total + 2) * block_size * shape.width(), 1.0);
        let table_length = used(longest).max(1);
        let mut blocks = Vec::new();
        for context in contexts {
            // What lies past a context's end in its table must not be looked at, and its slots hold NaN.
            let mut table = vec![-7; table_length];
            for entry in &mut table[..used(context)] {
                *entry = order.next().expect("a block") as i32;
            }
            for token in context as usize..used(context) * block_size {
                let slot = table[token / block_size] as usize * block_size + token % block_size;
                cache[slot * shape.width()..][..shape.width()].fill(bf16::NAN);
            }
            blocks.push(table);
        }
        Self {
            shape,
            tables,
            block_size,
            lengths: lengths.to_vec(),
            blocks,
            cache,
            queries: lab
                .random
                .bf16s(lengths.len() * shape.heads * shape.width(), 1.0),
        }
    }

    fn table(&self, row: usize) -> &[i32] {
        match self.tables {
            Tables::Shared => &self.blocks[0],
            Tables::Own => &self.blocks[row],
        }
    }

    /// Decode and merge of some rows.
    fn run(&self, lab: &Lab, rows: Range<usize>, tables: Tables) -> Vec<f64> {
        let Shape {
            heads,
            latent,
            rotary,
        } = self.shape;
        let (width, count) = (self.shape.width(), rows.len());
        let lengths = &self.lengths[rows.clone()];
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let splits = plan::mla_splits(longest);
        let tables_of_rows: Vec<i32> = rows
            .clone()
            .flat_map(|row| self.table(row).to_vec())
            .collect();
        let table_length = self.table(0).len();
        let queries = &self.queries[rows.start * heads * width..rows.end * heads * width];
        let (queries, cache) = (lab.upload(queries), lab.upload(&self.cache));
        let (blocks, d_lengths) = (lab.upload(&tables_of_rows), lab.upload(lengths));
        let partial = lab.poisoned(count * heads * splits * latent * 4);
        let lse = lab.poisoned(count * heads * splits * 4);
        let out = lab.poisoned(count * heads * latent * 2);
        let (q_row, splits_count) = ((heads * width) as i32, splits as i32);
        lab.run(
            &plan::hopper_mla_decode(count, heads, latent, rotary, splits, tables).expect("a plan"),
            &MlaDecodeParams {
                q_latent: queries.address(),
                q_rope: queries.address().offset(latent as u64 * 2),
                cache: cache.address(),
                blocks: blocks.address(),
                lengths: d_lengths.address(),
                partial: partial.address(),
                lse: lse.address(),
                rows: count as i32,
                heads: heads as i32,
                ql_row: q_row,
                ql_head: width as i32,
                qr_row: q_row,
                qr_head: width as i32,
                block_size: self.block_size as i32,
                blocks_stride: match tables {
                    Tables::Shared => 0,
                    Tables::Own => table_length as i32,
                },
                splits: splits_count,
                split_tokens: plan::MLA_SPLIT_TOKENS as i32,
                scale: SCALE,
                reserved: 0,
            },
        );
        // Parts past a row's end are not written.
        let of_logs = lab.read::<u32>(&lse, count * heads * splits);
        let of_parts = lab.read::<u32>(&partial, count * heads * splits * latent);
        for (part, bits) in of_logs.iter().enumerate() {
            let length = lengths[part / (heads * splits)] as usize;
            let begun = part % splits * plan::MLA_SPLIT_TOKENS < length;
            assert_eq!(begun, *bits != u32::MAX, "the logarithm of part {part}");
            let values = &of_parts[part * latent..][..latent];
            assert!(
                values.iter().all(|v| (*v != u32::MAX) == begun),
                "part {part}"
            );
        }
        lab.run(
            &plan::mla_combine(count, heads).expect("a plan"),
            &MlaCombineParams {
                partial: partial.address(),
                lse: lse.address(),
                lengths: d_lengths.address(),
                out: out.address(),
                rows: count as i32,
                heads: heads as i32,
                splits: splits_count,
                split_tokens: plan::MLA_SPLIT_TOKENS as i32,
                latent: latent as i32,
                out_row: (heads * latent) as i32,
                out_head: latent as i32,
                reserved: 0,
            },
        );
        lab.read_bf16(&out, count * heads * latent)
    }

    fn want(&self, row: usize, head: usize) -> Vec<f64> {
        let (width, table) = (self.shape.width(), self.table(row));
        let key = |token: usize| {
            let slot = table[token / self.block_size] as usize * self.block_size;
            let at = (slot + token % self.block_size) * width;
            reference::widen(&self.cache[at..at + width])
        };
        let keys: Vec<Vec<f64>> = (0..self.lengths[row] as usize).map(key).collect();
        if keys.is_empty() {
            return vec![0.0; self.shape.latent];
        }
        let values: Vec<_> = keys
            .iter()
            .map(|k| k[..self.shape.latent].to_vec())
            .collect();
        let at = (row * self.shape.heads + head) * width;
        let query = reference::widen(&self.queries[at..at + width]);
        reference::attend(&query, &keys, &values, f64::from(SCALE)).0
    }

    fn check(&self, got: &[f64]) {
        let Shape { heads, latent, .. } = self.shape;
        for row in 0..self.lengths.len() {
            for head in 0..heads {
                let what = format!("{heads} heads, row {row} head {head}");
                let part = &got[(row * heads + head) * latent..][..latent];
                // Probabilities are rounded to bf16 before they meet the values.
                close(&what, part, &self.want(row, head), 2.0 * BF16, 2e-3);
            }
        }
    }
}

const SCALE: f32 = 0.13;

#[test]
fn hopper_decode_attends_to_the_paged_context() {
    on_every_schedule("hopper decode", |lab| {
        if !is_hopper(lab) {
            return;
        }
        for (shape, block_size, lengths) in [
            (published(16), 64, vec![1]),
            (published(16), 16, vec![64, 63, 65]),
            (published(128), 64, vec![65]),
            (published(100), 7, vec![140]),
            (small(3), 16, vec![0, 33, 1000, 512, 513]),
            (small(128), 64, vec![1000, 1, 64]),
        ] {
            let decode = Decode::new(lab, shape, Tables::Own, block_size, &lengths);
            decode.check(&decode.run(lab, 0..lengths.len(), Tables::Own));
        }
    });
}

#[test]
fn hopper_decode_is_right_over_a_thousand_tokens() {
    on_every_schedule("hopper decode far", |lab| {
        if is_hopper(lab) {
            let decode = Decode::new(lab, published(16), Tables::Own, 64, &[1000]);
            decode.check(&decode.run(lab, 0..1, Tables::Own));
        }
    });
}

#[test]
fn a_row_of_hopper_decode_is_the_same_bits_in_any_company() {
    on_every_schedule("hopper decode alone", |lab| {
        if !is_hopper(lab) {
            return;
        }
        // Rows of a chunk, over one table, before and behind the edges of a tile and of a part.
        for (shape, lengths) in [
            (small(20), (60..68).collect::<Vec<i32>>()),
            (small(4), (500..530).collect()),
            (small(70), vec![600, 601]),
            (published(16), vec![126, 127, 128, 129, 130]),
        ] {
            let decode = Decode::new(lab, shape, Tables::Shared, 16, &lengths);
            let together = decode.run(lab, 0..lengths.len(), Tables::Shared);
            decode.check(&together);
            let each = shape.heads * shape.latent;
            for row in 0..lengths.len() {
                let alone = decode.run(lab, row..row + 1, Tables::Own);
                assert_eq!(alone, together[row * each..(row + 1) * each], "row {row}");
            }
            let apart = decode.run(lab, 0..lengths.len(), Tables::Own);
            assert_eq!(apart, together, "rows with tables of their own");
        }
    });
}

/// Sequences of random queries, keys and values.
struct Prefill {
    heads: usize,
    nope: usize,
    rotary: usize,
    value: usize,
    /// Queries and keys of each.
    lengths: Vec<(usize, usize)>,
    q: Vec<bf16>,
    kv: Vec<bf16>,
    rope: Vec<bf16>,
}

/// Between rows of the shared rotary keys, beyond their width.
const ROPE_PADDING: usize = 8;

impl Prefill {
    fn new(lab: &mut Lab, heads: usize, widths: [usize; 3], lengths: &[(usize, usize)]) -> Self {
        let [nope, rotary, value] = widths;
        let queries: usize = lengths.iter().map(|(q, _)| q).sum();
        let keys: usize = lengths.iter().map(|(_, k)| k).sum();
        Self {
            heads,
            nope,
            rotary,
            value,
            lengths: lengths.to_vec(),
            q: lab.random.bf16s(queries * heads * (nope + rotary), 1.0),
            kv: lab.random.bf16s(keys * heads * (nope + value), 1.0),
            rope: lab.random.bf16s(keys * (rotary + ROPE_PADDING), 1.0),
        }
    }

    /// Where each sequence's queries and keys begin, and the ends.
    fn offsets(&self) -> (Vec<i32>, Vec<i32>) {
        let (mut of_queries, mut of_keys) = (vec![0], vec![0]);
        for (queries, keys) in &self.lengths {
            of_queries.push(of_queries.last().copied().unwrap_or(0) + *queries as i32);
            of_keys.push(of_keys.last().copied().unwrap_or(0) + *keys as i32);
        }
        (of_queries, of_keys)
    }

    /// Outputs and logarithms of some of the sequences.
    fn run(&self, lab: &Lab, sequences: Range<usize>) -> (Vec<f64>, Vec<f64>) {
        let Self {
            heads,
            nope,
            rotary,
            value,
            ..
        } = *self;
        let (width, kv_head) = (nope + rotary, nope + value);
        let (of_queries, of_keys) = self.offsets();
        let (of_queries, of_keys) = (
            &of_queries[sequences.start..=sequences.end],
            &of_keys[sequences.start..=sequences.end],
        );
        let queries_max = self.lengths[sequences.clone()]
            .iter()
            .map(|(q, _)| *q)
            .max();
        let end = of_queries[sequences.len()] as usize;
        let (q, kv, rope) = (
            lab.upload(&self.q),
            lab.upload(&self.kv),
            lab.upload(&self.rope),
        );
        let (q_offsets, k_offsets) = (lab.upload(of_queries), lab.upload(of_keys));
        let out = lab.poisoned(end * heads * value * 2);
        let lse = lab.poisoned(end * heads * 4);
        lab.run(
            &plan::hopper_mla_prefill(
                sequences.len(),
                queries_max.unwrap_or(0),
                heads,
                nope,
                rotary,
                value,
            )
            .expect("a plan"),
            &MlaPrefillParams {
                q: q.address(),
                kv: kv.address(),
                k_rope: rope.address(),
                out: out.address(),
                lse: lse.address(),
                q_offsets: q_offsets.address(),
                k_offsets: k_offsets.address(),
                sequences: sequences.len() as i32,
                heads: heads as i32,
                q_row: (heads * width) as i32,
                q_head: width as i32,
                kv_row: (heads * kv_head) as i32,
                kv_head: kv_head as i32,
                rope_row: (rotary + ROPE_PADDING) as i32,
                out_row: (heads * value) as i32,
                out_head: value as i32,
                scale: SCALE,
                reserved: [0; 2],
            },
        );
        let first = of_queries[0] as usize * heads;
        let outputs = lab.read_bf16(&out, end * heads * value);
        let logarithms = lab.read_f32(&lse, end * heads);
        assert!(
            outputs[..first * value].iter().all(|v| v.is_nan()),
            "a sequence that is not in the launch was written"
        );
        (
            outputs[first * value..].to_vec(),
            logarithms[first..].to_vec(),
        )
    }

    fn want(&self, sequence: usize, query: usize, head: usize) -> (Vec<f64>, f64) {
        let (width, kv_head) = (self.nope + self.rotary, self.nope + self.value);
        let (of_queries, of_keys) = self.offsets();
        let (queries, keys) = self.lengths[sequence];
        let at = (of_queries[sequence] as usize + query) * self.heads + head;
        let q = reference::widen(&self.q[at * width..][..width]);
        let (mut seen, mut values) = (Vec::new(), Vec::new());
        for key in 0..=query + keys - queries {
            let key = of_keys[sequence] as usize + key;
            let row = &self.kv[(key * self.heads + head) * kv_head..][..kv_head];
            let mut whole = reference::widen(&row[..self.nope]);
            let rope = &self.rope[key * (self.rotary + ROPE_PADDING)..][..self.rotary];
            whole.extend(reference::widen(rope));
            seen.push(whole);
            values.push(reference::widen(&row[self.nope..]));
        }
        reference::attend(&q, &seen, &values, f64::from(SCALE))
    }

    fn check(&self, lab: &Lab) {
        let (out, lse) = self.run(lab, 0..self.lengths.len());
        let (of_queries, _) = self.offsets();
        for (sequence, (queries, _)) in self.lengths.iter().enumerate() {
            for query in 0..*queries {
                // All of a tile's edge, and a sample of the rest: the reference is slow.
                if query % 64 > 1 && query % 64 < 63 && query % 7 != 0 && query + 1 != *queries {
                    continue;
                }
                for head in 0..self.heads {
                    let (want, want_lse) = self.want(sequence, query, head);
                    let at = (of_queries[sequence] as usize + query) * self.heads + head;
                    let what = format!("sequence {sequence} query {query} head {head}");
                    let got = &out[at * self.value..][..self.value];
                    close(&what, got, &want, 2.0 * BF16, 3e-3);
                    close(&what, &[lse[at]], &[want_lse], 1e-4, 2e-3);
                }
            }
        }
    }
}

const PUBLISHED_WIDTHS: [usize; 3] = [128, 64, 128];
const SMALL_WIDTHS: [usize; 3] = [32, 32, 32];

#[test]
fn hopper_prefill_is_causal_attention_of_each_sequence() {
    on_every_schedule("hopper prefill", |lab| {
        if !is_hopper(lab) {
            return;
        }
        for (heads, widths, lengths) in [
            (2, PUBLISHED_WIDTHS, vec![(7, 7), (65, 65)]),
            (1, PUBLISHED_WIDTHS, vec![(130, 300)]),
            (3, SMALL_WIDTHS, vec![(1, 1), (64, 64), (129, 129)]),
            (1, SMALL_WIDTHS, vec![(5, 40), (127, 1000), (70, 101)]), // chunks behind a prefix
        ] {
            Prefill::new(lab, heads, widths, &lengths).check(lab);
        }
    });
}

#[test]
fn hopper_prefill_gives_a_query_the_same_bits_in_any_company() {
    on_every_schedule("hopper prefill alone", |lab| {
        if !is_hopper(lab) {
            return;
        }
        let prefill = Prefill::new(lab, 2, SMALL_WIDTHS, &[(130, 130), (3, 200), (200, 290)]);
        let (out, lse) = prefill.run(lab, 0..3);
        let (of_queries, _) = prefill.offsets();
        for sequence in 0..3 {
            let (alone, alone_lse) = prefill.run(lab, sequence..sequence + 1);
            let [from, to] = [0, 1].map(|i| of_queries[sequence + i] as usize * 2);
            assert_eq!(alone, out[from * 32..to * 32], "sequence {sequence}");
            assert_eq!(alone_lse, lse[from..to], "sequence {sequence}");
        }
    });
}
