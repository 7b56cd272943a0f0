//! Attention over a bfloat16 cache: latent and grouped-query, one row or many.
//!
//! The queries that share keys and values - heads of one token, and of its neighbours in a prompt - are the lanes of one
//! panel (see [`super::panel`]). Keys come from the cache as they are, a row of pairs each; their products with the panel
//! are scores, position by position, each position's in all lanes. Probabilities, rounded to bfloat16 as the queries are
//! (DeepSeek-V3's `inference/model.py` casts both, too), are then the rows, and values, in pairs of positions, the panels
//! of a second product. So the cache is read once for all lanes.
//!
//! The softmax runs over chunks of [`CHUNK`] positions within a split of [`SPLIT`]; the splits of a context may be
//! computed by different threads and are merged from the first to the last.
//!
//! Invariant: a lane's result depends on its query, its context and the cached rows only. Chunks and splits begin at
//! multiples of their size, and positions beyond a lane's context, which its neighbours may have, have probability zero.

#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // as in the parent

use engine_core::BlockId;

use super::paired::PairedKernel;
use super::panel::{Multiply, Operands, Row, Shape};
use super::{CHUNK, exp};
use crate::lanes::{LANES, Lanes, PAIRED};
use crate::packed::PANEL;

/// Positions whose softmax is computed apart from what comes before: enough to be worth a task, few enough that a long
/// context occupies many threads.
pub(crate) const SPLIT: usize = 512;
const _: () = assert!(SPLIT.is_multiple_of(CHUNK));

/// Where keys and values are cached: position `p` is number `p % block_size` of block `blocks[p / block_size]`.
#[derive(Clone, Copy)]
pub(crate) struct Cached<'a> {
    /// First block's first key.
    pub start: *const u16,
    /// Of the sequence.
    pub blocks: &'a [BlockId],
    /// Positions of a block.
    pub block_size: usize,
    /// From a block to the next one, in elements.
    pub block_stride: usize,
    /// From a key to the next one of its block, in elements.
    pub key_stride: usize,
    /// From a key to its value, in elements.
    pub value_skip: usize,
    /// Elements of a key.
    pub key_width: usize,
    /// Elements of a value.
    pub value_width: usize,
}

/// One query: a head of a token. Its elements come in two parts, of [`Queries::first_width`] and what is left of a key.
#[derive(Clone, Copy)]
pub(crate) struct Query {
    /// First elements, rounded.
    pub first: *const u16,
    /// The others, rounded.
    pub second: *const u16,
    /// Positions it attends to: at least one.
    pub context: usize,
    /// Where its output goes: `value_width` values.
    pub out: *mut f32,
}

impl Default for Query {
    fn default() -> Self {
        Self {
            first: std::ptr::null(),
            second: std::ptr::null(),
            context: 0,
            out: std::ptr::null_mut(),
        }
    }
}

/// Queries over the same cached rows.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    pub cached: Cached<'a>,
    /// At most [`PANEL`].
    pub lanes: &'a [Query],
    /// Elements of the first part of a query.
    pub first_width: usize,
    /// Factor on scores.
    pub scale: f32,
}

impl Queries<'_> {
    /// Positions of the longest context.
    pub fn context(&self) -> usize {
        let contexts = self.lanes.iter().map(|query| query.context);
        contexts.max().unwrap_or(0)
    }

    /// Lanes of the panel: whole registers.
    fn width(&self) -> usize {
        self.lanes.len().next_multiple_of(LANES)
    }
}

/// Running softmax of each lane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    maxima: [f32; PANEL],
    totals: [f32; PANEL],
}

impl Default for Running {
    fn default() -> Self {
        Self {
            maxima: [f32::NEG_INFINITY; PANEL],
            totals: [0.0; PANEL],
        }
    }
}

/// Memory of one thread: see [`scratch_lines`].
struct Scratch {
    /// `[lane][pair]`, filled up to whole registers.
    rows: *mut u32,
    /// `[pair][lane]`.
    queries: *mut u32,
    /// `[position][lane]`.
    scores: *mut f32,
    /// `[pair of positions][lane]`.
    weights: *mut u32,
    /// `[pair of positions][column]` of one panel of values after the other.
    values: *mut u32,
    /// `[lane][column]`: what a split that is not a context's first one sums up.
    sums: *mut f32,
}

