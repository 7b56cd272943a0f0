//! Which Hopper product for a shape.
//!
//! Invariant: where k is cut into slices depends on k and the whole matrix' n alone, so a row's bits are the same for any
//! number of rows, any tile, any place for partial sums and any number of ranks that share the matrix. These only decide
//! how many blocks share the work.

use std::fmt;

use super::{Format, GRID_YZ_MAX, Launch, QUANT_GROUP, Unsupported, check, rows_check};

/// Columns of c that a block owns.
pub const HOPPER_COLUMNS: usize = 128;
/// Rows of activations that a block may own, and the shared memory of each.
const TILES: [(usize, u32); 4] = [(16, 101_376), (32, 100_352), (64, 108_544), (128, 201_728)];
/// Kernels by format and tile.
const KERNELS: [[&str; 4]; 2] = [
    [
        "hopper_gemm_bf16_16",
        "hopper_gemm_bf16_32",
        "hopper_gemm_bf16_64",
        "hopper_gemm_bf16_128",
    ],
    [
        "hopper_gemm_fp8_16",
        "hopper_gemm_fp8_32",
        "hopper_gemm_fp8_64",
        "hopper_gemm_fp8_128",
    ],
];
/// Multiprocessors of an H100 SXM and an H200: with fewer blocks some of the memory's bandwidth is not asked for.
const PROCESSORS: usize = 132;
/// Slices of k at most, and blocks of 128 in one at least: below, a slice is shorter than its pipeline.
const SLICES_MAX: usize = 16;
const SLICE_BLOCKS_MIN: usize = 4;
/// Blocks that share slices at most. More fill the device without sharing.
const SHARING_BLOCKS_MAX: usize = 2 * PROCESSORS;
/// The most that a plan asks for partial sums.
pub const HOPPER_PARTIAL_BYTES: usize = SHARING_BLOCKS_MAX * HOPPER_COLUMNS * 128 * 4;
/// The most that a plan asks for tickets.
pub const HOPPER_TICKET_BYTES: usize = SHARING_BLOCKS_MAX * 4;

/// A launch and the numbers of its argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HopperPlan {
    /// Kernel, grid and shared memory.
    pub launch: Launch,
    /// Rows of a tile: of the box of the activations' map, and what [`super::permute`] is asked with.
    pub tile_rows: usize,
    /// Tiles of rows.
    pub row_tiles: usize,
    /// Slices of k.
    pub slices: usize,
    /// Blocks of 128 of k in a slice; the last one may have fewer.
    pub slice_blocks: usize,
    /// For partial sums, when slices are summed by blocks of their own.
    pub partial_bytes: usize,
}

impl fmt::Display for HopperPlan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            launch,
            slices,
            slice_blocks,
            partial_bytes,
            ..
        } = self;
        write!(formatter, "{launch}, {slices} x {slice_blocks} blocks of k")?;
        match partial_bytes {
            0 => Ok(()),
            bytes => write!(formatter, " in {bytes} bytes"),
        }
    }
}

const fn of_format(format: Format) -> (usize, u32) {
    match format {
        Format::Bf16 => (0, 288),
        Format::Fp8 => (1, 320),
    }
}

fn kernel(format: Format, tile: usize, grid: [u32; 3]) -> Launch {
    let (index, threads) = of_format(format);
    Launch {
        kernel: KERNELS[index][tile],
        grid,
        threads,
        shared_bytes: TILES[tile].1,
    }
}

/// Every kernel of a format, to load before a graph is recorded.
pub fn hopper_kernels(format: Format) -> [Launch; 4] {
    [0, 1, 2, 3].map(|tile| kernel(format, tile, [1; 3]))
}

/// The smallest tile that holds `rows`, or the largest.
fn tile_of(rows: usize) -> usize {
    let fits = |(tile_rows, _): &(usize, u32)| rows <= *tile_rows;
    TILES.iter().position(fits).unwrap_or(TILES.len() - 1)
}

/// Slices of k and blocks of 128 in one.
fn slices(n: usize, k: usize) -> (usize, usize) {
    let blocks = k.div_ceil(QUANT_GROUP);
    let wanted = PROCESSORS.div_ceil(n.div_ceil(HOPPER_COLUMNS));
    let most = (blocks / SLICE_BLOCKS_MIN).clamp(1, SLICES_MAX);
    let slice = blocks.div_ceil(wanted.min(most));
    (blocks.div_ceil(slice), slice)
}

