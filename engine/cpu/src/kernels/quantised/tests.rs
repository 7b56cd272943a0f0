//! Integer products against float64 over the same integers, and every instruction set against every other.

use half::bf16;

use super::*;
use crate::kernels::tests::noise;
use crate::quantised::{Integers, Packer};

const FORMATS: [IntegerFormat; 4] = [
    IntegerFormat::Int8,
    IntegerFormat::Int4 { group: 32 },
    IntegerFormat::Int4 { group: 64 },
    IntegerFormat::Int4 { group: 128 },
];

fn pack(format: IntegerFormat, weight: &[f32], length: usize) -> Integers {
    let rows = weight.len() / length;
    let mut packer = Packer::new(format, rows, length, rows);
    weight.chunks(length).for_each(|row| packer.push(row));
    packer.finish()
}

/// The products of rows `indices` with columns `columns`, those of other columns NaN.
fn product(
    isa: ByteIsa,
    weight: &Integers,
    input: &[f32],
    columns: std::ops::Range<usize>,
    rows: Rows<'_>,
    indices: std::ops::Range<usize>,
) -> Vec<f32> {
    let (length, width) = (weight.columns, weight.part_rows);
    let mut out = vec![f32::NAN; indices.end * width];
    let needed = IntegerProduct::scratch_length(weight.format, length, indices.len());
    // Whatever the last tile left there must not matter.
    let mut scratch = vec![0x5a5a; needed];
    let kernel = IntegerProduct {
        format: weight.format,
        blocks: weight.part(0).as_ptr().cast(),
        length,
        columns,
        input: input.as_ptr(),
        is_rounded: false,
        input_stride: length,
        rows,
        indices: indices.clone(),
        out: out.as_mut_ptr(),
        out_stride: width,
        scratch: &mut scratch,
    };
    // SAFETY: the buffers have exactly these sizes.
    unsafe { isa.run(kernel) };
    out.split_off(indices.start * width)
}

/// What a row of activations stands for after quantisation: nearest of 127 steps, ties to even.
fn rounded(row: &[f32], group: usize) -> Vec<f64> {
    row.chunks(group)
        .flat_map(|values| {
            let largest = values.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
            let step = largest / 127.0;
            values.iter().map(move |v| {
                if step == 0.0 {
                    0.0
                } else {
                    (f64::from(*v) / step).round_ties_even() * step
                }
            })
        })
        .collect()
}

#[test]
fn products_are_right_for_every_length_and_equal_on_every_instruction_set() {
    for format in FORMATS {
        for length in (1..140).chain([200, 256, 257, 1000]) {
            // Both leave a rest beside the register tiles, and the rows one beside the streams.
            let (columns, rows) = (69, 15);
            let weight = pack(format, &noise(length as u64, length * columns), length);
            let input = noise(length as u64 + 7, length * rows);
            let all = |isa| product(isa, &weight, &input, 0..columns, Rows::From(0), 0..rows);
            let reference = all(ByteIsa::Portable);
            let group = match format {
                IntegerFormat::Int8 => length,
                IntegerFormat::Int4 { group } => group as usize,
            };
            let mut meant = vec![0.0; length];
            for column in 0..columns {
                weight.read_row(column, &mut meant);
                for (row, values) in input.chunks(length).enumerate() {
                    let exact: f64 = rounded(values, group)
                        .iter()
                        .zip(&meant)
                        .map(|(a, w)| a * f64::from(*w))
                        .sum();
                    let found = f64::from(reference[row * columns + column]);
                    assert!(
                        (found - exact).abs() < 3e-5 * exact.abs().max(1.0),
                        "{format:?} {length}: {found} {exact}"
                    );
                }
            }
            for isa in ByteIsa::available() {
                assert_eq!(all(isa), reference, "{format:?} {isa:?} {length}");
                // A row is the same alone, and a column in another tile.
                let alone = product(isa, &weight, &input, 0..columns, Rows::Listed(&[11]), 0..1);
                assert_eq!(
                    alone,
                    reference[11 * columns..12 * columns],
                    "{format:?} {isa:?} {length}"
                );
                let part = product(isa, &weight, &input, 16..50, Rows::From(2), 3..7);
                for (row, values) in part.chunks(columns).enumerate() {
                    assert_eq!(
                        values[16..50],
                        reference[(row + 5) * columns..][16..50],
                        "{format:?} {isa:?}"
                    );
                    assert!(
                        values[..16].iter().chain(&values[50..]).all(|v| v.is_nan()),
                        "wrote beside its columns"
                    );
                }
            }
        }
    }
}

