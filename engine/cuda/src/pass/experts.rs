//! The mixture of experts on the GPU: scores, choice, sort, two products for all experts together, weighted sum.

use std::ops::Range;

use engine_model::{Gate, Moe, Slot};
use engine_spec::{GateScoring, GateSelection};
use kernels::params::{Address, CombineParams, GateParams, PermuteParams};
use kernels::plan;

use super::products::OfExperts;
use super::{Out, Pass};
use crate::CudaError;
use crate::shapes::gate_groups;

impl Pass<'_> {
    /// Chooses the experts of every row.
    pub(super) fn choose_experts(&mut self, gate: &Gate, from: Slot) -> Result<(), CudaError> {
        let buffers = &self.layout.buffers;
        let scores = self.place(buffers.scores);
        let matrix = self.matrix(gate.weight);
        self.wide_product(&matrix, &self.rows_of(from), Out::own(scores, &matrix))?;
        let (groups, kept) = gate_groups(gate);
        let params = GateParams {
            logits: scores,
            bias: gate
                .bias
                .map_or(Address::NULL, |bias| self.place(self.placed(bias).span)),
            chosen: self.place(buffers.chosen),
            weights: self.place(buffers.choice_weights),
            rows: self.rows as i32,
            experts: gate.experts as i32,
            top_k: gate.top_k as i32,
            groups: groups as i32,
            groups_per_token: kept as i32,
            softmax: i32::from(gate.scoring == GateScoring::Softmax),
            group_top_two: i32::from(gate.selection == GateSelection::BiasedGroups),
            normalise: i32::from(gate.normalise),
            scale: gate.scale,
            reserved: 0,
        };
        let launch = plan::gate(self.rows, gate.experts, gate.top_k, groups, kept)?;
        self.launch(&launch, &params)
    }

    /// `to = Σ weight · expert(from) + shared(from)`.
    pub(super) fn run_experts(&mut self, moe: &Moe, from: Slot, to: Slot) -> Result<(), CudaError> {
        let Some(first) = moe.experts.first() else {
            return Err(CudaError::Graph("a mixture without experts"));
        };
        self.written(to);
        let held = moe.first_expert..moe.first_expert + moe.experts.len();
        self.sort(&moe.gate, &held)?;
        let buffers = &self.layout.buffers;
        let row_token = self.place(buffers.row_token);
        let (gate_up_rows, outputs) = (self.place(buffers.gate_up), self.place(buffers.expert_out));
        let chosen = self.rows * moe.gate.top_k;
        let (gate_up, down) = (self.gate_up(first), self.matrix(first.down));
        let tokens = self.input(from, &gate_up)?;
        let experts = moe.gate.experts;
        self.expert_product(&OfExperts {
            first: &gate_up,
            held: held.clone(),
            experts,
            rows: &tokens,
            row_token,
            chosen,
            out: gate_up_rows,
        })?;
        let product = self.activate(chosen, 0..first.inner, &down)?;
        self.clear_experts(chosen)?;
        self.expert_product(&OfExperts {
            first: &down,
            held,
            experts,
            rows: &product,
            row_token: Address::NULL,
            chosen,
            out: outputs,
        })?;
        self.complete_experts(experts, chosen)?;
        let shared = match &moe.shared {
            Some(shared) => {
                let out = self.layout.buffers.shared_out;
                self.mlp_to(shared, from, out)?;
                self.place(out)
            }
            None => Address::NULL,
        };
        self.combine(&moe.gate, outputs, shared, to)
    }

    fn sort(&self, gate: &Gate, held: &Range<usize>) -> Result<(), CudaError> {
        let buffers = &self.layout.buffers;
        let chosen = self.rows * gate.top_k;
        let params = PermuteParams {
            chosen: self.place(buffers.chosen),
            offsets: self.place(buffers.offsets),
            row_token: self.place(buffers.row_token),
            slot_row: self.place(buffers.slot_row),
            tiles: self.place(buffers.tiles),
            tokens: self.rows as i32,
            top_k: gate.top_k as i32,
            experts: gate.experts as i32,
            tile_rows: self.expert_tile_rows(chosen, gate.experts) as i32,
            first_expert: held.start as i32,
            experts_held: held.len() as i32,
        };
        let launch = plan::permute(self.rows, gate.top_k, gate.experts)?;
        self.launch(&launch, &params)
    }

    fn combine(
        &self,
        gate: &Gate,
        outputs: Address,
        shared: Address,
        to: Slot,
    ) -> Result<(), CudaError> {
        let buffers = &self.layout.buffers;
        let (out, width) = self.slot(to);
        let params = CombineParams {
            y: outputs,
            slot_row: self.place(buffers.slot_row),
            weights: self.place(buffers.choice_weights),
            shared,
            out,
            tokens: self.rows as i32,
            top_k: gate.top_k as i32,
            width: width as i32,
            y_stride: width as i32,
        };
        self.launch(&plan::combine(self.rows, width)?, &params)
    }
}