fn shape_check(
    operation: &'static str,
    format: Format,
    rows: usize,
    n: usize,
    k: usize,
) -> Result<(), Unsupported> {
    rows_check(operation, "rows", rows)?;
    rows_check(operation, "n", n)?;
    rows_check(operation, "k", k)?;
    check(
        operation,
        "k",
        k,
        k.is_multiple_of(format.per_vector()),
        "whole 16-byte vectors: multiples of 8 in bf16, of 16 in fp8",
    )
}

/// `c[m, n] = a[m, k] b[n, k]^T`, `batch` times, for devices of capability 9.0. `room` is what there is for partial sums.
/// It sums in another order than [`super::gemm`], so a model uses one of the two for all rows.
///
/// # Errors
/// A dimension that the kernels do not take.
pub fn hopper_gemm(
    format: Format,
    m: usize,
    n: usize,
    k: usize,
    batch: usize,
    room: usize,
) -> Result<HopperPlan, Unsupported> {
    hopper_gemm_share(format, m, n, n, k, batch, room)
}

/// The same for `n` of the `whole` rows of a matrix, which ranks share: it sums as all of them would.
///
/// # Errors
/// A dimension that the kernels do not take.
pub fn hopper_gemm_share(
    format: Format,
    m: usize,
    n: usize,
    whole: usize,
    k: usize,
    batch: usize,
    room: usize,
) -> Result<HopperPlan, Unsupported> {
    const NAME: &str = "hopper_gemm";
    shape_check(NAME, format, m, n, k)?;
    check(
        NAME,
        "batch",
        batch,
        (1..=GRID_YZ_MAX).contains(&batch) && (batch == 1 || format == Format::Bf16),
        "1 to 65535, and 1 in fp8, whose activation scales have no batches",
    )?;
    let tile = tile_of(m);
    let tile_rows = TILES[tile].0;
    let row_tiles = m.div_ceil(tile_rows);
    let blocks = n.div_ceil(HOPPER_COLUMNS) * row_tiles;
    rows_check(NAME, "blocks", blocks)?;
    let (slices, slice_blocks) = slices(whole, k);
    let bytes = blocks * slices * HOPPER_COLUMNS * tile_rows * 4;
    let shares = slices > 1 && batch == 1 && blocks * slices <= SHARING_BLOCKS_MAX && bytes <= room;
    let depth = if shares { slices as u32 } else { 1 };
    Ok(HopperPlan {
        launch: kernel(format, tile, [blocks as u32, batch as u32, depth]),
        tile_rows,
        row_tiles,
        slices,
        slice_blocks,
        partial_bytes: if shares { bytes } else { 0 },
    })
}

/// Rows of a tile of [`hopper_grouped_gemm`]: what [`super::permute`] must be asked with.
pub fn hopper_grouped_tile_rows(rows: usize, experts: usize) -> usize {
    TILES[grouped_tile(rows, experts)].0
}

fn grouped_tile(rows: usize, experts: usize) -> usize {
    // The average decides: tiles larger than most experts' rows would be padding.
    tile_of(rows.div_ceil(experts.max(1)))
}

