//! Matrices of integers in the format of compressed-tensors: `weight_packed` or `weight`, with `weight_scale`.

use std::collections::BTreeMap;

use engine_model::TensorSpec;
use engine_spec::StoredIntegers;

use super::{Location, Shard, Weight, find};
use crate::LoadError;
use crate::header::FloatType;

/// Parts that a module has only where its integers mean something else than is served.
const UNSERVED: [(&str, &str); 2] = [
    ("_zero_point", "asymmetric weights are not served"),
    (
        "_g_idx",
        "columns out of order (actorder group) are not served",
    ),
];

/// Whether a tensor of this name holds integers.
pub(super) fn is_stored(
    shards: &[Shard],
    places: &BTreeMap<&str, usize>,
    spec: &TensorSpec,
) -> bool {
    let header = places
        .get(spec.name.as_str())
        .and_then(|shard| shards[*shard].header.get(&spec.name));
    header.is_some_and(|header| header.float_type() == Some(FloatType::I8))
}

/// Finds the integers and scales that stand for `spec`.
pub(super) fn locate(
    shards: &[Shard],
    places: &BTreeMap<&str, usize>,
    spec: &TensorSpec,
    stored: StoredIntegers,
) -> Result<Weight, LoadError> {
    let name = &spec.name;
    let mismatch = |tensor: &str, problem: String| {
        let file = places
            .get(tensor)
            .map_or_else(String::new, |shard| shards[*shard].file.clone());
        Err(LoadError::Mismatch {
            file,
            tensor: tensor.into(),
            problem,
        })
    };
    for (part, why) in UNSERVED {
        let part = format!("{name}{part}");
        if places.contains_key(part.as_str()) {
            return mismatch(&part, format!("is in the file, expected none: {why}"));
        }
    }
    let (rows, columns) = match spec.stored_shape().as_slice() {
        [rows, columns] => (*rows, *columns),
        other => (1, other.iter().product()),
    };
    let (place, shape, expected) = match stored.packed {
        true => {
            let words = columns.div_ceil(32 / stored.bits as usize);
            (format!("{name}_packed"), [rows, words], FloatType::I32)
        }
        false => (name.clone(), [rows, columns], FloatType::I8),
    };
    let wide = places
        .get(name.as_str())
        .and_then(|shard| shards[*shard].header.get(name));
    if let Some(found) = wide.filter(|found| found.float_type() != Some(FloatType::I8)) {
        return mismatch(
            name,
            format!(
                "dtype {}, expected {expected} as {place}: linear maps that stay wide beside quantised ones are not \
                 served; quantise the original model with --quantization instead",
                found.dtype
            ),
        );
    }
    let location = find(shards, places, &place, &shape)?;
    if location.dtype != expected {
        return mismatch(
            &place,
            format!("dtype {}, expected {expected}", location.dtype),
        );
    }
    let scales = locate_scales(
        shards,
        places,
        name,
        rows,
        stored
            .group
            .map_or(1, |group| columns.div_ceil(group as usize)),
    )?;
    Ok((location, Some(scales)))
}

fn locate_scales(
    shards: &[Shard],
    places: &BTreeMap<&str, usize>,
    name: &str,
    rows: usize,
    groups: usize,
) -> Result<Location, LoadError> {
    let name = format!("{name}_scale");
    let location = find(shards, places, &name, &[rows, groups])?;
    match location.dtype {
        FloatType::F32 | FloatType::Bf16 | FloatType::F16 => Ok(location),
        found => Err(LoadError::Mismatch {
            file: shards[location.shard].file.clone(),
            tensor: name,
            problem: format!("dtype {found}, expected F32, BF16 or F16"),
        }),
    }
}