/// Activations that bfloat16 products have rounded already are read as they are.
#[test]
fn rounded_rows_give_what_the_same_values_give_wide() {
    for format in FORMATS {
        let (length, columns) = (100, 20);
        let weight = pack(format, &noise(3, length * columns), length);
        let narrow: Vec<bf16> = noise(4, length).into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = narrow.iter().map(|value| value.to_f32()).collect();
        // Rows are as far apart as float32 ones.
        let mut room = vec![f32::NAN; length];
        // SAFETY: half of the room.
        unsafe { std::ptr::copy_nonoverlapping(narrow.as_ptr(), room.as_mut_ptr().cast(), length) };
        for isa in ByteIsa::available() {
            let expected = product(isa, &weight, &wide, 0..columns, Rows::From(0), 0..1);
            let mut found = vec![f32::NAN; columns];
            let needed = IntegerProduct::scratch_length(format, length, 1);
            let kernel = IntegerProduct {
                format,
                blocks: weight.part(0).as_ptr().cast(),
                length,
                columns: 0..columns,
                input: room.as_ptr(),
                is_rounded: true,
                input_stride: length,
                rows: Rows::From(0),
                indices: 0..1,
                out: found.as_mut_ptr(),
                out_stride: columns,
                scratch: &mut vec![0x5a5a; needed],
            };
            // SAFETY: the buffers have exactly these sizes.
            unsafe { isa.run(kernel) };
            assert_eq!(found, expected, "{format:?} {isa:?}");
        }
    }
}

/// Bytes at the ends of their range make the largest sums; a saturating instruction would lose them.
#[test]
fn extreme_bytes_do_not_saturate() {
    let (length, columns) = (1 << 14, 16);
    for format in FORMATS {
        for sign in [1.0, -1.0] {
            let mut packer = Packer::new(format, columns, length, columns);
            // As a checkpoint may have it: the lowest integer everywhere.
            let (scales, lowest) = (vec![1.0; length], vec![0; length]);
            (0..columns).for_each(|_| packer.put(&scales, &lowest));
            let weight = packer.finish();
            let input = vec![sign; length];
            let lowest = if format == IntegerFormat::Int8 {
                -128.0
            } else {
                -8.0
            };
            let expected = sign * lowest * length as f32;
            for isa in ByteIsa::available() {
                let found = product(isa, &weight, &input, 0..columns, Rows::From(0), 0..1);
                for value in found {
                    assert!(
                        (value / expected - 1.0).abs() < 1e-6,
                        "{format:?} {isa:?}: {value} {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_none_and_zeros_stay_zero() {
    let length = 100;
    for format in FORMATS {
        let weight = pack(format, &noise(1, 16 * length), length);
        for isa in ByteIsa::available() {
            let run = |input: &[f32]| product(isa, &weight, input, 0..16, Rows::From(0), 0..1);
            assert_eq!(run(&vec![0.0; length]), [0.0; 16]);
            assert_eq!(run(&vec![1e-38; length]), [0.0; 16]);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut input = vec![1.0; length];
                input[99] = bad;
                assert!(
                    run(&input).iter().all(|value| value.is_nan()),
                    "{format:?} {isa:?} {bad}"
                );
            }
        }
    }
}