/// `c[row] = a[row] b[expert of row]^T` over rows sorted by expert. All of k is one slice: experts fill the device.
///
/// # Errors
/// A dimension that the kernels do not take.
pub fn hopper_grouped_gemm(
    format: Format,
    rows: usize,
    n: usize,
    k: usize,
    experts: usize,
) -> Result<HopperPlan, Unsupported> {
    const NAME: &str = "hopper_grouped_gemm";
    shape_check(NAME, format, rows, n, k)?;
    rows_check(NAME, "experts", experts)?;
    let tile = grouped_tile(rows, experts);
    let tile_rows = TILES[tile].0;
    let row_tiles = rows / tile_rows + experts;
    let blocks = n.div_ceil(HOPPER_COLUMNS) * row_tiles;
    rows_check(NAME, "blocks", blocks)?;
    Ok(HopperPlan {
        launch: kernel(format, tile, [blocks as u32, 1, 1]),
        tile_rows,
        row_tiles,
        slices: 1,
        slice_blocks: k.div_ceil(QUANT_GROUP),
        partial_bytes: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_print_what_they_launch() {
        let room = HOPPER_PARTIAL_BYTES;
        let lines = [
            hopper_gemm(Format::Fp8, 1, 2112, 7168, 1, room),
            hopper_gemm(Format::Fp8, 64, 24_576, 1536, 1, room),
            hopper_gemm(Format::Fp8, 20, 7168, 16_384, 1, room),
            hopper_gemm(Format::Fp8, 4096, 7168, 16_384, 1, room),
            hopper_gemm(Format::Bf16, 64, 512, 128, 128, room),
            hopper_grouped_gemm(Format::Fp8, 512, 4096, 7168, 256),
            hopper_grouped_gemm(Format::Bf16, 24_576, 2816, 2048, 64),
        ]
        .map(|plan| plan.expect("a supported shape").to_string());
        assert_eq!(
            lines,
            [
                "hopper_gemm_fp8_16 grid 17 x 1 x 8, 320 threads, 101376 bytes shared, 8 x 7 blocks of k in 1114112 bytes",
                "hopper_gemm_fp8_64 grid 192 x 1 x 1, 320 threads, 108544 bytes shared, 1 x 12 blocks of k",
                "hopper_gemm_fp8_32 grid 56 x 1 x 3, 320 threads, 100352 bytes shared, 3 x 43 blocks of k in 2752512 bytes",
                "hopper_gemm_fp8_128 grid 1792 x 1 x 1, 320 threads, 201728 bytes shared, 3 x 43 blocks of k",
                "hopper_gemm_bf16_64 grid 4 x 128 x 1, 288 threads, 108544 bytes shared, 1 x 1 blocks of k",
                "hopper_gemm_fp8_16 grid 9216 x 1 x 1, 320 threads, 101376 bytes shared, 1 x 56 blocks of k",
                "hopper_gemm_bf16_128 grid 5632 x 1 x 1, 288 threads, 201728 bytes shared, 1 x 16 blocks of k",
            ]
        );
    }

    #[test]
    fn slices_cover_k_and_do_not_know_m_or_room() {
        for n in [1, 128, 576, 2112, 7168, 24_576, 129_280] {
            for k in [8, 128, 512, 1536, 7168, 18_432] {
                let of = |m, room| {
                    let plan = hopper_gemm(Format::Bf16, m, n, k, 1, room).expect("a plan");
                    assert!(plan.partial_bytes <= room.min(HOPPER_PARTIAL_BYTES));
                    let [blocks, _, depth] = plan.launch.grid;
                    if plan.partial_bytes > 0 {
                        assert_eq!(depth as usize, plan.slices);
                        assert!(blocks as usize * 4 <= HOPPER_TICKET_BYTES);
                    }
                    (plan.slices, plan.slice_blocks)
                };
                let (slices, blocks) = of(1, usize::MAX);
                assert!(
                    (slices - 1) * blocks < k.div_ceil(128) && slices * blocks >= k.div_ceil(128)
                );
                for (m, room) in [
                    (1, 0),
                    (16, 1 << 20),
                    (17, usize::MAX),
                    (64, 0),
                    (5000, usize::MAX),
                ] {
                    assert_eq!(of(m, room), (slices, blocks), "{m} x {n} x {k}");
                }
                for share in [1, n.div_ceil(2), n.div_ceil(16)] {
                    let plan = hopper_gemm_share(Format::Bf16, 4, share, n, k, 1, usize::MAX);
                    let plan = plan.expect("a plan");
                    assert_eq!(
                        (plan.slices, plan.slice_blocks),
                        (slices, blocks),
                        "{share} of {n}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_shape_that_no_kernel_takes_is_refused_with_its_number() {
        let refused = [
            hopper_gemm(Format::Bf16, 4, 64, 100, 1, 0),
            hopper_gemm(Format::Fp8, 4, 64, 72, 1, 0),
            hopper_gemm(Format::Fp8, 0, 64, 128, 1, 0),
            hopper_gemm(Format::Fp8, 4, 64, 128, 2, 0),
            hopper_gemm(Format::Bf16, 1 << 30, 1 << 20, 128, 1, 0),
            hopper_grouped_gemm(Format::Bf16, 4, 64, 128, 0),
        ]
        .map(|plan| plan.expect_err("an unsupported shape").to_string());
        assert!(
            refused.iter().all(|message| message.contains(" is ")),
            "{refused:?}"
        );
    }
}
