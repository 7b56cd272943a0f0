//! Both kinds of products: whole models answer as on the CPU, and company, chunks and padding change no byte.

use std::path::Path;

use crate::support::{
    bits, build_folder, device, entry, greedy, limits, load, prefill, random_model, step,
    trained_golden, trained_model,
};
use engine_core::Executor;
use engine_cpu::{CpuExecutor, CpuLimits, Isa};
use engine_cuda::{CudaExecutor, CudaLimits, Gpu, ProductChoice, Products};
use engine_load::{Progress, read_config};
use engine_memory::{ResidentDtype, resident_dtype};
use engine_spec::{Dtype, Quantization};
use kernels::driver::{self, Driver};
use kernels::emulation::Emulation;

const BOTH: [Products; 2] = [Products::Portable, Products::Hopper];

/// A GPU that multiplies that way; none where there is no driver, or no wgmma.
fn gpu_with(products: Products) -> Option<Gpu> {
    let device = device()?;
    if products == Products::Hopper && device.capability() != (9, 0) {
        return None;
    }
    Some(Gpu::with_products(device, ProductChoice::Fixed(products)).unwrap())
}

fn wide(limits: CudaLimits) -> CudaLimits {
    CudaLimits {
        kv_blocks: 128,
        model_len_max: 256,
        batched_tokens_max: 256,
        ..limits
    }
}

#[test]
fn a_hopper_device_that_agrees_gets_hoppers_products() {
    let Some(device) = device() else { return };
    let hopper = device.capability() == (9, 0);
    let gpu = Gpu::with_products(device, ProductChoice::Auto).unwrap();
    assert_eq!(gpu.fallback(), None);
    assert_eq!(gpu.products() == Products::Hopper, hopper);
}

/// The driver's Hopper products leave a slice of long sums out.
#[test]
fn a_hopper_device_that_multiplies_wrong_gets_the_portable_products() {
    let hopper = device().is_some_and(|device| device.capability() == (9, 0));
    if std::env::var_os("KERNELS_DRIVER").is_some() || !hopper {
        return;
    }
    let source = Path::new("cuda/sm90/hopper_gemm.h");
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
    let text = std::fs::read_to_string(kernels.join(source)).unwrap();
    let (right, wrong) = ("int slice = 1;", "int slice = 2;");
    assert!(text.contains(right));
    let emulation = Emulation::new(&build_folder()).replace(source, text.replace(right, wrong));
    let driver = Driver::load(Some(&emulation.build().unwrap())).unwrap();
    let gpu = Gpu::over(driver::Device::open_apart(&driver, 0).unwrap()).unwrap();
    assert_eq!(gpu.products(), Products::Portable);
    let why = gpu.fallback().unwrap();
    assert!(
        why.contains("Hopper's products of") && why.contains("differ at row"),
        "{why}"
    );
    let prompt = &trained_golden().prompts[0];
    let mut executor = load(&gpu, &trained_model(), limits(ResidentDtype::Bfloat16));
    let found = greedy(&mut executor, &prompt.tokens, 4);
    assert_eq!(found, prompt.greedy[..4]);
}

#[test]
fn the_trained_model_answers_as_on_the_cpu_with_either_products() {
    let dir = trained_model();
    let config = read_config(&dir).unwrap();
    let cpu_limits = CpuLimits {
        resident: ResidentDtype::Bfloat16,
        kv_blocks: 64,
        block_size: 8,
        model_len_max: 256,
        batched_tokens_max: 128,
        sequences_max: 6,
        draft_tokens: 0,
        threads: 2,
        isa: Isa::best(),
    };
    let mut cpu = CpuExecutor::load(&dir, &config, cpu_limits, &Progress::default()).unwrap();
    let prompt = &trained_golden().prompts[0];
    let count = prompt.greedy.len();
    let on_cpu = greedy(&mut cpu, &prompt.tokens, count);
    assert_eq!(on_cpu, prompt.greedy);
    for products in BOTH {
        let Some(gpu) = gpu_with(products) else {
            continue;
        };
        let mut executor = load(&gpu, &dir, limits(ResidentDtype::Bfloat16));
        let found = greedy(&mut executor, &prompt.tokens, count);
        assert_eq!(found, on_cpu, "{products}");
    }
}

fn prompt(length: usize, salt: usize, vocabulary: usize) -> Vec<u32> {
    (0..length)
        .map(|i| ((i * 7919 + salt * 104_729) % (vocabulary - 4) + 2) as u32)
        .collect()
}

/// One sequence in chunks that meet every tile of rows, in company and alone, then token by token through graphs.
fn company_changes_nothing(executor: &mut CudaExecutor, what: &str) {
    let vocabulary = executor.vocabulary();
    let tokens = prompt(150, 1, vocabulary);
    let others = prompt(100, 2, vocabulary);
    let whole = bits(&prefill(executor, &tokens));
    let blocks: Vec<u32> = (0..32).map(|i| 32 + i * 5 % 32).collect();
    let other_blocks: Vec<u32> = (64..96).collect();
    let mut done = 0;
    let mut other_done = 0;
    // Rows of a step: 1 to 128 and more, so tiles of 16, 32, 64 and 128.
    for (count, company) in [(1, 0), (9, 11), (20, 38), (90, 51), (28, 0), (1, 0), (1, 0)] {
        let mut entries = vec![entry(1, &tokens[done..done + count], done, &blocks)];
        if company > 0 {
            let part = &others[other_done..other_done + company];
            entries.insert(0, entry(2, part, other_done, &other_blocks));
        }
        done += count;
        other_done += company;
        let row = step(executor, entries).pop().unwrap();
        if done == tokens.len() {
            assert_eq!(bits(&row), whole, "{what}");
        }
    }
    assert_eq!(done, tokens.len());
    // Two sequences decode together: a recorded step of two rows.
    let next = [tokens[3]];
    let alone = step(executor, vec![entry(3, &next, done, &blocks)]).remove(0);
    let other = entry(2, &next, other_done, &other_blocks);
    let both = step(executor, vec![other, entry(3, &next, done, &blocks)]);
    assert_eq!(bits(&both[1]), bits(&alone), "{what}");
}

#[test]
fn company_changes_no_byte_with_either_products() {
    for products in BOTH {
        for model in ["v2-cuda", "v3-fp8-cuda", "qwen3-moe-cuda"] {
            let Some(gpu) = gpu_with(products) else {
                continue;
            };
            let dir = random_model(model);
            let config = read_config(&dir).unwrap();
            let resident = resident_dtype(
                Dtype::Auto,
                Quantization::None,
                &config,
                engine_spec::Device::Nvidia,
            );
            let mut executor = load(&gpu, &dir, wide(limits(resident)));
            company_changes_nothing(&mut executor, &format!("{model}, {products}"));
        }
    }
}
