//! Order: streams, events, graphs.

use half::bf16;
use kernels::driver::{Arena, Buffer, DriverError, Staging, Stream};
use kernels::params::{Address, EmbedParams, HopperGemmParams, TensorShape};
use kernels::plan;

use crate::harness::{Lab, on_every_schedule};

const WIDTH: usize = 64;

fn arena_start(arena: &Arena) -> Address {
    arena.part(0, 0).expect("a part").address()
}

/// A table of four rows whose values are all 1, all 2, and so on.
fn table(lab: &Lab) -> Buffer {
    let rows: Vec<bf16> = (0..4 * WIDTH)
        .map(|i| bf16::from_f32((i / WIDTH + 1) as f32))
        .collect();
    let table = lab.upload(&rows);
    lab.stream.synchronize().expect("an input");
    table
}

/// Queues `out = table[tokens]`.
fn embed(
    stream: &Stream,
    table: &Buffer,
    tokens: &Buffer,
    out: &Buffer,
) -> Result<(), DriverError> {
    let params = EmbedParams {
        table: table.address(),
        tokens: tokens.address(),
        out: out.address(),
        rows: 1,
        width: WIDTH as i32,
        vocabulary: 4,
        elsewhere: 0,
    };
    // SAFETY: the tests keep the buffers until they have synchronised.
    #[allow(unsafe_code)]
    unsafe {
        stream.launch(&plan::embed(1, WIDTH).expect("a plan"), &params)
    }
}

fn first(lab: &Lab, out: &Buffer) -> f32 {
    lab.read::<bf16>(out, 1)[0].to_f32()
}

#[test]
fn a_stream_that_waits_for_an_event_sees_what_came_before_it() {
    on_every_schedule("events", |lab| {
        let table = table(lab);
        let (other, mut tokens) = (lab.device.stream().expect("a stream"), lab.upload(&[0u32]));
        let out = lab.poisoned(WIDTH * 2);
        lab.stream.synchronize().expect("inputs");
        other.write(&mut tokens, &[2u32]).expect("a copy");
        let begin = other.record().expect("an event");
        let written = other.record().expect("an event");
        lab.stream.wait(&written).expect("a wait");
        embed(&lab.stream, &table, &tokens, &out).expect("a launch");
        assert_eq!(first(lab, &out), 3.0);
        assert!(written.milliseconds_since(&begin).expect("both happened") >= 0.0);
    });
}

#[test]
fn the_emulator_shows_a_missing_wait() {
    on_every_schedule("missing wait", |lab| {
        if lab.device.name() != "CPU emulation of CUDA" {
            return; // on a real device the answer would be a matter of luck
        }
        let table = table(lab);
        let (other, mut tokens) = (lab.device.stream().expect("a stream"), lab.upload(&[0u32]));
        let out = lab.poisoned(WIDTH * 2);
        lab.stream.synchronize().expect("inputs");
        other.write(&mut tokens, &[2u32]).expect("a copy");
        embed(&lab.stream, &table, &tokens, &out).expect("a launch");
        assert_eq!(
            first(lab, &out),
            1.0,
            "the copy on the other stream has not run"
        );
        other.synchronize().expect("the copy");
    });
}

#[test]
fn a_graph_runs_what_was_recorded_each_time_it_is_replayed() {
    on_every_schedule("graph", |lab| {
        let table = table(lab);
        let (mut tokens, out, warm) = (
            lab.upload(&[0u32]),
            lab.poisoned(WIDTH * 2),
            lab.poisoned(WIDTH * 2),
        );
        embed(&lab.stream, &table, &tokens, &warm).expect("loads the kernel");
        lab.stream.synchronize().expect("inputs");
        let graph = lab
            .stream
            .capture(|stream| embed(stream, &table, &tokens, &out))
            .expect("a graph");
        assert!(first(lab, &out).is_nan(), "recording does not run");
        for token in [3u32, 1, 0] {
            lab.stream.write(&mut tokens, &[token]).expect("a copy");
            // SAFETY: the buffers are alive.
            #[allow(unsafe_code)]
            unsafe { lab.stream.replay(&graph) }.expect("a replay");
            assert_eq!(first(lab, &out), token as f32 + 1.0);
        }
    });
}

#[test]
fn recording_fails_with_what_was_wrong_and_the_stream_goes_on() {
    on_every_schedule("failed capture", |lab| {
        let table = table(lab);
        let (tokens, out) = (lab.upload(&[1u32]), lab.poisoned(WIDTH * 2));
        lab.stream.synchronize().expect("inputs");
        let error = lab
            .stream
            .capture(|stream| {
                stream.read::<u32>(&out, 1 << 20)?;
                Ok(())
            })
            .expect_err("more than the buffer holds");
        assert_eq!(
            error.to_string(),
            "4194304 bytes do not fit a buffer of 128"
        );
        embed(&lab.stream, &table, &tokens, &out).expect("a launch");
        assert_eq!(first(lab, &out), 2.0);
    });
}

