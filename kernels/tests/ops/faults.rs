//! What the driver and its emulation say when something is wrong.

use std::path::Path;
use std::process::Command;

use kernels::driver::{Device, Driver, DriverError};
use kernels::emulation::Emulation;
use kernels::image::FATBINS;
use kernels::params::{self, EmbedParams, RmsNormParams};
use kernels::plan::{self, Format};

use crate::harness::{Lab, Random, build_folder, driver, seed};

/// A lab on the emulated driver; none on a real one, whose faults would not be reported like this.
fn emulated() -> Option<Lab> {
    let driver = driver()?;
    if !driver.emulation_schedule(0) {
        return None;
    }
    Some(lab(&driver))
}

fn lab(driver: &std::sync::Arc<Driver>) -> Lab {
    driver.emulation_schedule(0);
    let device = Device::open_apart(driver, 0).expect("a device");
    let stream = device.stream().expect("a stream");
    Lab {
        device,
        stream,
        schedule: 0,
        random: Random::new(seed(), "faults", 0),
    }
}

/// Launches and gives the error of the synchronisation, as a real device would.
fn fault<P: kernels::params::Params>(
    lab: &Lab,
    launch: &plan::Launch,
    params: &P,
) -> (i32, String) {
    // SAFETY: on the emulated driver a stray access is reported, not made.
    #[allow(unsafe_code)]
    let launched = unsafe { lab.stream.launch(launch, params) };
    launched.expect("a launch reports its own arguments only");
    match lab.stream.synchronize() {
        Err(DriverError::Call { code, detail, .. }) => (code, detail),
        other => panic!("{launch} should have failed: {other:?}"),
    }
}

#[test]
fn a_machine_without_a_driver_says_so() {
    let error =
        Driver::load(Some(Path::new("/nowhere/libcuda.so.1"))).expect_err("no driver there");
    assert_eq!(
        error.to_string(),
        "no CUDA driver: cannot load /nowhere/libcuda.so.1"
    );
}

#[test]
fn a_library_that_is_no_driver_says_what_it_lacks() {
    let error = Driver::load(Some(Path::new("libc.so.6"))).expect_err("not a driver");
    assert!(
        error.to_string().starts_with("the CUDA driver has no cu"),
        "{error}"
    );
}

#[test]
fn there_is_no_second_device() {
    let Some(driver) = driver() else { return };
    let error = Device::open(&driver, 99)
        .expect_err("no such device")
        .to_string();
    assert!(
        error.starts_with("there is no CUDA device 99; the driver knows "),
        "{error}"
    );
}

#[test]
fn kernels_take_the_arguments_that_the_host_sends() {
    let Some(driver) = driver() else { return };
    let compiled = driver.emulation_kernels();
    if compiled.is_empty() {
        return; // a real driver does not list kernels
    }
    let mut named: Vec<&str> = FATBINS
        .iter()
        .flat_map(|fatbin| fatbin.kernels)
        .copied()
        .collect();
    named.sort_unstable();
    let mut found: Vec<&str> = compiled.iter().map(|(name, ..)| name.as_str()).collect();
    found.sort_unstable();
    assert_eq!(
        named, found,
        "the fatbins and the emulated driver have the same kernels"
    );
    for (name, _, bytes) in &compiled {
        assert_eq!(*bytes, params_bytes(name), "{name}");
    }
}

