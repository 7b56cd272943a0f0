//! Weights on the device are exchanged for others in host memory, and back, whole or not at all.

use std::path::Path;

use crate::support::{
    bits, device, entry, gpu, gpu_of, limits, load, prefill, random_model, step, trained_model,
};
use engine_core::{
    Batch, ExecuteError, Executor, Logits, PickRow, Picker, SamplingParameters, StagedWeights,
};
use engine_cuda::{CudaExecutor, CudaLimits};
use engine_load::{Progress, read_config};
use engine_memory::{ResidentDtype, resident_dtype};
use engine_spec::{Device, Dtype, Quantization};
use tempfile::TempDir;

/// A model with other bytes in its tensors, those that `change` makes of each matrix's.
fn changed(model: &Path, change: impl Fn(&mut [u8], usize)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(model).unwrap() {
        let path = file.unwrap().path();
        if path.is_dir() {
            continue;
        }
        let mut bytes = std::fs::read(&path).unwrap();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let begin = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
            let header: serde_json::Value = serde_json::from_slice(&bytes[8..begin]).unwrap();
            for (name, tensor) in header.as_object().unwrap() {
                if name == "__metadata__" || tensor["shape"].as_array().unwrap().len() != 2 {
                    continue;
                }
                let at = |index: usize| tensor["data_offsets"][index].as_u64().unwrap() as usize;
                let data = &mut bytes[begin + at(0)..begin + at(1)];
                let rows = tensor["shape"][0].as_u64().unwrap() as usize;
                let row = data.len() / rows;
                change(data, row);
            }
        }
        std::fs::write(dir.path().join(path.file_name().unwrap()), bytes).unwrap();
    }
    dir
}

/// The rows of each matrix in another order.
fn shuffled(model: &Path) -> TempDir {
    changed(model, |data, row| data.rotate_left(row))
}

fn staged(dir: &Path, limits: &CudaLimits) -> StagedWeights {
    let config = read_config(dir).unwrap();
    CudaExecutor::stage(dir, &config, limits, &Progress::default()).unwrap()
}

/// Logits after a prompt, and after one token more, which a recorded step computes.
fn answer(executor: &mut CudaExecutor) -> Vec<Vec<u32>> {
    let first = prefill(executor, &[5, 6, 7]);
    let next = entry(1, &[9], 3, &(0..32).collect::<Vec<_>>());
    let second = step(executor, vec![next]).remove(0);
    vec![bits(&first), bits(&second)]
}

#[test]
fn exchanged_weights_compute_what_an_executor_of_their_own_does() {
    // bf16 and a split up-projection; codes with scales and a gate's bias.
    let fp8 = random_model("v3-fp8-cuda");
    let config = read_config(&fp8).unwrap();
    let narrow = resident_dtype(Dtype::Auto, Quantization::None, &config, Device::Nvidia);
    for (model, resident) in [(trained_model(), ResidentDtype::Bfloat16), (fp8, narrow)] {
        let Some(gpu) = gpu() else { return };
        let other = shuffled(&model);
        let limits = limits(resident);
        let expected = answer(&mut load(&gpu, other.path(), limits));
        let mut executor = load(&gpu, &model, limits);
        let before = answer(&mut executor);
        assert!(before[0] != expected[0] && before[1] != expected[1]);
        let graphs = executor.graphs();
        assert_eq!(graphs, 1);

        let old = executor
            .exchange_weights(staged(other.path(), &limits))
            .unwrap();
        assert_eq!(answer(&mut executor), expected, "{resident:?}");
        assert_eq!(executor.graphs(), graphs, "the recorded step serves both");
        executor.exchange_weights(old).unwrap();
        assert_eq!(answer(&mut executor), before, "{resident:?}");
    }
}

#[test]
fn weights_that_are_not_finite_can_be_taken_back() {
    let Some(gpu) = gpu() else { return };
    let limits = limits(ResidentDtype::Bfloat16);
    let mut executor = load(&gpu, &trained_model(), limits);
    let before = answer(&mut executor);
    let nans = changed(&trained_model(), |data, _| data.fill(0xff));
    let old = executor
        .exchange_weights(staged(nans.path(), &limits))
        .unwrap();
    let batch = Batch {
        entries: vec![entry(1, &[5], 0, &[0])],
    };
    // Where the device samples, whoever picks finds out; then no step runs any more.
    executor.compute(&batch).unwrap();
    let parameters = SamplingParameters::greedy();
    let row = PickRow {
        row: 0,
        parameters: &parameters,
        tokens: &batch.entries[0].tokens,
        drafts: &[],
        prompt_len: 1,
        choice: 0,
        allowed: None,
        logprobs: None,
    };
    let error = executor.pick(&[row], &mut Vec::new()).unwrap_err();
    assert!(matches!(error, ExecuteError::Fatal(_)), "{error}");
    assert!(error.to_string().contains("not finite"), "{error}");
    let error = executor.execute(&batch, &mut Logits::default());
    assert!(matches!(error, Err(ExecuteError::Fatal(_))), "{error:?}");
    executor.exchange_weights(old).unwrap();
    assert_eq!(answer(&mut executor), before);
}

#[test]
fn other_weights_are_given_back_and_harm_nothing() {
    let Some(gpu) = gpu() else { return };
    let bf16 = limits(ResidentDtype::Bfloat16);
    let fp8 = random_model("v3-fp8-cuda");
    let mut executor = load(&gpu, &fp8, bf16);
    let before = answer(&mut executor);
    let config = read_config(&fp8).unwrap();
    let narrow = resident_dtype(Dtype::Auto, Quantization::None, &config, Device::Nvidia);
    for other in [
        staged(&fp8, &limits(narrow)),
        staged(&trained_model(), &bf16),
        StagedWeights(Box::new(7)),
    ] {
        assert!(executor.exchange_weights(other).is_err());
    }
    assert_eq!(answer(&mut executor), before);
}

#[test]
fn a_device_that_fails_while_weights_are_exchanged_is_lost() {
    let Some(device) = device() else { return };
    let gpu = gpu_of(&device);
    let limits = limits(ResidentDtype::Bfloat16);
    let mut victim = load(&gpu, &trained_model(), limits);
    let mut culprit = load(&gpu, &trained_model(), limits);
    let weights = staged(&trained_model(), &limits);
    if !device.emulation_fault(0) {
        return; // a real device has no switch for it
    }
    let batch = Batch {
        entries: vec![entry(1, &[5], 0, &[0])],
    };
    culprit.execute(&batch, &mut Logits::default()).unwrap_err();
    let old = victim.exchange_weights(weights).unwrap();
    let error = victim
        .execute(&batch, &mut Logits::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("neither version is whole") && error.contains("CUDA_ERROR_ILLEGAL_ADDRESS"),
        "{error}"
    );
    assert!(victim.exchange_weights(old).is_err());
}
