//! Mixture of experts on the CPU.
//!
//! Rows are grouped by expert, so that an expert's weights are read once a step, and all experts of a layer share two
//! regions of products. Each choice keeps its own output row; the rows are then summed per token in ascending expert
//! order, which keeps the result independent of the grouping.

#![allow(unsafe_code)]

use engine_group::{Columns, ExpertOutputs};
use engine_model::{Choice, Gate, GateScratch, GatedMlp, Mlp, Model, Moe, Slot};

use super::exchange::bytes_of;
use super::{CpuBackend, StepError};
use crate::compute::{Area, Gated, Job, Shared, emptied};
use crate::kernels::{AddScaled, Rows};
use crate::pool::{WorkerPanic, current_thread};
use crate::weights::Weights;

/// Rows whose experts one task chooses.
const GATE_ROWS: usize = 16;

/// Chosen experts of a step, grouped by expert.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    /// `top_k` of each row.
    choices: Vec<Choice>,
    /// Rows, grouped by expert.
    rows: Vec<u32>,
    /// Of each choice: its index in `rows`.
    places: Vec<u32>,
    /// First index in `rows` of each expert, and the end.
    starts: Vec<u32>,
    /// While grouping: the next free index of each expert.
    next: Vec<u32>,
    /// Each thread's.
    scratch: Vec<GateScratch>,
}

impl Chosen {
    /// Room for steps of `tokens_max` tokens on so many threads.
    pub fn new(model: &Model, threads: usize, tokens_max: usize) -> Self {
        let gates = || {
            model.layers.iter().filter_map(|layer| match &layer.mlp {
                Mlp::Moe(moe) => Some(&moe.gate),
                Mlp::Dense(_) => None,
            })
        };
        let experts = gates().map(|gate| gate.experts).max().unwrap_or(0);
        let choices = gates().map(|gate| gate.top_k).max().unwrap_or(0) * tokens_max;
        let scratch = || {
            let mut scratch = GateScratch::default();
            for gate in gates() {
                // Choosing once makes room for choosing again.
                let mut scores = vec![0.0; gate.experts];
                let mut chosen = vec![Choice::default(); gate.top_k];
                gate.choose(&mut scores, None, &mut scratch, &mut chosen);
            }
            scratch
        };
        Self {
            choices: Vec::with_capacity(choices),
            rows: Vec::with_capacity(choices),
            places: Vec::with_capacity(choices),
            starts: Vec::with_capacity(experts + 1),
            next: Vec::with_capacity(experts + 1),
            scratch: std::iter::repeat_with(scratch).take(threads).collect(),
        }
    }
}

/// Where the experts of a layer work: after the scores, three parts (gate, up, product) of all inner values, then the
/// outputs. Choices come first, in the order of [`Chosen::rows`], the shared expert's rows last. Rows of experts that other
/// ranks hold stay as they are until the outputs.
#[derive(Clone, Copy)]
struct ExpertScratch {
    rows: usize,
    hidden: usize,
    /// Inner values of a routed expert.
    routed: usize,
    /// Values before the three parts.
    scores: usize,
    /// Values of the gate's part, and of the up's.
    part: usize,
    /// Values of the product's, which has all columns of the shared expert.
    products: usize,
    inner: Area,
    outputs: Area,
}

/// One expert's share of a step.
struct ExpertRun<'a> {
    mlp: &'a GatedMlp,
    /// Its rows; all of them when absent.
    rows: Option<&'a [u32]>,
    count: usize,
    inner: Area,
    product: Area,
    output: Area,
}

impl ExpertScratch {
    fn new(backend: &mut CpuBackend, moe: &Moe) -> Self {
        let rows = backend.rows();
        let routed = moe.experts.first().map_or(0, |mlp| mlp.inner);
        let scores = rows * moe.gate.experts;
        let shared = |width: fn(&GatedMlp) -> usize| moe.shared.as_ref().map_or(0, width);
        let part = rows * (moe.routed_width() + shared(|mlp| mlp.held));
        let products = rows * (moe.routed_width() + shared(|mlp| mlp.inner));
        let inner = Area::new(&mut backend.mlp, routed).skip(scores);
        Self {
            rows,
            hidden: backend.hidden,
            routed,
            scores,
            part,
            products,
            inner,
            outputs: inner.skip(2 * part + products).with_stride(backend.hidden),
        }
    }