fn params_bytes(kernel: &str) -> usize {
    let sizes: [(&str, usize); 24] = [
        ("copy_blocks", size_of::<params::CopyBlocksParams>()),
        ("share_columns", size_of::<params::ShareColumnsParams>()),
        ("hopper_gemm", size_of::<params::HopperGemmParams>()),
        ("hopper_mla_decode", size_of::<params::MlaDecodeParams>()),
        ("hopper_mla_prefill", size_of::<params::MlaPrefillParams>()),
        ("gemm", size_of::<params::GemmParams>()),
        ("grouped_gemm", size_of::<params::GemmParams>()),
        ("embed", size_of::<params::EmbedParams>()),
        ("rms_norm", size_of::<params::RmsNormParams>()),
        ("swiglu", size_of::<params::ActivationParams>()),
        ("quantise", size_of::<params::ActivationParams>()),
        ("gate", size_of::<params::GateParams>()),
        ("permute", size_of::<params::PermuteParams>()),
        ("combine", size_of::<params::CombineParams>()),
        ("rope", size_of::<params::RopeParams>()),
        ("greedy", size_of::<params::GreedyParams>()),
        ("mla_cache_write", size_of::<params::CacheWriteParams>()),
        ("mla_prefill", size_of::<params::MlaPrefillParams>()),
        ("gqa_cache_write", size_of::<params::GqaCacheWriteParams>()),
        ("gqa_decode", size_of::<params::GqaDecodeParams>()),
        ("gqa_prefill", size_of::<params::GqaDecodeParams>()),
        ("sample_adjust", size_of::<params::SampleAdjustParams>()),
        ("sample_f32", size_of::<params::SampleParams>()),
        ("logprobs", size_of::<params::LogprobsParams>()),
    ];
    match kernel {
        "mla_combine_bf16" => size_of::<params::MlaCombineParams>(),
        _ if kernel.starts_with("mla_decode") => size_of::<params::MlaDecodeParams>(),
        _ => {
            sizes
                .iter()
                .find(|(name, _)| kernel.starts_with(name))
                .unwrap_or_else(|| panic!("{kernel} has no arguments in params.rs"))
                .1
        }
    }
}

fn embed_params(table: u64, tokens: u64, out: u64) -> EmbedParams {
    EmbedParams {
        table: kernels::params::Address(table),
        tokens: kernels::params::Address(tokens),
        out: kernels::params::Address(out),
        rows: 2,
        width: 64,
        vocabulary: 4,
        elsewhere: 0,
    }
}

#[test]
fn an_access_past_the_end_of_a_buffer_is_reported_with_its_place() {
    let Some(lab) = emulated() else { return };
    let table = lab.upload(&[0u16; 4 * 64]);
    let tokens = lab.upload(&[1u32, 3]);
    let out = lab.poisoned(64 * 2); // one row too few
    let params = embed_params(table.address().0, tokens.address().0, out.address().0);
    let (code, report) = fault(&lab, &plan::embed(2, 64).expect("a plan"), &params);
    assert_eq!(code, 700);
    // Which of a vector's bytes is touched first is the compiler's choice.
    let words = " bytes into 128 bytes of device memory in kernel embed_bf16, block (1, 0, 0)";
    assert!(report.contains(words), "{report}");
    // As on a real device, the context is lost: nothing works any more.
    assert!(lab.device.allocate(16).is_err());
}

#[test]
fn a_misaligned_vector_is_reported() {
    let Some(lab) = emulated() else { return };
    let table = lab.upload(&[0u16; 4 * 64 + 8]);
    let tokens = lab.upload(&[1u32, 3]);
    let out = lab.poisoned(256);
    let params = embed_params(table.address().0 + 2, tokens.address().0, out.address().0);
    let (code, report) = fault(&lab, &plan::embed(2, 64).expect("a plan"), &params);
    assert_eq!(code, 716, "{report}");
}

#[test]
fn a_use_after_free_is_reported() {
    let Some(lab) = emulated() else { return };
    let table = lab.upload(&[0u16; 4 * 64]);
    let freed = table.address().0;
    drop(table);
    let tokens = lab.upload(&[1u32, 3]);
    let out = lab.poisoned(256);
    let params = embed_params(freed, tokens.address().0, out.address().0);
    let (code, report) = fault(&lab, &plan::embed(2, 64).expect("a plan"), &params);
    assert_eq!(code, 700);
    assert!(report.contains("freed device memory"), "{report}");
}

fn norm_fault(lab: &Lab, launch: &plan::Launch) -> (i32, String) {
    let x = lab.upload(&[0u16; 256]);
    let out = lab.poisoned(512);
    let params = RmsNormParams {
        x: x.address(),
        weight: x.address(),
        out: out.address(),
        rows: 1,
        width: 256,
        x_stride: 256,
        out_stride: 256,
        eps: 1e-6,
        ..RmsNormParams::default()
    };
    fault(lab, launch, &params)
}

