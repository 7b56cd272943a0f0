//! The Hopper products against the portable ones, on the device at hand.
//!
//! Operands are small whole numbers, whose sums are exact in any order: every bit must agree, so a misread layout, swizzle
//! or descriptor cannot hide in a tolerance. Then fractions: a row must have the same bits in every tile, alone and in
//! company, summed by one block or by several, because batch invariance rests on it.

use std::sync::Arc;

use kernels::driver::{Arena, Device, Part, Plain, Stream};
use kernels::params::{Address, GemmParams, HopperGemmParams, TensorShape};
use kernels::plan::{self, Format, HOPPER_PARTIAL_BYTES, HOPPER_TICKET_BYTES, QUANT_GROUP};

use crate::{CudaError, trial};

/// Of the weights: two blocks of columns, the second one not whole; two slices of k and a tail.
const N: usize = 136;
const K: usize = 1104;
const EXPERTS: usize = 2;
/// Rows of the activations, and as many as each tile is chosen for.
const ROWS: usize = 70;
const COUNTS: [usize; 4] = [1, 20, 40, ROWS];
/// Sorted rows of the two experts.
const GROUPED_ROWS: usize = 20;
const OFFSETS: [i32; EXPERTS + 1] = [0, 13, 20];
/// Tiles of 16 of them where `permute` puts them.
const TILES: [i32; 6] = [0, 0, 1, 13, -1, 0];

/// Values of operands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Values {
    Whole,
    Fractions,
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// -2, -1, 0, 1, 2, or anything between -2 and 2, as bf16.
    fn bf16(&mut self, values: Values) -> u16 {
        const WHOLE: [u16; 5] = [0xc000, 0xbf80, 0, 0x3f80, 0x4000];
        let bits = self.next();
        match values {
            Values::Whole => WHOLE[(bits % 5) as usize],
            // Exponents of 2^-4 to 1.
            Values::Fractions => {
                (bits as u16 & 0x807f) | (0x3d80 + ((bits >> 32) % 5) as u16 * 0x80)
            }
        }
    }

    /// The same as e4m3.
    fn e4m3(&mut self, values: Values) -> u8 {
        const WHOLE: [u8; 5] = [0xc0, 0xb8, 0, 0x38, 0x40];
        let bits = self.next();
        match values {
            Values::Whole => WHOLE[(bits % 5) as usize],
            Values::Fractions => (bits as u8 & 0x87) | (0x18 + ((bits >> 32) % 5) as u8 * 8),
        }
    }

    /// A power of two, or anything near 1.
    fn scale(&mut self, values: Values) -> f32 {
        let bits = self.next();
        match values {
            Values::Whole => [0.5, 1.0, 2.0][(bits % 3) as usize],
            Values::Fractions => 0.5 + (bits % 1000) as f32 / 1000.0,
        }
    }
}

/// Everything on the device.
struct Bench {
    arena: Arena,
    stream: Stream,
    format: Format,
    a: Part,
    b: Part,
    a_scales: Part,
    b_scales: Part,
    c: Part,
    partial: Part,
    tickets: Part,
    tiles: Part,
    offsets: Part,
}

const K_BLOCKS: usize = K.div_ceil(QUANT_GROUP);
const N_BLOCKS: usize = N.div_ceil(QUANT_GROUP);

impl Bench {
    fn new(device: &Arc<Device>, format: Format, values: Values) -> Result<Self, CudaError> {
        let sizes = [
            ROWS * K * format.bytes(),
            EXPERTS * N * K * format.bytes(),
            ROWS * K_BLOCKS * 4,
            EXPERTS * N_BLOCKS * K_BLOCKS * 4,
            ROWS * N * 4,
            HOPPER_PARTIAL_BYTES,
            HOPPER_TICKET_BYTES,
            size_of_val(&TILES),
            size_of_val(&OFFSETS),
        ];
        let aligned = sizes.map(|bytes| bytes.next_multiple_of(256));
        let arena = Arena::new(device, aligned.iter().sum())?;
        let mut at = 0;
        let mut parts = [Part::default(); 9];
        for (part, bytes) in parts.iter_mut().zip(aligned) {
            *part = arena.part(at, bytes)?;
            at += bytes;
        }
        let [
            a,
            b,
            a_scales,
            b_scales,
            c,
            partial,
            tickets,
            tiles,
            offsets,
        ] = parts;
        let stream = device.stream()?;
        let bench = Self {
            arena,
            stream,
            format,
            a,
            b,
            a_scales,
            b_scales,
            c,
            partial,
            tickets,
            tiles,
            offsets,
        };
        bench.fill(values)?;
        Ok(bench)
    }

    fn fill(&self, values: Values) -> Result<(), CudaError> {
        let mut random = Random(7);
        for (part, count) in [(self.a, ROWS * K), (self.b, EXPERTS * N * K)] {
            match self.format {
                Format::Bf16 => self.write(part, count, || random.bf16(values))?,
                Format::Fp8 => self.write(part, count, || random.e4m3(values))?,
            }
        }
        let scales = EXPERTS * N_BLOCKS * K_BLOCKS;
        self.write(self.a_scales, ROWS * K_BLOCKS, || random.scale(values))?;
        self.write(self.b_scales, scales, || random.scale(values))?;
        self.arena.fill(&self.stream, self.tickets, 0)?;
        self.arena.write(&self.stream, self.tiles, &TILES)?;
        self.arena.write(&self.stream, self.offsets, &OFFSETS)?;
        Ok(())
    }

