//! A device that fails: the error has its CUDA name, and the executor stays broken.

use crate::support::{device, entry, gpu_of, limits, load, prefill, trained_model};
use engine_core::{Batch, ExecuteError, Executor, Logits};
use engine_memory::ResidentDtype;

/// Runs three tokens and gives the failure.
fn fatal(executor: &mut dyn Executor) -> String {
    let entries = vec![entry(1, &[5, 6, 7], 0, &[0])];
    match executor.execute(&Batch { entries }, &mut Logits::default()) {
        Err(ExecuteError::Fatal(reason)) => reason,
        other => panic!("it should have failed: {other:?}"),
    }
}

#[test]
fn a_kernel_that_faults_mid_flight_is_fatal_and_stays_so() {
    let Some(device) = device() else { return };
    let gpu = gpu_of(&device);
    let mut executor = load(&gpu, &trained_model(), limits(ResidentDtype::Bfloat16));
    prefill(&mut executor, &[5, 6, 7]);
    // In the middle of the second layer.
    if !device.emulation_fault(20) {
        return; // a real device has no switch for it
    }
    let reason = fatal(&mut executor);
    assert!(
        reason.contains("CUDA_ERROR_ILLEGAL_ADDRESS (700): injected fault in kernel"),
        "{reason}"
    );
    assert_eq!(fatal(&mut executor), reason);
    // The context is lost, as on a real device: nothing else can be loaded there.
    let error = gpu.free_bytes().unwrap_err().to_string();
    assert!(error.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
}

#[test]
fn a_fault_inside_a_recorded_step_is_fatal() {
    let Some(device) = device() else { return };
    let mut executor = load(
        &gpu_of(&device),
        &trained_model(),
        limits(ResidentDtype::Bfloat16),
    );
    for _ in 0..2 {
        prefill(&mut executor, &[5]);
    }
    assert_eq!(executor.graphs(), 1);
    if !device.emulation_fault(7) {
        return;
    }
    let entries = vec![entry(1, &[6], 1, &[0])];
    let error = executor
        .execute(&Batch { entries }, &mut Logits::default())
        .unwrap_err();
    assert!(matches!(error, ExecuteError::Fatal(_)), "{error}");
    assert!(
        error.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"),
        "{error}"
    );
}

#[test]
fn a_fault_of_another_user_of_the_context_is_met_at_the_next_step() {
    let Some(device) = device() else { return };
    let gpu = gpu_of(&device);
    let mut victim = load(&gpu, &trained_model(), limits(ResidentDtype::Bfloat16));
    let mut culprit = load(&gpu, &trained_model(), limits(ResidentDtype::Bfloat16));
    prefill(&mut victim, &[5, 6, 7]);
    if !device.emulation_fault(0) {
        return;
    }
    fatal(&mut culprit);
    let reason = fatal(&mut victim);
    assert!(reason.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{reason}");
}
