//! Columns that ranks share: every byte of a rank's own goes to its slot, and every other one comes out of its rank's.

use kernels::params::ShareColumnsParams;
use kernels::plan;
use kernels::reference::{share, share_columns};

use crate::harness::on_every_schedule;

/// Rows, units, bytes of a unit, ranks: shares of whole vectors, of scales and of single values, unequal and empty ones.
const SHAPES: [(usize, usize, usize, usize); 6] = [
    (1, 56, 256, 8),
    (7, 37, 16, 4),
    (64, 100, 2, 3),
    (129, 11, 4, 4),
    (3, 2, 512, 5),
    (2, 1100, 16, 2),
];

#[test]
fn columns_go_to_a_slot_and_come_out_of_all_others() {
    on_every_schedule("share columns", |lab| {
        for (rows, units, unit, ranks) in SHAPES {
            let row_bytes = units * unit;
            let slot = units.div_ceil(ranks) * unit;
            let whole: Vec<u8> = (0..rows * row_bytes)
                .map(|_| lab.random.next() as u8)
                .collect();
            let packed = share_columns(&whole, units, unit, ranks);
            for rank in 0..ranks {
                let params = |rows_at, slots_at, unpack| ShareColumnsParams {
                    rows: rows_at,
                    slots: slots_at,
                    count: rows as i32,
                    units: units as i32,
                    unit_bytes: unit as i32,
                    ranks: ranks as i32,
                    rank: rank as i32,
                    unpack,
                };
                let launch = |unpack| plan::share_columns(rows, units, unit, ranks, unpack);
                let name = format!("rank {rank} of {ranks}: {rows} rows of {units} x {unit}");
                let (first, held) = share(units, ranks, rank);

                let d_whole = lab.upload(&whole);
                let slots = lab.upload(&vec![0xAB_u8; packed.len()]);
                let pack = launch(false).expect("a plan");
                lab.run(&pack, &params(d_whole.address(), slots.address(), 0));
                let mut want = vec![0xAB; packed.len()];
                for row in 0..rows {
                    let at = (rank * rows + row) * slot;
                    want[at..at + held * unit].copy_from_slice(&packed[at..at + held * unit]);
                }
                assert!(
                    lab.read::<u8>(&slots, packed.len()) == want,
                    "{name}: packed"
                );

                // Its own columns are not there yet in what it gets, and stay as they are.
                let d_rows = lab.upload(&vec![0xCD_u8; whole.len()]);
                let d_packed = lab.upload(&packed);
                let unpack = launch(true).expect("a plan");
                lab.run(&unpack, &params(d_rows.address(), d_packed.address(), 1));
                let mut want = whole.clone();
                for row in want.chunks_mut(row_bytes) {
                    row[first * unit..(first + held) * unit].fill(0xCD);
                }
                assert!(
                    lab.read::<u8>(&d_rows, whole.len()) == want,
                    "{name}: unpacked"
                );
            }
        }
    });
}

#[test]
fn shares_that_no_kernel_takes_are_refused() {
    let refused = |unit| plan::share_columns(1, 8, unit, 2, false).unwrap_err();
    assert_eq!(refused(3).field, "unit_bytes");
    assert_eq!(refused(0).field, "unit_bytes");
    assert_eq!(refused(1 << 30).field, "unit_bytes");
    let ranks = plan::share_columns(1, 8, 2, 0, false).unwrap_err();
    assert_eq!(ranks.field, "ranks");
}