    fn write<T: Plain>(
        &self,
        part: Part,
        count: usize,
        mut value: impl FnMut() -> T,
    ) -> Result<(), CudaError> {
        let values: Vec<T> = (0..count).map(|_| value()).collect();
        Ok(self.arena.write(&self.stream, part, &values)?)
    }

    /// Poison, so that what a launch does not write is noticed.
    fn poison(&self) -> Result<(), CudaError> {
        Ok(self.arena.fill(&self.stream, self.c, 0xff)?)
    }

    fn read(&self, rows: usize) -> Result<Vec<u32>, CudaError> {
        trial::end(&self.stream, "a trial of Hopper's products")?;
        let mut bits = vec![0u32; rows * N];
        self.arena.read(&self.stream, self.c, &mut bits)?;
        Ok(bits)
    }

    fn portable(&self, rows: usize, grouped: bool) -> Result<Vec<u32>, CudaError> {
        self.poison()?;
        let given = |part: Part| {
            if grouped {
                part.address()
            } else {
                Address::NULL
            }
        };
        let params = GemmParams {
            a: self.a.address(),
            b: self.b.address(),
            c: self.c.address(),
            a_scales: self.a_scales.address(),
            b_scales: self.b_scales.address(),
            tiles: given(self.tiles),
            offsets: given(self.offsets),
            b_batch: (N * K) as i64,
            b_scales_batch: (N_BLOCKS * K_BLOCKS) as i64,
            m: rows as i32,
            n: N as i32,
            k: K as i32,
            lda: K as i32,
            ldb: K as i32,
            ldc: N as i32,
            a_scales_stride: K_BLOCKS as i32,
            b_scales_stride: K_BLOCKS as i32,
            c_is_float32: 1,
            ..GemmParams::default()
        };
        let launch = if grouped {
            plan::grouped_gemm(self.format, rows, N, K, EXPERTS)?
        } else {
            plan::gemm(self.format, rows, N, K, 1)?
        };
        self.arena.launch(&self.stream, &launch, &params)?;
        self.read(rows)
    }

    fn hopper(&self, rows: usize, room: usize, grouped: bool) -> Result<Vec<u32>, CudaError> {
        self.poison()?;
        let plan = if grouped {
            plan::hopper_grouped_gemm(self.format, rows, N, K, EXPERTS)?
        } else {
            plan::hopper_gemm(self.format, rows, N, K, 1, room)?
        };
        let given = |wanted: bool, part: Part| {
            if wanted {
                part.address()
            } else {
                Address::NULL
            }
        };
        let weights = TensorShape::weights(self.format, self.b.address(), N, K, EXPERTS);
        let activations =
            TensorShape::rows(self.format, self.a.address(), ROWS, K, K, plan.tile_rows);
        let params = HopperGemmParams {
            b_map: self.arena.tensor_map(&weights)?,
            a_map: self.arena.tensor_map(&activations)?,
            c: self.c.address(),
            a_scales: self.a_scales.address(),
            b_scales: self.b_scales.address(),
            tiles: given(grouped, self.tiles),
            offsets: given(grouped, self.offsets),
            partial: given(plan.partial_bytes > 0, self.partial),
            tickets: self.tickets.address(),
            b_scales_batch: (N_BLOCKS * K_BLOCKS) as i64,
            m: rows as i32,
            n: N as i32,
            k: K as i32,
            ldc: N as i32,
            a_scales_stride: K_BLOCKS as i32,
            b_scales_stride: K_BLOCKS as i32,
            c_is_float32: 1,
            row_tiles: plan.row_tiles as i32,
            slices: plan.slices as i32,
            slice_blocks: plan.slice_blocks as i32,
            ..HopperGemmParams::default()
        };
        self.arena.launch(&self.stream, &plan.launch, &params)?;
        self.read(rows)
    }
}

fn same(what: String, found: &[u32], wanted: &[u32]) -> Result<(), CudaError> {
    let differ = found.iter().zip(wanted).position(|(f, w)| f != w);
    match differ {
        None => Ok(()),
        Some(at) => Err(CudaError::Products(format!(
            "Hopper's products of {what} differ at row {}, column {}: {} instead of {}",
            at / N,
            at % N,
            f32::from_bits(found[at]),
            f32::from_bits(wanted[at]),
        ))),
    }
}

/// # Errors
/// They differ, or the device failed at one of them, or one of them does not end.
pub(super) fn run(device: &Arc<Device>) -> Result<(), CudaError> {
    for format in [Format::Bf16, Format::Fp8] {
        let whole = Bench::new(device, format, Values::Whole)?;
        let alike = Bench::new(device, format, Values::Fractions)?;
        let outcome = compare(&whole, &alike, format);
        trial::leave((whole, alike, device.clone()), &outcome);
        outcome?;
    }
    Ok(())
}

fn compare(whole: &Bench, alike: &Bench, format: Format) -> Result<(), CudaError> {
    let wanted = whole.portable(ROWS, false)?;
    let company = alike.hopper(ROWS, 0, false)?;
    for rows in COUNTS {
        for room in [0, HOPPER_PARTIAL_BYTES] {
            let what = format!("{rows} rows of {format:?}, room {room},");
            let found = whole.hopper(rows, room, false)?;
            same(format!("{what} in whole numbers"), &found, &wanted)?;
            let found = alike.hopper(rows, room, false)?;
            same(format!("{what} and of {ROWS}"), &found, &company)?;
        }
    }
    let wanted = whole.portable(GROUPED_ROWS, true)?;
    let found = whole.hopper(GROUPED_ROWS, 0, true)?;
    same(format!("experts in {format:?}"), &found, &wanted)
}
