//! Order: streams, events, graphs.

use half::bf16;
use kernels::driver::{Buffer, DriverError, Stream};
use kernels::params::EmbedParams;
use kernels::plan;

use crate::harness::{Lab, on_every_schedule};

const WIDTH: usize = 64;

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
        reserved: 0,
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