#[test]
fn too_little_shared_memory_is_reported() {
    let Some(lab) = emulated() else { return };
    let launch = plan::Launch {
        shared_bytes: 16,
        ..plan::rms_norm(Format::Bf16, 1, 256).expect("a plan")
    };
    let (code, report) = norm_fault(&lab, &launch);
    assert_eq!(code, 700);
    assert!(
        report.contains("past the end of 16 bytes of shared memory"),
        "{report}"
    );
}

#[test]
fn a_barrier_that_some_threads_never_reach_is_a_deadlock() {
    if emulated().is_none() {
        return;
    }
    let header = Path::new("cuda/common/reduce.h");
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(header))
        .expect("the header");
    let broken = text.replacen(
        "    block_sync();\n",
        "    if (thread_index() < 128) block_sync();\n",
        1,
    );
    assert_ne!(text, broken, "the header has a barrier to break");
    let path = Emulation::new(&build_folder())
        .replace(header, broken)
        .only(&["rms_norm_bf16"])
        .build()
        .expect("it still compiles");
    let driver = Driver::load(Some(&path)).expect("it loads");
    let (code, report) = norm_fault(
        &lab(&driver),
        &plan::rms_norm(Format::Bf16, 1, 256).expect("a plan"),
    );
    assert_eq!(code, 702);
    assert!(
        report.starts_with("deadlock in kernel rms_norm_bf16"),
        "{report}"
    );
    assert!(report.contains("128 wait at a block barrier"), "{report}");
}

#[test]
fn a_launch_that_no_device_takes_is_refused_at_once() {
    let Some(lab) = emulated() else { return };
    let launch = plan::Launch {
        threads: 2048,
        ..plan::embed(1, 64).expect("a plan")
    };
    // SAFETY: nothing is launched.
    #[allow(unsafe_code)]
    let error = unsafe { lab.stream.launch(&launch, &embed_params(0, 0, 0)) }
        .expect_err("too many threads");
    assert!(
        error
            .to_string()
            .starts_with("cuLaunchKernel failed with CUDA_ERROR_INVALID_VALUE (1)"),
        "{error}"
    );
}

#[test]
fn an_unknown_kernel_is_named() {
    let Some(lab) = emulated() else { return };
    let launch = plan::Launch {
        kernel: "gemm_fp4",
        ..plan::embed(1, 64).expect("a plan")
    };
    // SAFETY: nothing is launched.
    #[allow(unsafe_code)]
    let error =
        unsafe { lab.stream.launch(&launch, &embed_params(0, 0, 0)) }.expect_err("no such kernel");
    assert_eq!(error.to_string(), "no fatbin has a kernel gemm_fp4");
}

/// The normal way to the driver: the loader finds `libcuda.so.1` by its name.
#[test]
fn the_emulated_driver_is_found_as_the_real_one_is() {
    if emulated().is_none() {
        return;
    }
    let library = Emulation::new(&build_folder())
        .build()
        .expect("built before");
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "faults::by_name", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", library.parent().expect("a folder"))
        .output()
        .expect("this test runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("found CPU emulation of CUDA"),
        "{text}"
    );
}

/// The emulator spreads blocks over threads when asked; the same tests must pass.
#[test]
fn blocks_may_run_on_several_threads() {
    if emulated().is_none() {
        return;
    }
    let library = Emulation::new(&build_folder())
        .build()
        .expect("built before");
    let status = Command::new(std::env::current_exe().expect("this test"))
        .args([
            "rows::norm_adds",
            "experts::permutation",
            "attention::a_decoded",
        ])
        .env("KERNELS_DRIVER", library)
        .env("CACHALOT_EMULATION_WORKERS", "3")
        .status()
        .expect("this test runs");
    assert!(status.success());
}

#[test]
#[ignore = "run by the_emulated_driver_is_found_as_the_real_one_is with a library path"]
fn by_name() {
    let driver = Driver::load(None).expect("a driver on the library path");
    let device = Device::open(&driver, 0).expect("a device");
    println!("found {}", device.name());
}