/// Sizes of [`Scratch`]'s parts, in values of four bytes.
fn parts(key_width: usize, value_width: usize) -> [usize; 6] {
    let pairs = key_width.next_multiple_of(PAIRED) / 2;
    [
        PANEL * pairs,
        PANEL * pairs,
        PANEL * CHUNK,
        PANEL * CHUNK / 2,
        // The last store of a row may reach beyond it.
        CHUNK / 2 * value_width + PANEL,
        PANEL * value_width,
    ]
    .map(|size| size.next_multiple_of(LANES))
}

/// Values of four bytes that a thread needs, from an address that a cache line begins at.
pub(crate) fn scratch_length(key_width: usize, value_width: usize) -> usize {
    parts(key_width, value_width).iter().sum()
}

impl Scratch {
    fn new(start: *mut u32, cached: &Cached<'_>) -> Self {
        let mut at = start;
        let [rows, queries, scores, weights, values, sums] =
            parts(cached.key_width, cached.value_width).map(|size| {
                let part = at;
                at = at.wrapping_add(size);
                part
            });
        Self {
            rows,
            queries,
            scores: scores.cast(),
            weights,
            values,
            sums: sums.cast(),
        }
    }
}

/// All splits of the queries' contexts, one after the other.
pub(crate) struct AttendAll<'a> {
    pub queries: Queries<'a>,
    /// [`scratch_length`] values.
    pub scratch: *mut u32,
}

impl PairedKernel for AttendAll<'_> {
    #[inline(always)]
    unsafe fn run<P: Multiply>(self) {
        let scratch = Scratch::new(self.scratch, &self.queries.cached);
        let width = self.queries.cached.value_width;
        let context = self.queries.context();
        let mut running = Running::default();
        unsafe {
            self.queries.pack::<P>(&scratch);
            for start in (0..context).step_by(SPLIT) {
                let is_first = start == 0;
                let mut split = Running::default();
                let out = if is_first { None } else { Some(scratch.sums) };
                self.queries
                    .split::<P>(start, context, &scratch, out, &mut split);
                if is_first {
                    running = split;
                } else {
                    merge::<P::Wide>(&self.queries, &mut running, &split, scratch.sums);
                }
            }
            finish::<P::Wide>(self.queries.lanes, &running, width);
        }
    }
}

/// One split of the queries' contexts.
pub(crate) struct AttendSplit<'a> {
    pub queries: Queries<'a>,
    /// First position: a multiple of [`SPLIT`].
    pub start: usize,
    /// [`scratch_length`] values.
    pub scratch: *mut u32,
    /// Room for a value of each lane.
    pub sums: *mut f32,
    pub running: *mut Running,
}

impl PairedKernel for AttendSplit<'_> {
    #[inline(always)]
    unsafe fn run<P: Multiply>(self) {
        let scratch = Scratch::new(self.scratch, &self.queries.cached);
        let mut running = Running::default();
        unsafe {
            self.queries.pack::<P>(&scratch);
            let context = self.queries.context();
            self.queries
                .split::<P>(self.start, context, &scratch, Some(self.sums), &mut running);
            self.running.write(running);
        }
    }
}

/// Merges splits, in order, into the queries' outputs.
pub(crate) struct MergeSplits<'a> {
    pub queries: Queries<'a>,
    /// Number of splits.
    pub count: usize,
    /// Of the first split; each next one's follow after `PANEL * value_width` values.
    pub sums: *mut f32,
    /// Of the first split; the next ones' follow.
    pub splits: *const Running,
    /// Of what was merged before.
    pub running: *mut Running,
    pub is_first: bool,
    pub is_last: bool,
}

