//! A random checkpoint of a given shape: what a speed needs of a model.

use std::collections::HashMap;
use std::path::Path;

use engine_spec::ModelConfig;
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// Writes `model.safetensors` with every tensor of `config` in bfloat16: norms one, the rest uniform with the variance
/// that keeps activations near one.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write(config: &ModelConfig, dir: &Path) -> anyhow::Result<()> {
    let model = engine_model::build(config);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let data: Vec<Vec<u8>> = model
        .tensors
        .iter()
        .map(|tensor| {
            let is_norm = tensor.name.ends_with("norm.weight");
            let columns = tensor.shape.last().copied().unwrap_or(1);
            let scale = (1.5 / columns as f32).sqrt();
            (0..tensor.elements())
                .flat_map(|_| {
                    let value = if is_norm { 1.0 } else { next() * scale };
                    bf16::from_f32(value).to_le_bytes()
                })
                .collect()
        })
        .collect();
    let views = model
        .tensors
        .iter()
        .zip(&data)
        .map(|(tensor, data)| {
            let view = TensorView::new(Dtype::BF16, tensor.shape.clone(), data)?;
            Ok((tensor.name.as_str(), view))
        })
        .collect::<Result<HashMap<&str, TensorView<'_>>, safetensors::SafeTensorError>>()?;
    let path = dir.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path)?;
    // Half a gigabyte on its way to the disk would be measured with what follows.
    std::fs::File::open(path)?.sync_all()?;
    Ok(())
}