#[test]
fn an_arena_refuses_what_is_outside_it() {
    on_every_schedule("arena", |lab| {
        let arena = Arena::new(&lab.device, 4096).expect("an arena");
        let apart = lab.poisoned(WIDTH * 2);
        let part = arena.part(1024, 64).expect("a part");
        assert!(arena.part(4096, 1).is_err() && arena.part(usize::MAX, 2).is_err());
        let error = arena
            .write(&lab.stream, part, &[0u8; 65])
            .expect_err("one byte too many");
        assert!(
            error.to_string().starts_with("a write: address 0x"),
            "{error}"
        );
        assert_eq!(part.cut(60, 100).bytes(), 4);
        let params = EmbedParams {
            table: part.address(),
            tokens: part.address(),
            out: apart.address(),
            rows: 1,
            width: 8,
            vocabulary: 1,
            elsewhere: 0,
        };
        let launch = plan::embed(1, 8).expect("a plan");
        let error = arena
            .launch(&lab.stream, &launch, &params)
            .expect_err("an output of somebody else");
        assert!(
            error.to_string().starts_with("embed_bf16: address 0x"),
            "{error}"
        );
        // A tensor map hides where it points: the arena takes its own, of tensors that end before it does.
        let plan = plan::hopper_gemm(plan::Format::Bf16, 1, 8, 8, 1, 0).expect("a plan");
        let params = HopperGemmParams::default();
        let error = arena.launch(&lab.stream, &plan.launch, &params);
        assert!(matches!(error, Err(DriverError::Outside { .. })));
        let beyond =
            |rows| TensorShape::rows(plan::Format::Bf16, arena_start(&arena), rows, 8, 8, 16);
        let fits = arena.bytes() / 16;
        let map = arena.tensor_map(&beyond(fits)).expect("a map");
        assert_eq!(arena.tensor_map(&beyond(fits)).expect("the same map"), map);
        let error = arena.tensor_map(&beyond(fits + 1));
        assert!(matches!(error, Err(DriverError::Outside { .. })));
    });
}

#[test]
fn work_recorded_over_an_arena_outlives_its_owner() {
    on_every_schedule("arena graph", |lab| {
        let arena = Arena::new(&lab.device, 4096).expect("an arena");
        let other = Arena::new(&lab.device, 64).expect("an arena");
        let (table, tokens, out) = (
            arena.part(0, 256).expect("a part"),
            arena.part(256, 4).expect("a part"),
            arena.part(512, 16).expect("a part"),
        );
        let params = EmbedParams {
            table: table.address(),
            tokens: tokens.address(),
            out: out.address(),
            rows: 1,
            width: 8,
            vocabulary: 16,
            elsewhere: 0,
        };
        let launch = plan::embed(1, 8).expect("a plan");
        lab.device.load(&[launch]).expect("it is there");
        let values: Vec<u16> = (0..128).collect();
        arena.write(&lab.stream, table, &values).expect("a copy");
        let graph = arena
            .capture(&lab.stream, || arena.launch(&lab.stream, &launch, &params))
            .expect("a graph");
        arena.write(&lab.stream, tokens, &[3u32]).expect("a copy");
        arena.replay(&lab.stream, &graph).expect("a replay");
        assert!(other.replay(&lab.stream, &graph).is_err());
        let mut found = [0u16; 8];
        arena.read(&lab.stream, out, &mut found).expect("a row");
        assert_eq!(found.to_vec(), (24..32).collect::<Vec<u16>>());
        drop(arena);
        lab.stream
            .synchronize()
            .expect("the graph keeps the memory");
    });
}

#[test]
fn staged_bytes_arrive_whole_while_the_next_are_filled() {
    on_every_schedule("staging", |lab| {
        let arena = Arena::new(&lab.device, 64 * 100).expect("an arena");
        let whole = arena.part(0, 64 * 100).expect("all of it");
        let mut staging = [0, 1].map(|_| Staging::new(&lab.device, 64).expect("pinned memory"));
        for chunk in 0..100 {
            let buffer = &mut staging[chunk % 2];
            buffer.fill().expect("it left").fill(chunk as u8);
            buffer
                .send(&lab.stream, &arena, whole.cut(chunk * 64, 64), 64)
                .expect("a copy");
        }
        assert!(staging[0].send(&lab.stream, &arena, whole, 65).is_err());
        let mut found = vec![0u8; 6400];
        arena.read(&lab.stream, whole, &mut found).expect("bytes");
        assert!(
            found
                .iter()
                .enumerate()
                .all(|(i, byte)| *byte == (i / 64) as u8)
        );
    });
}

#[test]
fn an_injected_fault_is_met_by_the_kernel_it_was_meant_for() {
    on_every_schedule("injected", |lab| {
        let table = table(lab);
        let (tokens, out) = (lab.upload(&[1u32]), lab.poisoned(WIDTH * 2));
        lab.stream.synchronize().expect("inputs");
        if !lab.device.emulation_fault(1) {
            return; // a real device has no switch for it
        }
        embed(&lab.stream, &table, &tokens, &out).expect("a launch");
        assert_eq!(first(lab, &out), 2.0);
        embed(&lab.stream, &table, &tokens, &out).expect("a launch");
        let error = lab.stream.synchronize().expect_err("the second kernel");
        assert_eq!(
            error.to_string(),
            "cuStreamSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS (700): injected fault in kernel embed_bf16"
        );
    });
}
