use super::*;

#[test]
fn plans_print_what_they_launch() {
    let lines = [
        gemm(Format::Bf16, 1, 2112, 7168, 1),
        gemm(Format::Fp8, 32, 24_576, 1536, 1),
        gemm(Format::Fp8, 129, 576, 7168, 1),
        grouped_gemm(Format::Fp8, 512, 4096, 7168, 256),
        grouped_gemm(Format::Bf16, 24_576, 2816, 2048, 64),
        mla_decode(Format::Bf16, 64, 128, 512, 64, mla_splits(4096)),
        hopper_mla_decode(64, 128, 512, 64, mla_splits(4096), Tables::Own),
        hopper_mla_decode(65, 16, 512, 64, mla_splits(4096), Tables::Shared),
        mla_prefill(2, 4096, 16, 128, 64, 128),
        hopper_mla_prefill(2, 4096, 16, 128, 64, 128),
        gqa_decode(8, 64, 4, 128, mla_splits(4096)),
        gqa_decode(1, 36, 2, 64, 1),
        gqa_prefill(13, 64, 4, 128, 2),
        gqa_prefill(9, 14, 2, 64, 1),
    ]
    .map(|plan| plan.expect("a supported shape").to_string());
    assert_eq!(
        lines,
        [
            "gemm_bf16_stream16 grid 132 x 1 x 1, 256 threads, 8192 bytes shared",
            "gemm_fp8_stream32 grid 1536 x 1 x 1, 256 threads, 16384 bytes shared",
            "gemm_fp8_tile grid 9 x 3 x 1, 128 threads, 49152 bytes shared",
            "grouped_gemm_fp8_stream16 grid 256 x 288 x 1, 256 threads, 8192 bytes shared",
            "grouped_gemm_bf16_tile grid 44 x 448 x 1, 128 threads, 49152 bytes shared",
            "mla_decode_bf16_512_64 grid 64 x 8 x 8, 128 threads, 132608 bytes shared",
            "hopper_mla_decode_bf16_512_64 grid 64 x 2 x 8, 384 threads, 230400 bytes shared",
            "hopper_mla_decode_bf16_512_64 grid 17 x 1 x 8, 384 threads, 230400 bytes shared",
            "mla_prefill_bf16_128_64_128 grid 64 x 16 x 2, 128 threads, 68608 bytes shared",
            "hopper_mla_prefill_bf16_128_64_128 grid 32 x 16 x 2, 384 threads, 214016 bytes shared",
            "gqa_decode_bf16_128 grid 8 x 4 x 8, 128 threads, 104960 bytes shared",
            "gqa_decode_bf16_64 grid 1 x 4 x 1, 128 threads, 55808 bytes shared",
            "gqa_prefill_bf16_128 grid 7 x 4 x 2, 128 threads, 105472 bytes shared",
            "gqa_prefill_bf16_64 grid 3 x 2 x 1, 128 threads, 56320 bytes shared",
        ]
    );
}

#[test]
fn a_shape_that_no_kernel_takes_is_refused_with_its_number() {
    let refused = [
        gemm(Format::Bf16, 4, 64, 100, 1),
        gemm(Format::Fp8, 4, 64, 72, 1),
        gemm(Format::Fp8, 0, 64, 128, 1),
        gemm(Format::Fp8, 4, 64, 128, 2),
        rms_norm(Format::Bf16, 1, 16_392),
        gate(1, 600, 8, 8, 4),
        gate(1, 256, 8, 7, 4),
        mla_decode(Format::Bf16, 1, 16, 256, 64, 1),
        mla_decode(Format::Fp8, 1, 16, 64, 32, 1),
        hopper_mla_decode(1, 16, 256, 64, 1, Tables::Own),
        hopper_mla_decode(1, 0, 512, 64, 1, Tables::Shared),
        mla_cache_write(Format::Fp8, 1, 64, 32),
        mla_prefill(1, 64, 16, 64, 64, 128),
        hopper_mla_prefill(1, 64, 16, 64, 64, 128),
        hopper_mla_prefill(0, 64, 16, 128, 64, 128),
        gqa_decode(1, 32, 8, 96, 1),
        gqa_prefill(1, 32, 8, 96, 1),
        gqa_prefill(1, 32, 5, 128, 1),
        gqa_decode(1, 32, 5, 128, 1),
        gqa_cache_write(1, 4, 4, 256),
    ]
    .map(|plan| plan.expect_err("an unsupported shape").to_string());
    assert_eq!(
        refused[0],
        "gemm: k is 100, but the kernels take whole 16-byte vectors: multiples of 8 in bf16, of 16 in fp8"
    );
    assert!(refused.iter().all(|message| message.contains(" is ")));
}

#[test]
fn every_tile_of_a_grouped_gemm_has_a_place() {
    // floor(before / rows) + expert is where permute puts an expert's tiles: they never overlap.
    for counts in [vec![0, 1, 63, 64, 65, 0, 200], vec![5; 40], vec![0, 0, 129]] {
        let rows: usize = counts.iter().sum();
        let tile = grouped_tile_rows(rows, counts.len());
        let mut before = 0;
        let mut free = 0;
        for (expert, count) in counts.iter().enumerate() {
            let first = before / tile + expert;
            assert!(first >= free);
            free = first + count.div_ceil(tile);
            before += count;
            assert!(free <= before / tile + expert + 1);
        }
        assert!(free <= grouped_tiles(rows, counts.len()));
    }
}
