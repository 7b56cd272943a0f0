//! Latent attention on the GPU: cache, absorb, attend, expand.
//!
//! Prefill is absorbed too, as on the CPU. The expanded form needs a third of the arithmetic over long prompts, but sums
//! in another order, and a prompt's bytes would then depend on how it was cut into chunks and on what was cached.

use engine_model::{LatentAttention, Slot};
use kernels::params::{Address, CacheWriteParams, MlaCombineParams, MlaDecodeParams, RopeParams};
use kernels::plan::{self, MLA_SPLIT_TOKENS, Tables};

use super::products::PerHead;
use super::{Out, Pass};
use crate::layout::Form;
use crate::step::Run;
use crate::{AttentionKernels, CudaError};

/// So many elements of so many bytes further.
pub(super) fn at(address: Address, elements: usize, bytes: usize) -> Address {
    address.offset((elements * bytes) as u64)
}

impl Pass<'_> {
    /// Caches the step's rows and leaves every head's output in [`Slot::Value`].
    pub(super) fn attend_latent(
        &mut self,
        layer: usize,
        attention: &LatentAttention,
    ) -> Result<(), CudaError> {
        let LatentAttention {
            heads,
            nope,
            value,
            latent,
            all_heads,
            ..
        } = *attention;
        let placed = self.placed(attention.kv_up);
        let Form::Absorbed { values, .. } = placed.form else {
            return Err(CudaError::Graph(
                "a key-value up-projection that was not split by head",
            ));
        };
        self.rotate_queries(attention)?;
        self.cache_rows(layer, attention)?;
        let (query, query_row) = self.slot(Slot::Query);
        self.per_head(&PerHead {
            input: query,
            input_strides: (query_row, attention.query_width()),
            matrix: self.place(placed.span),
            out: Out {
                at: self.slot(Slot::AbsorbedQuery).0,
                stride: heads * latent,
            },
            heads,
            rows: latent,
            columns: nope,
        })?;
        for run in self.runs {
            for turn in self.turns(heads, run) {
                self.attend_rows(layer, attention, &turn)?;
            }
        }
        self.written(Slot::Value);
        self.per_head(&PerHead {
            input: self.slot(Slot::LatentValue).0,
            input_strides: (heads * latent, latent),
            matrix: self.place(values),
            out: Out {
                at: at(self.slot(Slot::Value).0, attention.first_head * value, 2),
                stride: all_heads * value,
            },
            heads,
            rows: value,
            columns: latent,
        })?;
        self.complete_heads(all_heads, value)
    }

    fn rotate_queries(&self, attention: &LatentAttention) -> Result<(), CudaError> {
        let (query, row_stride) = self.slot(Slot::Query);
        let buffers = &self.layout.buffers;
        let params = RopeParams {
            x: query,
            positions: self.place(buffers.positions),
            table: self.place(buffers.rotary),
            rows: self.rows as i32,
            heads: attention.heads as i32,
            row_stride: row_stride as i32,
            head_stride: attention.query_width() as i32,
            offset: attention.nope as i32,
            rotary: attention.rope as i32,
            positions_max: self.positions_max as i32,
            half_split: 0,
        };
        let launch = plan::rope(self.rows, attention.heads, attention.rope)?;
        self.launch(&launch, &params)
    }

    fn cache_rows(&self, layer: usize, attention: &LatentAttention) -> Result<(), CudaError> {
        let (fresh, stride) = self.slot(Slot::CacheRow);
        let buffers = &self.layout.buffers;
        let cache = self.layout.cache[layer];
        let params = CacheWriteParams {
            kv: fresh,
            weight: self.place(self.placed(attention.kv_norm.weight).span),
            positions: self.place(buffers.positions),
            slots: self.place(buffers.cache_rows),
            table: self.place(buffers.rotary),
            cache: self.place(cache),
            slots_count: self.layout.cache_rows as i64,
            rows: self.rows as i32,
            kv_stride: stride as i32,
            latent: attention.latent as i32,
            rotary: attention.rope as i32,
            positions_max: self.positions_max as i32,
            eps: attention.kv_norm.epsilon,
        };
        let format = self.layout.cache_format;
        let launch = plan::mla_cache_write(format, self.rows, attention.latent, attention.rope)?;
        self.launch(&launch, &params)
    }

    /// `run` in turns of as many rows as the parts have room for.
    pub(super) fn turns(&self, heads: usize, run: &Run) -> impl Iterator<Item = Run> + use<> {
        let run = *run;
        // A unit is one head's part: a row of the part's width and a logarithm.
        let units = self.layout.buffers.lse.bytes / 4;
        let turn = (units / (heads * run.splits)).max(1);
        (0..run.rows).step_by(turn).map(move |done| Run {
            first: run.first + done,
            rows: turn.min(run.rows - done),
            table: if run.one_table {
                run.table
            } else {
                run.table + done
            },
            ..run
        })
    }

    /// Merges the parts of a turn's heads, `width` values each, into rows.
    pub(super) fn merge(
        &self,
        heads: usize,
        width: usize,
        run: &Run,
        to: Out,
    ) -> Result<(), CudaError> {
        let buffers = &self.layout.buffers;
        let combine = MlaCombineParams {
            partial: self.place(buffers.parts),
            lse: self.place(buffers.lse),
            lengths: at(self.place(buffers.lengths), run.first, 4),
            out: at(to.at, run.first * to.stride, 2),
            rows: run.rows as i32,
            heads: heads as i32,
            splits: run.splits as i32,
            split_tokens: MLA_SPLIT_TOKENS as i32,
            latent: width as i32,
            out_row: to.stride as i32,
            out_head: width as i32,
            reserved: 0,
        };
        self.launch(&plan::mla_combine(run.rows, heads)?, &combine)
    }

    fn attend_rows(
        &self,
        layer: usize,
        attention: &LatentAttention,
        run: &Run,
    ) -> Result<(), CudaError> {
        let LatentAttention {
            heads,
            nope,
            rope,
            latent,
            scale,
            ..
        } = *attention;
        let buffers = &self.layout.buffers;
        let (query, query_row) = self.slot(Slot::Query);
        let absorbed = self.slot(Slot::AbsorbedQuery).0;
        let lengths = at(self.place(buffers.lengths), run.first, 4);
        let (partial, lse) = (self.place(buffers.parts), self.place(buffers.lse));
        let decode = MlaDecodeParams {
            q_latent: at(absorbed, run.first * heads * latent, 2),
            q_rope: at(query, run.first * query_row + nope, 2),
            cache: self.place(self.layout.cache[layer]),
            blocks: at(self.place(buffers.tables), run.table * self.table_length, 4),
            lengths,
            partial,
            lse,
            rows: run.rows as i32,
            heads: heads as i32,
            ql_row: (heads * latent) as i32,
            ql_head: latent as i32,
            qr_row: query_row as i32,
            qr_head: attention.query_width() as i32,
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
        let (rows, splits) = (run.rows, run.splits);
        let launch = match self.attention {
            AttentionKernels::Portable => {
                plan::mla_decode(self.layout.cache_format, rows, heads, latent, rope, splits)?
            }
            AttentionKernels::Hopper => {
                let tables = if run.one_table {
                    Tables::Shared
                } else {
                    Tables::Own
                };
                plan::hopper_mla_decode(rows, heads, latent, rope, splits, tables)?
            }
        };
        self.launch(&launch, &decode)?;
        let to = Out {
            at: self.slot(Slot::LatentValue).0,
            stride: heads * latent,
        };
        self.merge(heads, latent, run, to)
    }
}
