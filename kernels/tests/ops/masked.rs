//! The grouped product over experts that own a fixed number of rows each and use some of them: the masked layout, with the
//! kernels of the contiguous one.

use half::bf16;
use kernels::params::{Address, GemmParams, HopperGemmParams, TensorShape};
use kernels::plan::{self, Format};

use crate::gemms::{Operands, check};
use crate::harness::{Lab, on_every_schedule};

/// Rows of `[experts, capacity]`, of which each expert uses its first ones. The rest is NaN.
struct Masked {
    capacity: usize,
    counts: Vec<usize>,
    n: usize,
    rows: Operands,
    matrices: Vec<Operands>,
}

impl Masked {
    fn new(lab: &mut Lab, format: Format, capacity: usize, counts: &[usize]) -> Self {
        // Neither n nor k is a multiple of a tile.
        let (n, k) = (72, 208);
        let mut rows = Operands::new(lab, format, counts.len() * capacity, k, 0, 1);
        let k_blocks = k.div_ceil(128);
        for (expert, count) in counts.iter().enumerate() {
            let unused = expert * capacity + count..(expert + 1) * capacity;
            match format {
                Format::Bf16 => rows.bf16s[unused.start * k..unused.end * k].fill(bf16::NAN),
                Format::Fp8 => {
                    rows.codes[unused.start * k..unused.end * k].fill(0x7f);
                    rows.scales[unused.start * k_blocks..unused.end * k_blocks].fill(f32::NAN);
                }
            }
        }
        Self {
            capacity,
            counts: counts.to_vec(),
            n,
            rows,
            matrices: (0..counts.len())
                .map(|_| Operands::new(lab, format, n, k, 0, 128))
                .collect(),
        }
    }

    fn experts(&self) -> usize {
        self.counts.len()
    }

    fn all_rows(&self) -> usize {
        self.experts() * self.capacity
    }

    /// `(expert, first row)` of every tile that has a row, each expert's from a fixed place of the list on, holes elsewhere.
    fn tiles(&self, tile_rows: usize, length: usize) -> Vec<i32> {
        let each = self.capacity.div_ceil(tile_rows);
        let mut tiles = vec![-1; 2 * length];
        for (expert, count) in self.counts.iter().enumerate() {
            for i in 0..count.div_ceil(tile_rows) {
                let first = expert * self.capacity + i * tile_rows;
                let at = 2 * (expert * each + i);
                tiles[at..at + 2].copy_from_slice(&[expert as i32, first as i32]);
            }
        }
        tiles
    }

    /// Where each expert's rows end, where the contiguous layout has the first row of the next.
    fn offsets(&self) -> Vec<i32> {
        let ends = self.counts.iter().enumerate();
        let ends = ends.map(|(expert, count)| (expert * self.capacity + count) as i32);
        std::iter::once(0).chain(ends).collect()
    }

    /// What the portable kernels leave: `[experts * capacity, n]`.
    fn portable(&self, lab: &Lab) -> Vec<f32> {
        let (format, n, k, rows) = (self.rows.format, self.n, self.rows.k, self.all_rows());
        let tile_rows = plan::grouped_tile_rows(rows, self.experts());
        let tiles = self.tiles(tile_rows, plan::grouped_tiles(rows, self.experts()));
        let (d_a, d_a_scales) = self.rows.upload(lab);
        let (d_b, d_b_scales) = Operands::stacked(&self.matrices).upload(lab);
        let (d_tiles, d_offsets) = (lab.upload(&tiles), lab.upload(&self.offsets()));
        let c = lab.poisoned(rows * n * 4);
        let k_blocks = k.div_ceil(128);
        lab.run(
            &plan::grouped_gemm(format, rows, n, k, self.experts()).expect("a plan"),
            &GemmParams {
                a: d_a.address(),
                b: d_b.address(),
                c: c.address(),
                a_scales: d_a_scales.address(),
                b_scales: d_b_scales.address(),
                a_rows: Address::NULL,
                tiles: d_tiles.address(),
                offsets: d_offsets.address(),
                b_batch: (n * k) as i64,
                b_scales_batch: (n.div_ceil(128) * k_blocks) as i64,
                m: rows as i32,
                n: n as i32,
                k: k as i32,
                lda: k as i32,
                ldb: k as i32,
                ldc: n as i32,
                a_scales_stride: k_blocks as i32,
                b_scales_stride: k_blocks as i32,
                c_is_float32: 1,
                ..GemmParams::default()
            },
        );
        lab.read(&c, rows * n)
    }

