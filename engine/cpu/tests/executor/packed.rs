//! Packed weights: the same answers, the same bytes as planned, pages shared with every other process that maps them.

// A helper is no test, and may unwrap all the same.
use std::path::Path;

use crate::support::{INT4, INT8, MODELS, folder, limits, load, prefill};
use engine_core::Executor;
use engine_cpu::{CpuExecutor, CpuLimits};
use engine_load::{PACKED_FILE, PackedModel, Progress, read_config};
use engine_memory::ResidentDtype;
use engine_spec::ModelConfig;

const TOKENS: [u32; 9] = [3, 1, 4, 1, 5, 9, 2, 6, 5];

fn packed(model: &str, resident: ResidentDtype) -> (tempfile::TempDir, ModelConfig) {
    let config = read_config(&folder(model)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(PACKED_FILE);
    let progress = Progress::default();
    engine_cpu::pack(&folder(model), &path, &config, resident, &progress).unwrap();
    assert_eq!(progress.done(), progress.total());
    (dir, config)
}

fn open(dir: &Path, config: &ModelConfig, limits: CpuLimits) -> Result<CpuExecutor, String> {
    let opened = CpuExecutor::load(dir, config, limits, &Progress::default());
    opened.map_err(|error| error.chain())
}

#[test]
fn packed_weights_give_the_bytes_of_converted_ones() {
    for model in MODELS {
        for resident in [ResidentDtype::Float32, ResidentDtype::Bfloat16, INT8, INT4] {
            let (dir, config) = packed(model, resident);
            let mut mapped = open(dir.path(), &config, limits(resident)).unwrap();
            let mut converted = load(&folder(model), limits(resident));
            assert_eq!(
                mapped.allocated_bytes(),
                converted.allocated_bytes(),
                "{model}"
            );
            let bits = |executor: &mut CpuExecutor| {
                prefill(executor, &TOKENS)
                    .iter()
                    .map(|v| v.to_bits())
                    .collect::<Vec<_>>()
            };
            assert_eq!(
                bits(&mut mapped),
                bits(&mut converted),
                "{model} {resident:?}"
            );
            let file = PackedModel::open(&dir.path().join(PACKED_FILE)).unwrap();
            file.verify(&Progress::default()).unwrap();
        }
    }
}

/// What /proc/self/smaps says of the mappings of a file, in KiB.
#[cfg(target_os = "linux")]
fn mapping(path: &Path, field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    let mut sum = 0;
    for line in text.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            inside = line.ends_with(path.to_str().unwrap());
        } else if inside && first == format!("{field}:") {
            sum += line
                .split_whitespace()
                .nth(1)
                .unwrap()
                .parse::<u64>()
                .unwrap();
        }
    }
    sum
}

#[cfg(target_os = "linux")]
#[test]
fn packed_weights_are_pages_of_the_file_and_no_copy() {
    for resident in [ResidentDtype::Bfloat16, INT8] {
        let (dir, config) = packed("v2-lite", resident);
        let path = dir.path().join(PACKED_FILE).canonicalize().unwrap();
        let mut executor = open(dir.path(), &config, limits(resident)).unwrap();
        prefill(&mut executor, &TOKENS);
        let bytes = std::fs::metadata(&path).unwrap().len();
        assert_eq!(mapping(&path, "Size"), bytes.div_ceil(4096) * 4);
        // The step has read most of it through the mapping, and written to none of it.
        assert!(mapping(&path, "Rss") * 1024 > bytes / 2);
        for field in ["Anonymous", "Private_Dirty", "Shared_Dirty"] {
            assert_eq!(mapping(&path, field), 0, "{field}");
        }
        drop(executor);
        assert_eq!(mapping(&path, "Size"), 0);
    }
}

#[test]
fn a_packed_file_of_something_else_is_refused_with_the_way_out() {
    let (dir, config) = packed("qwen2", INT8);
    let refused =
        |config: &ModelConfig, resident| open(dir.path(), config, limits(resident)).unwrap_err();
    let message = refused(&config, INT4);
    assert!(
        message.contains("weights are int8, expected int4, groups of 64; serve it without"),
        "{message}"
    );
    let mut other = config.clone();
    other.rope_theta *= 2.0;
    let message = refused(&other, INT8);
    assert!(
        message.contains("was packed for another config.json"),
        "{message}"
    );
    assert!(open(dir.path(), &config, limits(INT8)).is_ok());
}

