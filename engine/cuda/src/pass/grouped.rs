//! Grouped-query attention on the GPU: finish the heads and cache them, attend.
//!
//! The rows of a prompt share blocks of a kernel that gives each the bytes of decode, so that a prompt's bytes do not depend
//! on how it was cut into chunks nor on what was cached.

use engine_model::{GroupedAttention, Norm, Projection, Slot, WeightId};
use kernels::params::{Address, GqaCacheWriteParams, GqaDecodeParams};
use kernels::plan::{self, MLA_SPLIT_TOKENS};

use super::attention::at;
use super::{Out, Pass};
use crate::CudaError;
use crate::step::Run;

impl Pass<'_> {
    /// Caches the step's keys and values and leaves every head's output in [`Slot::Value`].
    pub(super) fn attend_grouped(
        &mut self,
        layer: usize,
        attention: &GroupedAttention,
    ) -> Result<(), CudaError> {
        self.cache_heads(layer, attention)?;
        self.written(Slot::Query);
        self.written(Slot::Value);
        let GroupedAttention {
            heads,
            first_head,
            all_heads,
            width,
            ..
        } = *attention;
        let to = Out {
            at: at(self.slot(Slot::Value).0, first_head * width, 2),
            stride: all_heads * width,
        };
        for run in self.runs {
            for turn in self.turns(heads, run) {
                self.attend_heads(layer, attention, &turn)?;
                self.merge(heads, width, &turn, to)?;
            }
        }
        self.complete_heads(all_heads, width)
    }

    fn optional(&self, weight: Option<WeightId>) -> Address {
        weight.map_or(Address::NULL, |id| self.place(self.placed(id).span))
    }

    fn cache_heads(&self, layer: usize, attention: &GroupedAttention) -> Result<(), CudaError> {
        let GroupedAttention {
            heads,
            kv_heads,
            width,
            ..
        } = *attention;
        let bias = |projection: &Projection| self.optional(projection.bias);
        let norms = attention.head_norms.as_ref();
        let (q_norm, k_norm) = (norms.map(|n| n.query), norms.map(|n| n.key));
        let weight = |norm: Option<Norm>| self.optional(norm.map(|norm| norm.weight));
        let epsilon = |norm: Option<Norm>| norm.map_or(0.0, |norm| norm.epsilon);
        let (q, q_stride) = self.slot(Slot::Query);
        let (k, kv_stride) = self.slot(Slot::FreshKey);
        let buffers = &self.layout.buffers;
        let cache = self.layout.cache[layer];
        let params = GqaCacheWriteParams {
            q,
            k,
            v: self.slot(Slot::FreshValue).0,
            q_bias: bias(&attention.query),
            k_bias: bias(&attention.key),
            v_bias: bias(&attention.value),
            q_norm: weight(q_norm),
            k_norm: weight(k_norm),
            positions: self.place(buffers.positions),
            slots: self.place(buffers.cache_rows),
            table: self.place(buffers.rotary),
            cache: self.place(cache),
            slots_count: (cache.bytes / (2 * kv_heads * width * 2)) as i64,
            rows: self.rows as i32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            width: width as i32,
            block_size: self.block_size as i32,
            q_stride: q_stride as i32,
            kv_stride: kv_stride as i32,
            positions_max: self.positions_max as i32,
            q_eps: epsilon(q_norm),
            k_eps: epsilon(k_norm),
        };
        let launch = plan::gqa_cache_write(self.rows, heads, kv_heads, width)?;
        self.launch(&launch, &params)
    }

    fn attend_heads(
        &self,
        layer: usize,
        attention: &GroupedAttention,
        run: &Run,
    ) -> Result<(), CudaError> {
        let GroupedAttention {
            heads,
            kv_heads,
            width,
            scale,
            ..
        } = *attention;
        let buffers = &self.layout.buffers;
        let (query, q_row) = self.slot(Slot::Query);
        let params = GqaDecodeParams {
            q: at(query, run.first * q_row, 2),
            cache: self.place(self.layout.cache[layer]),
            blocks: at(self.place(buffers.tables), run.table * self.table_length, 4),
            lengths: at(self.place(buffers.lengths), run.first, 4),
            partial: self.place(buffers.parts),
            lse: self.place(buffers.lse),
            rows: run.rows as i32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            q_row: q_row as i32,
            block_size: self.block_size as i32,
            blocks_stride: if run.one_table {
                0
            } else {
                self.table_length as i32
            },
            splits: run.splits as i32,
            split_tokens: MLA_SPLIT_TOKENS as i32,
            scale,
            reserved: 0,
        };
        let plan = match run.one_table {
            true => plan::gqa_prefill,
            false => plan::gqa_decode,
        };
        let launch = plan(run.rows, heads, kv_heads, width, run.splits)?;
        self.launch(&launch, &params)
    }
}