impl PairedKernel for MergeSplits<'_> {
    #[inline(always)]
    unsafe fn run<P: Multiply>(self) {
        let width = self.queries.cached.value_width;
        unsafe {
            for index in 0..self.count {
                let sums = self.sums.add(index * PANEL * width);
                let split = &*self.splits.add(index);
                if self.is_first && index == 0 {
                    for (lane, query) in self.queries.lanes.iter().enumerate() {
                        std::ptr::copy_nonoverlapping(sums.add(lane * width), query.out, width);
                    }
                    self.running.write(*split);
                } else {
                    merge::<P::Wide>(&self.queries, &mut *self.running, split, sums);
                }
            }
            if self.is_last {
                finish::<P::Wide>(self.queries.lanes, &*self.running, width);
            }
        }
    }
}

/// Adds a split to what was merged before: both relative to the larger maximum.
#[inline(always)]
unsafe fn merge<L: Lanes>(
    queries: &Queries<'_>,
    running: &mut Running,
    split: &Running,
    sums: *const f32,
) {
    let width = queries.cached.value_width;
    unsafe {
        let (mut before, mut after) = ([0.0f32; PANEL], [0.0f32; PANEL]);
        for at in (0..queries.width()).step_by(LANES) {
            let old = L::load(running.maxima.as_ptr().add(at));
            let new = L::load(split.maxima.as_ptr().add(at));
            let highest = old.max(new);
            let (before_lanes, after_lanes) = (exp(old.sub(highest)), exp(new.sub(highest)));
            before_lanes.store(before.as_mut_ptr().add(at));
            after_lanes.store(after.as_mut_ptr().add(at));
            highest.store(running.maxima.as_mut_ptr().add(at));
            let totals = running.totals.as_mut_ptr().add(at);
            let added = L::load(split.totals.as_ptr().add(at)).mul(after_lanes);
            L::load(totals).mul_add(before_lanes, added).store(totals);
        }
        for (lane, query) in queries.lanes.iter().enumerate() {
            // A neighbour's context reaches further.
            if split.maxima[lane] == f32::NEG_INFINITY {
                continue;
            }
            let (before, after) = (L::splat(before[lane]), L::splat(after[lane]));
            let from = sums.add(lane * width);
            each!(width, |at, count| {
                let added: L = super::load::<L, f32>(from.add(at), count).mul(after);
                let old: L = super::load(query.out.add(at).cast_const(), count);
                super::store(old.mul_add(before, added), query.out.add(at), count);
            });
        }
    }
}

/// Divides every output by its total.
#[inline(always)]
unsafe fn finish<L: Lanes>(lanes: &[Query], running: &Running, width: usize) {
    unsafe {
        for (query, total) in lanes.iter().zip(running.totals) {
            let inverse = L::splat(1.0 / total);
            each!(width, |at, count| {
                let sum: L = super::load(query.out.add(at).cast_const(), count);
                super::store(sum.mul(inverse), query.out.add(at), count);
            });
        }
    }
}

/// A chunk's positions: where their keys are, the last of them repeated.
struct Keys {
    at: [*const u16; CHUNK],
    count: usize,
}