#[test]
fn a_prediction_layer_is_packed_and_used_when_it_is_asked_for() {
    let (dir, config) = packed("v3-mtp", ResidentDtype::Bfloat16);
    let plain = limits(ResidentDtype::Bfloat16);
    let mut drafting = plain;
    drafting.draft_tokens = 1;
    for limits in [plain, drafting] {
        let mut mapped = open(dir.path(), &config, limits).unwrap();
        let mut converted = load(&folder("v3-mtp"), limits);
        assert_eq!(mapped.allocated_bytes(), converted.allocated_bytes());
        assert_eq!(
            prefill(&mut mapped, &TOKENS),
            prefill(&mut converted, &TOKENS)
        );
    }
    // Files without the layer are packed without it.
    let (dir, config) = packed("v3-groups", ResidentDtype::Bfloat16);
    let message = open(dir.path(), &config, drafting).unwrap_err();
    assert!(
        message.contains("serve it without --num-speculative-tokens"),
        "{message}"
    );
}

#[test]
fn a_prediction_layer_that_lacks_a_tensor_is_not_left_out_in_silence() {
    let dir = tempfile::tempdir().unwrap();
    let config = read_config(&folder("v3-mtp")).unwrap();
    let stored = std::fs::read(folder("v3-mtp").join("model.safetensors")).unwrap();
    for part in ["eh_proj", "enorm", "self_attn.o_proj"] {
        // Another name of the same length, so that the header stays valid.
        let name = format!("model.layers.{}.{part}.weight", config.layers);
        let other = name.replace("model", "other");
        let mut file = stored.clone();
        let at = file
            .windows(name.len())
            .position(|bytes| bytes == name.as_bytes())
            .unwrap_or_else(|| panic!("{name} is not in the file"));
        file[at..at + name.len()].copy_from_slice(other.as_bytes());
        std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
        let path = dir.path().join(PACKED_FILE);
        let (bf16, progress) = (ResidentDtype::Bfloat16, Progress::default());
        let problem = engine_cpu::pack(dir.path(), &path, &config, bf16, &progress).unwrap_err();
        assert!(problem.chain().contains(&name), "{}", problem.chain());
        assert!(!path.exists(), "nothing is left behind");
    }
}

#[test]
fn one_flipped_byte_of_any_section_is_found() {
    let (dir, _) = packed("v3-groups", INT4);
    let path = dir.path().join(PACKED_FILE);
    let sound = std::fs::read(&path).unwrap();
    let file = PackedModel::open(&path).unwrap();
    let sections = file.header().sections.len();
    let lengths = file.header().sections.iter().map(|section| section.bytes);
    let start = sound.len() - lengths.map(|bytes| bytes.next_multiple_of(64)).sum::<u64>() as usize;
    for index in (0..sections).step_by(17).chain([sections - 1]) {
        let section = file.section(index).unwrap();
        let name = &file.header().sections[index].name;
        let place = section.as_ptr() as usize - file.section(0).unwrap().as_ptr() as usize;
        let mut broken = sound.clone();
        broken[start + place + section.len() / 2] ^= 0x10;
        let other = dir.path().join("broken");
        std::fs::write(&other, broken).unwrap();
        let error = PackedModel::open(&other)
            .unwrap()
            .verify(&Progress::default())
            .unwrap_err();
        assert!(
            error
                .to_string()
                .contains(&format!("section {name} has the digest")),
            "{error}"
        );
    }
    assert!(file.verify(&Progress::default()).is_ok());
}

#[test]
fn an_engine_over_packed_weights_has_the_vocabulary_of_its_model() {
    let (dir, config) = packed("llama-tied", INT8);
    let executor = open(dir.path(), &config, limits(INT8)).unwrap();
    assert_eq!(executor.vocabulary(), config.vocab_size as usize);
}