    fn runs<'a>(self, moe: &'a Moe, chosen: &'a Chosen) -> impl Iterator<Item = ExpertRun<'a>> {
        let choices = self.rows * moe.gate.top_k;
        let routed = moe
            .experts
            .iter()
            .enumerate()
            .filter_map(move |(expert, mlp)| {
                let expert = moe.first_expert + expert;
                let [start, end] = [expert, expert + 1].map(|at| chosen.starts[at] as usize);
                (start < end).then(|| ExpertRun {
                    mlp,
                    rows: Some(&chosen.rows[start..end]),
                    count: end - start,
                    inner: self.inner.skip(start * self.routed),
                    product: self.inner.skip(2 * self.part + start * self.routed),
                    output: self.outputs.skip(start * self.hidden),
                })
            });
        let shared = moe.shared.iter().map(move |mlp| ExpertRun {
            mlp,
            rows: None,
            count: self.rows,
            inner: self.inner.skip(choices * self.routed).with_stride(mlp.held),
            product: self
                .inner
                .skip(2 * self.part + choices * self.routed)
                .with_stride(mlp.inner),
            output: self.outputs.skip(choices * self.hidden),
        });
        routed.chain(shared)
    }
}

/// Where an expert's gated values go, in the form that the last product reads.
fn inner_products(weights: &Weights, run: &ExpertRun<'_>) -> Area {
    if weights.is_packed(run.mlp.down) {
        run.product.rounded()
    } else {
        run.product
    }
}

impl CpuBackend {
    /// Chooses the experts of every row.
    pub(super) fn choose_experts(&mut self, gate: &Gate, from: Slot) -> Result<(), WorkerPanic> {
        let rows = self.rows();
        let input = self.wide(from);
        let scores = Area::new(&mut self.mlp, gate.experts);
        let matrix = self.weights.matrix(gate.weight);
        let job = Job::new(matrix, input, Rows::From(0), rows, scores);
        // SAFETY: from a slot to the head of the scratch.
        unsafe { self.compute.products(&[job])? };
        let choices = &mut self.chosen.choices;
        choices.clear();
        choices.resize(rows * gate.top_k, Choice::default());
        let choices = Shared(choices.as_mut_ptr());
        let bias = gate.bias.map(|bias| self.weights.precise(bias));
        let scratch = Shared(self.chosen.scratch.as_mut_ptr());
        let tasks = rows.div_ceil(GATE_ROWS);
        self.compute
            .region(tasks, rows * gate.experts * 32, &|task| {
                // SAFETY: each thread has its own scratch.
                let scratch = unsafe { &mut *scratch.at(current_thread()) };
                for row in task * GATE_ROWS..rows.min((task + 1) * GATE_ROWS) {
                    // SAFETY: each row has its own scores and choices.
                    let (scores, chosen) = unsafe {
                        (
                            std::slice::from_raw_parts_mut(scores.row(row), gate.experts),
                            std::slice::from_raw_parts_mut(
                                choices.at(row * gate.top_k),
                                gate.top_k,
                            ),
                        )
                    };
                    gate.choose(scores, bias, scratch, chosen);
                }
            })?;
        self.group(gate.experts, gate.top_k);
        Ok(())
    }

    /// `to = Σ weight · expert(from) + shared(from)`: two regions of products for all experts together.
    pub(super) fn run_experts(&mut self, moe: &Moe, from: Slot, to: Slot) -> Result<(), StepError> {
        // All routed experts are stored alike; the shared one may differ.
        let mut input = self.factors(from, &[])?;
        for mlp in moe.experts.first().into_iter().chain(&moe.shared) {
            input = self.factors(from, &[mlp.gate, mlp.up])?;
        }
        let out = self.fresh(to);
        let scratch = ExpertScratch::new(self, moe);
        let part = scratch.part;
        let weights = &self.weights;
        let mut gated = emptied(std::mem::take(&mut self.gated));
        gated.extend(scratch.runs(moe, &self.chosen).map(|run| {
            let rows = match run.rows {
                Some(rows) => Rows::Listed(rows),
                None => Rows::From(0),
            };
            let job = |weight, out| Job::new(weights.matrix(weight), input, rows, run.count, out);
            Gated {
                gate: job(run.mlp.gate, run.inner),
                up: job(run.mlp.up, run.inner.skip(part)),
                out: inner_products(weights, &run),
                skip: run.mlp.first,
            }
        }));
        // SAFETY: every expert's rows have their own place in the three parts of the scratch.
        let outcome = unsafe { self.compute.products(&gated) };
        self.gated = emptied(gated);
        outcome?;
        self.complete_products(moe, scratch)?;
        let scratch = ExpertScratch::new(self, moe);
        let weights = &self.weights;
        let mut jobs = emptied(std::mem::take(&mut self.jobs));
        jobs.extend(scratch.runs(moe, &self.chosen).map(|run| {
            let matrix = weights.matrix(run.mlp.down);
            let products = inner_products(weights, &run);
            let first = self.shares[run.mlp.down.index()].map_or(0, |share| share.first);
            let output = run.output.skip(first);
            Job::new(matrix, products, Rows::From(0), run.count, output)
        }));
        // SAFETY: as above, for the outputs.
        let outcome = unsafe { self.compute.products(&jobs) };
        self.jobs = emptied(jobs);
        outcome?;
        self.complete_outputs(moe, scratch)?;
        let outputs = ExpertScratch::new(self, moe).outputs;
        Ok(self.combine(moe, outputs, out)?)
    }