impl Queries<'_> {
    /// Lays the queries out as a panel.
    #[inline(always)]
    unsafe fn pack<P: Multiply>(&self, scratch: &Scratch) {
        let width = self.width();
        let key_width = self.cached.key_width;
        let stride = key_width.next_multiple_of(PAIRED) / 2;
        unsafe {
            std::ptr::write_bytes(scratch.rows, 0, width * stride);
            for (lane, query) in self.lanes.iter().enumerate() {
                let row = scratch.rows.add(lane * stride).cast::<u16>();
                let second = key_width - self.first_width;
                std::ptr::copy_nonoverlapping(query.first, row, self.first_width);
                std::ptr::copy_nonoverlapping(query.second, row.add(self.first_width), second);
            }
            for lane in (0..width).step_by(LANES) {
                for pair in (0..stride).step_by(LANES) {
                    let from = scratch.rows.add(lane * stride + pair);
                    let to = scratch.queries.add(pair * width + lane);
                    P::transpose(from, stride, to, width);
                }
            }
        }
    }

    /// Attends to positions from `start` to the end of its split; sums go to the lanes' outputs or to `sums`.
    #[inline(always)]
    unsafe fn split<P: Multiply>(
        &self,
        start: usize,
        context: usize,
        scratch: &Scratch,
        sums: Option<*mut f32>,
        running: &mut Running,
    ) {
        let end = context.min(start + SPLIT);
        let mut keys = self.keys(start, context);
        for first in (start..end).step_by(CHUNK) {
            // The next split's where this one ends.
            let next = (first + CHUNK < context).then(|| self.keys(first + CHUNK, context));
            unsafe {
                self.scores::<P>(&keys, next.as_ref(), scratch);
                let mut rescale = [0.0f32; PANEL];
                self.softmax::<P>(first, keys.count, scratch, running, &mut rescale);
                self.add_values::<P>(&keys, scratch, sums, (first > start).then_some(&rescale));
            }
            if let Some(next) = next {
                keys = next;
            }
        }
    }

    /// The keys from `first` on, up to a chunk's end or the context's.
    #[inline(always)]
    fn keys(&self, first: usize, context: usize) -> Keys {
        let cached = &self.cached;
        let count = CHUNK.min(context - first);
        let mut keys = [std::ptr::null(); CHUNK];
        let (mut block, mut place) = (first / cached.block_size, first % cached.block_size);
        let start = |block: usize| cached.blocks[block].index() * cached.block_stride;
        let mut offset = start(block);
        let mut last = std::ptr::null();
        for (at, key) in keys.iter_mut().enumerate() {
            if at < count {
                if place == cached.block_size {
                    (block, place) = (block + 1, 0);
                    offset = start(block);
                }
                last = cached
                    .start
                    .wrapping_add(offset + place * cached.key_stride);
                place += 1;
            }
            *key = last;
        }
        Keys { at: keys, count }
    }

    #[inline(always)]
    unsafe fn scores<P: Multiply>(&self, keys: &Keys, next: Option<&Keys>, scratch: &Scratch) {
        let width = self.width();
        let operands = Scores {
            keys,
            next: next.unwrap_or(keys),
            scores: scratch.scores,
            width,
        };
        let shape = Shape {
            count: keys.count,
            step: 1,
            length: self.cached.key_width,
            width,
            adds: false,
        };
        unsafe { P::multiply(&operands, scratch.queries, shape) };
    }

    /// Turns a chunk's scores into weights relative to the running maxima, rounded in pairs of positions; `rescale` is
    /// the factor for what was summed before.
    #[inline(always)]
    unsafe fn softmax<P: Multiply>(
        &self,
        first: usize,
        count: usize,
        scratch: &Scratch,
        running: &mut Running,
        rescale: &mut [f32; PANEL],
    ) {
        let width = self.width();
        unsafe {
            self.beyond(first, count, scratch, f32::NEG_INFINITY);
            let scale = P::Wide::splat(self.scale);
            for at in (0..width).step_by(LANES) {
                let scores = scratch.scores.add(at);
                let maxima = running.maxima.as_mut_ptr().add(at);
                let old = P::Wide::load(maxima);
                let mut highest = old;
                for position in 0..count {
                    let score = scores.add(position * width);
                    let scaled = P::Wide::load(score).mul(scale);
                    // A NaN is never the larger one; its own exponential stays NaN and reaches the logits all the same.
                    highest = highest.max(scaled);
                    scaled.store(score);
                }
                highest.store(maxima);
                // A lane without any position yet has no maximum: any finite one will do.
                let base = highest.max(P::Wide::splat(f32::MIN));
                exp(old.sub(base)).store(rescale.as_mut_ptr().add(at));
                for position in 0..count {
                    let score = scores.add(position * width);
                    exp(P::Wide::load(score).sub(base)).store(score);
                }
            }
            // The clamped exponential of an unused position is tiny, not zero.
            self.beyond(first, count, scratch, 0.0);
            let zero = P::Wide::splat(0.0);
            for at in (0..width).step_by(LANES) {
                let scores = scratch.scores.add(at);
                let mut sum = zero;
                for position in (0..count).step_by(2) {
                    let one = P::Wide::load(scores.add(position * width));
                    let two = if position + 1 < count {
                        P::Wide::load(scores.add((position + 1) * width))
                    } else {
                        zero
                    };
                    sum = sum.add(one).add(two);
                    let to = scratch.weights.add(position / 2 * width + at);
                    P::store(P::round_pairs(one, two), to);
                }
                let totals = running.totals.as_mut_ptr().add(at);
                let factors = P::Wide::load(rescale.as_ptr().add(at));
                P::Wide::load(totals).mul_add(factors, sum).store(totals);
            }
        }
    }

    /// Overwrites the scores of positions that are in the chunk but not in a lane's context.
    #[inline(always)]
    unsafe fn beyond(&self, first: usize, count: usize, scratch: &Scratch, value: f32) {
        let width = self.width();
        for (lane, query) in self.lanes.iter().enumerate() {
            for position in query.context.saturating_sub(first)..count {
                unsafe { scratch.scores.add(position * width + lane).write(value) };
            }
        }
    }

    /// Adds the chunk's values, each times its weight.
    #[inline(always)]
    unsafe fn add_values<P: Multiply>(
        &self,
        keys: &Keys,
        scratch: &Scratch,
        sums: Option<*mut f32>,
        before: Option<&[f32; PANEL]>,
    ) {
        let value_width = self.cached.value_width;
        let pairs = keys.count.div_ceil(2);
        for first in (0..value_width).step_by(PANEL) {
            let columns = PANEL.min(value_width - first);
            let panel = scratch.values.wrapping_add(first * CHUNK / 2);
            let operands = Values {
                queries: self,
                weights: scratch.weights,
                sums,
                first,
                before,
            };
            let shape = Shape {
                count: self.lanes.len(),
                step: self.width(),
                length: 2 * pairs,
                width: columns,
                adds: before.is_some(),
            };
            unsafe {
                self.pack_values::<P>(keys, first, columns, panel);
                P::multiply(&operands, panel, shape);
            }
        }
    }

    /// Lays some columns of the chunk's values out as a panel.
    #[inline(always)]
    unsafe fn pack_values<P: Multiply>(
        &self,
        keys: &Keys,
        first: usize,
        columns: usize,
        panel: *mut u32,
    ) {
        let skip = self.cached.value_skip + first;
        for position in (0..keys.count).step_by(2) {
            // Beyond the count the last position is repeated; its weight is zero.
            let [one, two] = [position, position + 1].map(|at| keys.at[at].wrapping_add(skip));
            let to = panel.wrapping_add(position / 2 * columns);
            for at in (0..columns).step_by(PAIRED) {
                unsafe {
                    let pair = if at + PAIRED <= columns {
                        P::interleave(P::load(one.add(at)), P::load(two.add(at)))
                    } else {
                        let count = columns - at;
                        P::interleave(
                            P::load_part(one.add(at), count),
                            P::load_part(two.add(at), count),
                        )
                    };
                    // What reaches beyond the columns is overwritten by the next pair of positions.
                    P::store(pair[0], to.add(at));
                    P::store(pair[1], to.add(at + LANES));
                }
            }
        }
    }
}

