//! `engine pack`: a model directory whose weights are mapped instead of converted, and the check of one.

use std::path::Path;

use anyhow::{Context, bail};
use engine_load::{PACKED_FILE, PackedModel, Progress, read_config};
use engine_memory::resident_dtype;
use engine_spec::{Device, ModelConfig, Packing};
use serde_json::Value;

use crate::cli::PackArguments;

/// Files beside the weights that a model is served with.
const COMPANIONS: [&str; 6] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Packs, or checks what was packed.
pub fn run(arguments: &PackArguments) -> anyhow::Result<()> {
    match (&arguments.verify, &arguments.model, &arguments.output) {
        (Some(dir), ..) => verify(dir),
        (None, Some(model), Some(output)) => pack(arguments, model, output),
        _ => bail!("--model and --output are needed, or --verify with a packed directory"),
    }
}

fn verify(dir: &Path) -> anyhow::Result<()> {
    let packed = PackedModel::open(&dir.join(PACKED_FILE))?;
    packed.verify(&Progress::default())?;
    let sections = packed.header().sections.len();
    println!(
        "{}: {sections} sections, {} bytes, all digests right",
        dir.display(),
        packed.bytes()
    );
    Ok(())
}

fn pack(arguments: &PackArguments, model: &str, output: &Path) -> anyhow::Result<()> {
    let settings = arguments.cache.settings();
    let revision = arguments.revision.as_deref();
    let dir = engine_load::resolve(model, revision, &settings, &Progress::default())?;
    let original = read_config(&dir)?;
    if original.packed.is_some() {
        bail!("--model {model} is packed already; give the files that it was packed from");
    }
    std::fs::create_dir_all(output).with_context(|| format!("--output {}", output.display()))?;
    if output.canonicalize()? == dir.canonicalize()? {
        bail!(
            "--output {} is the model itself; give another directory",
            output.display()
        );
    }
    let packing = Packing {
        dtype: arguments.dtype,
        quantization: arguments.quantization,
    };
    let text = packed_config(&dir, packing)?;
    let config = ModelConfig::from_hf_json(&text)?;
    let resident = resident_dtype(packing.dtype, packing.quantization, &config, Device::Cpu);
    let path = output.join(PACKED_FILE);
    engine_cpu::pack(&dir, &path, &config, resident, &Progress::default())?;
    for name in COMPANIONS {
        let from = dir.join(name);
        if from.is_file() {
            std::fs::copy(&from, output.join(name))
                .with_context(|| format!("{name} cannot be copied"))?;
        }
    }
    // Last, so that a directory with a config is whole.
    std::fs::write(output.join("config.json"), text)
        .with_context(|| format!("--output {}", output.display()))?;
    let bytes = std::fs::metadata(&path)?.len();
    println!(
        "{}: {bytes} bytes, dtype {}, quantization {}",
        path.display(),
        packing.dtype,
        packing.quantization
    );
    Ok(())
}

/// The model's config.json, saying how its weights are packed.
fn packed_config(dir: &Path, packing: Packing) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(dir.join("config.json"))?;
    let mut document: Value = serde_json::from_str(&text)?;
    document["cachalot_packed"] = serde_json::to_value(packing)?;
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}
