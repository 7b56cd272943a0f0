//! Stored elements to float32 and bfloat16.
//!
//! Everything stored widens to float32 exactly. Narrowing to bfloat16 rounds to nearest even; FP8 times its scale is
//! rounded once, from the float32 product.

use half::{bf16, f16};

use crate::checkpoint::{Scales, StoredTensor};
use crate::header::FloatType;

/// Calls `sink` with each element in order, widened to float32, block scales applied.
pub fn for_each(tensor: &StoredTensor<'_>, mut sink: impl FnMut(f32)) {
    let bytes = tensor.bytes;
    match tensor.dtype {
        FloatType::F32 => chunks(bytes, |c: [u8; 4]| sink(f32::from_le_bytes(c))),
        FloatType::Bf16 => chunks(bytes, |c: [u8; 2]| sink(bf16::from_le_bytes(c).to_f32())),
        FloatType::F16 => chunks(bytes, |c: [u8; 2]| sink(f16::from_le_bytes(c).to_f32())),
        FloatType::I8 | FloatType::I32 => {
            for_each_integer_row(tensor, |row| row.for_each(&mut sink))
        }
        FloatType::F8E8m0 => bytes.iter().for_each(|byte| sink(e8m0(*byte))),
        FloatType::F8E4m3 => match (&tensor.scales, tensor.spec.shape.as_slice()) {
            (Some(scales), [_, columns]) => dequantise(bytes, *columns, scales, sink),
            _ => bytes.iter().for_each(|byte| sink(e4m3(*byte))),
        },
    }
}

/// All elements in float32.
pub fn to_f32(tensor: &StoredTensor<'_>) -> Vec<f32> {
    let mut out = Vec::with_capacity(tensor.spec.elements());
    for_each(tensor, |value| out.push(value));
    out
}

/// All elements in bfloat16.
pub fn to_bf16(tensor: &StoredTensor<'_>) -> Vec<bf16> {
    let mut out = Vec::with_capacity(tensor.spec.elements());
    match tensor.dtype {
        FloatType::Bf16 => chunks(tensor.bytes, |c: [u8; 2]| out.push(bf16::from_le_bytes(c))),
        _ => for_each(tensor, |value| out.push(bf16::from_f32(value))),
    }
    out
}

fn chunks<const N: usize>(bytes: &[u8], mut sink: impl FnMut([u8; N])) {
    for chunk in bytes.as_chunks::<N>().0 {
        sink(*chunk);
    }
}

/// `weight[i][j] * scale[i / rows][j / columns]`; despite its name, `weight_scale_inv` is a multiplier.
fn dequantise(bytes: &[u8], columns: usize, scales: &Scales<'_>, mut sink: impl FnMut(f32)) {
    let table: [f32; 256] = std::array::from_fn(|byte| e4m3(byte as u8));
    let block_rows = scales.blocks.rows as usize;
    let block_columns = scales.blocks.columns as usize;
    let per_row = columns.div_ceil(block_columns);
    for (row, values) in bytes.chunks_exact(columns).enumerate() {
        for (block, part) in values.chunks(block_columns).enumerate() {
            let block_row = (scales.rows_before + row) / block_rows;
            let scale = scales.get(block_row * per_row + block);
            for byte in part {
                sink(table[usize::from(*byte)] * scale);
            }
        }
    }
}

/// A row of stored integers: what stands in the file, and how it is scaled.
#[derive(Debug)]
pub struct IntegerRow<'a> {
    /// Integers plus 128 (eight bits) or 8 (four bits).
    pub stored: &'a [u8],
    /// A scale for each `group` columns.
    pub scales: &'a [f32],
    /// Columns that share a scale.
    pub group: usize,
    /// What was added to the integers.
    pub offset: u8,
}

impl IntegerRow<'_> {
    /// The weights that the row stands for.
    pub fn for_each(&self, sink: &mut impl FnMut(f32)) {
        for (values, scale) in self.stored.chunks(self.group).zip(self.scales) {
            for value in values {
                sink((f32::from(*value) - f32::from(self.offset)) * scale);
            }
        }
    }
}

/// Calls `take` with each row of a matrix of stored integers.
pub fn for_each_integer_row(tensor: &StoredTensor<'_>, mut take: impl FnMut(&IntegerRow<'_>)) {
    let (Some(scales), [rows, columns]) = (&tensor.scales, tensor.spec.shape.as_slice()) else {
        return;
    };
    let group = scales.blocks.columns as usize;
    let groups = columns.div_ceil(group);
    let row_bytes = tensor.bytes.len() / (*rows).max(1);
    // Words are little-endian, their first integer lowest, so bytes are in the order of the columns.
    let is_nibbles = tensor.dtype == FloatType::I32 && scales.bits == 4;
    let mut stored = Vec::with_capacity(row_bytes * 2);
    for (row, bytes) in tensor.bytes.chunks_exact(row_bytes.max(1)).enumerate() {
        stored.clear();
        match (tensor.dtype, is_nibbles) {
            (FloatType::I8, _) => stored.extend(bytes.iter().map(|byte| byte ^ 0x80)),
            (_, false) => stored.extend(bytes),
            (_, true) => stored.extend(bytes.iter().flat_map(|byte| [byte & 15, byte >> 4])),
        }
        stored.truncate(*columns);
        let of_row: Vec<f32> = (row * groups..(row + 1) * groups)
            .map(|at| scales.get(at))
            .collect();
        take(&IntegerRow {
            stored: &stored,
            scales: &of_row,
            group,
            offset: if is_nibbles { 8 } else { 128 },
        });
    }
}

impl Scales<'_> {
    /// All multipliers in order.
    pub fn to_f32(&self) -> Vec<f32> {
        (0..self.bytes.len() / self.dtype.bytes())
            .map(|index| self.get(index))
            .collect()
    }

    fn get(&self, index: usize) -> f32 {
        let at = index * self.dtype.bytes();
        match self.bytes[at..at + self.dtype.bytes()] {
            [byte] => e8m0(byte),
            [a, b] if self.dtype == FloatType::F16 => f16::from_le_bytes([a, b]).to_f32(),
            [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            _ => f32::NAN,
        }
    }
}

/// FP8 e4m3fn: sign, four exponent bits (bias 7), three mantissa bits; no infinity, two NaNs (OCP FP8, section 5).
pub(crate) fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(byte >> 3 & 0xf);
    let mantissa = f32::from(byte & 7);
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (8.0 + mantissa) * 2f32.powi(exponent - 10),
    }
}

/// Power of two with bias 127; 255 is NaN (OCP MX, section 5.4).
fn e8m0(byte: u8) -> f32 {
    match byte {
        255 => f32::NAN,
        // 2^-127 is a denormal: half the smallest exponent that the format below can write.
        0 => f32::from_bits(1 << 22),
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_has_the_values_of_its_definition() {
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x39, 1.125),
            (0xb8, -1.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(e4m3(byte), value, "{byte:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
    }

    #[test]
    fn e8m0_is_a_power_of_two() {
        assert_eq!(e8m0(127), 1.0);
        assert_eq!(e8m0(130), 8.0);
        assert_eq!(e8m0(1), 2f32.powi(-126));
        assert_eq!(e8m0(0), 2f32.powi(-127));
        assert!(e8m0(255).is_nan());
    }
}