/// Keys by queries.
struct Scores<'a> {
    keys: &'a Keys,
    /// The next chunk's; meanwhile they come in.
    next: &'a Keys,
    scores: *mut f32,
    width: usize,
}

impl Operands for Scores<'_> {
    fn gather(&self, first: usize, rows: &mut [Row]) {
        for (row, position) in rows.iter_mut().zip(first..) {
            row.from = self.keys.at[position].cast();
            row.out = self.scores.wrapping_add(position * self.width);
        }
    }

    fn ahead(&self, index: usize) -> Option<*const u32> {
        Some(self.next.at[index].cast())
    }
}

/// Weights by values.
struct Values<'a> {
    queries: &'a Queries<'a>,
    weights: *const u32,
    sums: Option<*mut f32>,
    first: usize,
    before: Option<&'a [f32; PANEL]>,
}

impl Operands for Values<'_> {
    fn gather(&self, first: usize, rows: &mut [Row]) {
        for (row, lane) in rows.iter_mut().zip(first..) {
            let start = match self.sums {
                Some(sums) => sums.wrapping_add(lane * self.queries.cached.value_width),
                None => self.queries.lanes[lane].out,
            };
            row.from = self.weights.wrapping_add(lane);
            row.out = start.wrapping_add(self.first);
            row.before = self.before.map_or(1.0, |factors| factors[lane]);
        }
    }
}
