//! Which kernels attend: Hopper's give the answers of the portable ones, and give way where they do not.

use std::path::Path;

use crate::support::{
    build_folder, gpu, greedy, limits, load, prefill, random_model, relative_error, trained_golden,
    trained_model,
};
use engine_cuda::{AttentionChoice, AttentionKernels, CudaExecutor, Gpu};
use engine_memory::ResidentDtype;
use kernels::driver::{Device, Driver};
use kernels::emulation::Emulation;

fn loaded(gpu: Gpu, choice: AttentionChoice, dir: &Path) -> CudaExecutor {
    load(
        &gpu.with_attention(choice),
        dir,
        limits(ResidentDtype::Bfloat16),
    )
}

const PORTABLE: AttentionChoice = AttentionChoice::Forced(AttentionKernels::Portable);
const HOPPER: AttentionChoice = AttentionChoice::Forced(AttentionKernels::Hopper);

/// The kernels that `auto` takes on this device.
fn of_auto(gpu: &Gpu) -> AttentionKernels {
    if gpu.capability() == (9, 0) {
        AttentionKernels::Hopper
    } else {
        AttentionKernels::Portable
    }
}

#[test]
fn auto_takes_hoppers_kernels_where_they_are_right() {
    let Some(gpu) = gpu() else { return };
    let wanted = of_auto(&gpu);
    let executor = loaded(gpu, AttentionChoice::Auto, &trained_model());
    let chosen = executor.attention();
    println!("{chosen}");
    assert_eq!(chosen.kernels, wanted, "{chosen}");
    assert!(!chosen.reason.is_empty());
}

#[test]
fn both_kinds_of_kernels_answer_alike() {
    for choice in [PORTABLE, HOPPER] {
        let Some(gpu) = gpu() else { return };
        if gpu.capability() != (9, 0) {
            return;
        }
        let mut executor = loaded(gpu, choice, &trained_model());
        for prompt in trained_golden().prompts.iter().take(2) {
            let found = greedy(&mut executor, &prompt.tokens, prompt.greedy.len());
            assert_eq!(found, prompt.greedy, "{choice:?}");
        }
    }
}

#[test]
fn the_two_kinds_differ_in_the_last_bits_only() {
    let (Some(first), Some(second)) = (gpu(), gpu()) else {
        return;
    };
    if first.capability() != (9, 0) {
        return;
    }
    let tokens: Vec<u32> = (0..70).map(|i| (i * 31 + 5) % 90 + 2).collect();
    let dir = random_model("v2-cuda");
    let portable = prefill(&mut loaded(first, PORTABLE, &dir), &tokens);
    let hopper = prefill(&mut loaded(second, HOPPER, &dir), &tokens);
    // They are two kernels: equal bits would mean that the choice has no effect.
    assert_ne!(portable, hopper);
    let error = relative_error(&hopper, &portable);
    assert!(error <= 3e-2, "relative error {error:e}");
}

/// A driver whose Hopper kernel puts every two neighbouring values in the wrong order.
fn broken() -> Option<Gpu> {
    let source = Path::new("cuda/sm90/hopper_mla_decode_bf16.cu");
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
    let text = std::fs::read_to_string(kernels.join(source)).unwrap();
    let (right, wrong) = (
        "{out[i] * factor, out[i + 1] * factor}",
        "{out[i + 1] * factor, out[i] * factor}",
    );
    assert!(text.contains(right));
    let emulation = Emulation::new(&build_folder()).replace(source, text.replace(right, wrong));
    let driver = Driver::load(Some(&emulation.build().unwrap())).unwrap();
    let device = Device::open_apart(&driver, 0).unwrap();
    Some(Gpu::over(device).unwrap())
}

#[test]
fn auto_gives_way_to_the_portable_kernels_where_hoppers_are_wrong() {
    let hopper = gpu().is_some_and(|gpu| gpu.capability() == (9, 0));
    if std::env::var_os("KERNELS_DRIVER").is_some() || !hopper {
        return;
    }
    let Some(gpu) = broken() else { return };
    let prompt = &trained_golden().prompts[0];
    let mut executor = loaded(gpu, AttentionChoice::Auto, &trained_model());
    let chosen = executor.attention().clone();
    assert_eq!(chosen.kernels, AttentionKernels::Portable, "{chosen}");
    println!("{chosen}");
    assert!(chosen.reason.contains("differ by"), "{chosen}");
    let found = greedy(&mut executor, &prompt.tokens, 4);
    assert_eq!(found, prompt.greedy[..4]);
}