    /// Gets the other ranks' columns of what the shared expert multiplies next.
    fn complete_products(&mut self, moe: &Moe, scratch: ExpertScratch) -> Result<(), StepError> {
        let Some(shared) = moe.shared.as_ref().filter(|_| !self.rank.is_alone()) else {
            return Ok(());
        };
        let choices = scratch.rows * moe.gate.top_k;
        let skip = scratch.scores + 2 * scratch.part + choices * scratch.routed;
        let layout = self.product_columns(shared, scratch.rows, skip);
        self.group.all_gather(bytes_of(&mut self.mlp), &layout)?;
        Ok(())
    }

    /// Gets the outputs of the other ranks' experts.
    fn complete_outputs(&mut self, moe: &Moe, scratch: ExpertScratch) -> Result<(), StepError> {
        if self.rank.is_alone() {
            return Ok(());
        }
        let row_bytes = scratch.hidden * size_of::<f32>();
        let skip = (scratch.scores + 2 * scratch.part + scratch.products) * size_of::<f32>();
        let choices = scratch.rows * moe.gate.top_k;
        let layout = ExpertOutputs {
            rank: self.rank,
            starts: &self.chosen.starts,
            skip,
            row_bytes,
            shared: moe.shared.as_ref().map(|_| Columns {
                rank: self.rank,
                rows: scratch.rows,
                columns: scratch.hidden,
                unit: self.rank.row_unit(scratch.hidden),
                element: size_of::<f32>(),
                skip: skip + choices * row_bytes,
                stride: row_bytes,
            }),
        };
        self.group.all_gather(bytes_of(&mut self.mlp), &layout)?;
        Ok(())
    }

    /// Groups the choices by expert.
    fn group(&mut self, experts: usize, top_k: usize) {
        let Chosen {
            choices,
            rows,
            places,
            starts,
            next,
            scratch: _,
        } = &mut self.chosen;
        starts.clear();
        starts.resize(experts + 1, 0);
        for choice in choices.iter() {
            starts[choice.expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            starts[expert + 1] += starts[expert];
        }
        rows.clear();
        rows.resize(choices.len(), 0);
        places.clear();
        places.resize(choices.len(), 0);
        next.clone_from(starts);
        for (index, choice) in choices.iter().enumerate() {
            let place = &mut next[choice.expert as usize];
            rows[*place as usize] = (index / top_k) as u32;
            places[index] = *place;
            *place += 1;
        }
    }

    /// `to[row] = Σ weight * outputs[place] + outputs[shared]`.
    fn combine(&mut self, moe: &Moe, outputs: Area, to: Area) -> Result<(), WorkerPanic> {
        let rows = self.rows();
        let top_k = moe.gate.top_k;
        let hidden = self.hidden;
        let chosen = &self.chosen;
        let isa = self.compute.isa;
        let shared = moe.shared.is_some();
        let work = rows * (top_k + 1) * hidden;
        self.compute.region(rows, work, &|row| {
            // SAFETY: each task writes its own row; outputs are only read.
            unsafe {
                let sum = to.row(row);
                std::slice::from_raw_parts_mut(sum, hidden).fill(0.0);
                let add = |term: *const f32, factor: f32| {
                    isa.run(AddScaled {
                        sum,
                        term,
                        factor,
                        length: hidden,
                    });
                };
                for index in row * top_k..(row + 1) * top_k {
                    let place = chosen.places[index] as usize;
                    add(outputs.row(place), chosen.choices[index].weight);
                }
                if shared {
                    add(outputs.row(rows * top_k + row), 1.0);
                }
            }
        })
    }
}
