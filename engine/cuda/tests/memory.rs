//! The device's own count of what a model takes, against the plan that sized its pod. One test, so that nobody else
//! allocates from the same device.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use engine_core::{Batch, Executor, Logits};
use engine_load::read_config;
use engine_memory::MemoryRequest;
use engine_spec::Dtype;
use support::{driver, entry, gpu, load, plan, prefill, random_model, request, trained_model};

/// Of the plan.
const DIFFERENCE_MAX: f64 = 0.01;
/// What a real driver may take beside it for the code of kernels and for graphs, of the gigabyte that is left to it.
const CODE_BYTES: u64 = 512 << 20;

#[test]
fn the_device_misses_as_many_bytes_as_were_planned() {
    let Some(gpu) = gpu() else { return };
    let emulated = driver().is_some_and(|driver| driver.emulation_schedule(0));
    for dir in [trained_model(), random_model("v2-cuda")] {
        let config = read_config(&dir).unwrap();
        let wanted = MemoryRequest {
            max_model_len: Some(256),
            ..request(Dtype::Auto)
        };
        let (plan, limits) = plan(&config, wanted);
        let before = gpu.free_bytes().unwrap();
        let mut executor = load(&gpu, &dir, limits);
        prefill(&mut executor, &[5, 6, 7]);
        for start in 3..5 {
            let entries = vec![entry(1, &[8], start, &[0])];
            executor
                .execute(&Batch { entries }, &mut Logits::default())
                .unwrap();
        }
        assert_eq!(executor.graphs(), 1, "a step was recorded");
        let used = before - gpu.free_bytes().unwrap();
        let of_rank = plan.per_rank;
        let planned = of_rank.weights_bytes + of_rank.kv_bytes + of_rank.workspace_bytes;
        println!("{}: {used} bytes of {planned} planned", dir.display());
        let room = (planned as f64 * DIFFERENCE_MAX) as u64;
        let code = if emulated { 0 } else { CODE_BYTES };
        assert!(
            used + room >= planned && used <= planned + room + code,
            "{}: {used} bytes are used and {planned} were planned",
            dir.display()
        );
    }
}