    /// What Hopper's leave.
    fn hopper(&self, lab: &Lab) -> Vec<f32> {
        let (format, n, k, rows) = (self.rows.format, self.n, self.rows.k, self.all_rows());
        let experts = self.experts();
        let plan = plan::hopper_grouped_gemm(format, rows, n, k, experts).expect("a plan");
        let tiles = self.tiles(plan.tile_rows, plan.row_tiles);
        let (d_a, d_a_scales) = self.rows.upload(lab);
        let (d_b, d_b_scales) = Operands::stacked(&self.matrices).upload(lab);
        let (d_tiles, d_offsets) = (lab.upload(&tiles), lab.upload(&self.offsets()));
        let c = lab.poisoned(rows * n * 4);
        let map = |shape| lab.device.tensor_map(&shape).expect("a map");
        let of_rows = TensorShape::rows(format, d_a.address(), rows, k, k, plan.tile_rows);
        let k_blocks = k.div_ceil(128);
        lab.run(
            &plan.launch,
            &HopperGemmParams {
                b_map: map(TensorShape::weights(format, d_b.address(), n, k, experts)),
                a_map: map(of_rows),
                c: c.address(),
                a_scales: d_a_scales.address(),
                b_scales: d_b_scales.address(),
                a_rows: Address::NULL,
                tiles: d_tiles.address(),
                offsets: d_offsets.address(),
                b_scales_batch: (n.div_ceil(128) * k_blocks) as i64,
                m: rows as i32,
                n: n as i32,
                k: k as i32,
                ldc: n as i32,
                a_scales_stride: k_blocks as i32,
                b_scales_stride: k_blocks as i32,
                row_tiles: plan.row_tiles as i32,
                slices: plan.slices as i32,
                slice_blocks: plan.slice_blocks as i32,
                c_is_float32: 1,
                ..HopperGemmParams::default()
            },
        );
        lab.read(&c, rows * n)
    }

    /// Rows in use are their expert's, and all others as they were, to the bit: a product of unused rows is another NaN.
    fn check(&self, what: &str, got: &[f32]) {
        let (capacity, n) = (self.capacity, self.n);
        for (expert, (count, matrix)) in self.counts.iter().zip(&self.matrices).enumerate() {
            let first = expert * capacity;
            let of_expert = &got[first * n..(first + capacity) * n];
            let what = format!("{what}, expert {expert} of {:?}", self.counts);
            let wide: Vec<f64> = of_expert.iter().map(|v| f64::from(*v)).collect();
            check(
                &what, &wide, &self.rows, matrix, first, 0, *count, n, n, true,
            );
            let mut unused = of_expert[count * n..].iter();
            assert!(
                unused.all(|v| v.to_bits() == u32::MAX),
                "{what}: past its rows"
            );
        }
    }
}

/// Capacities that ask for every tile of either kernel, that are whole tiles and that are not, so that an expert's last tile
/// reaches over the next one's rows; experts that are empty, full, and alone.
fn cases(lab: &mut Lab) -> Vec<(usize, Vec<usize>)> {
    let mut cases = Vec::new();
    for capacity in [16, 13, 30, 64, 70, 130] {
        cases.push((capacity, vec![1, 0, capacity, 0, capacity - 1]));
        cases.push((capacity, vec![0, 0, capacity]));
        let any = |_| lab.random.below(capacity + 1);
        cases.push((capacity, (0..4).map(any).collect()));
    }
    cases.push((64, vec![0; 3]));
    cases
}

#[test]
fn a_masked_product_multiplies_the_rows_in_use_alone() {
    on_every_schedule("masked", |lab| {
        for format in [Format::Bf16, Format::Fp8] {
            for (capacity, counts) in cases(lab) {
                let masked = Masked::new(lab, format, capacity, &counts);
                let what = format!("{format:?}, {capacity} rows each");
                masked.check(&what, &masked.portable(lab));
            }
        }
    });
}

#[test]
fn a_masked_product_on_hopper_multiplies_the_rows_in_use_alone() {
    on_every_schedule("hopper masked", |lab| {
        if lab.device.capability().0 != 9 {
            return;
        }
        for format in [Format::Bf16, Format::Fp8] {
            for (capacity, counts) in cases(lab) {
                let masked = Masked::new(lab, format, capacity, &counts);
                let what = format!("{format:?}, {capacity} rows each");
                masked.check(&what, &masked.hopper(lab));
            }
        }
    });
}
