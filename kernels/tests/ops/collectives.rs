//! What ranks get from each other over NCCL, each rank on a thread of its own: the bytes, their order with the stream's other
//! work, and the ends of waits for ranks that are gone, silent, or at another call.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kernels::driver::{Arena, Communicator, Device, DriverError, Nccl, NcclId, Part, Stream};

use crate::harness::{driver, nccl};

const PATIENCE: Duration = Duration::from_secs(60);
const SLOT: usize = 4096;

/// A rank with memory for a slot of each.
struct Rank {
    index: usize,
    count: usize,
    group: Communicator,
    arena: Arena,
    stream: Stream,
}

impl Rank {
    fn slots(&self) -> Part {
        self.arena.part(0, SLOT * self.count).expect("a part")
    }

    fn fill(&self, rank: usize, value: u8) {
        let slot = self.slots().cut(rank * SLOT, SLOT);
        self.arena.fill(&self.stream, slot, value).expect("a fill");
    }

    /// The first byte of each slot, which must be those of the whole slot.
    fn values(&self) -> Vec<u8> {
        let mut all = vec![0u8; SLOT * self.count];
        let read = self.arena.read(&self.stream, self.slots(), &mut all);
        read.expect("the slots");
        let slots = all.chunks(SLOT);
        slots
            .map(|slot| {
                assert!(slot.iter().all(|byte| *byte == slot[0]), "a mixed slot");
                slot[0]
            })
            .collect()
    }

    /// Asks until the stream is idle or an operation has failed.
    fn settle(&self) -> Result<(), DriverError> {
        let deadline = Instant::now() + PATIENCE;
        while !self.stream.is_idle()? {
            self.group.check()?;
            assert!(Instant::now() < deadline, "the stream stands still");
            thread::sleep(Duration::from_millis(1));
        }
        self.group.check()
    }
}

/// Runs `role` as each of `count` ranks; what the last one returns comes last.
fn among<T: Send>(count: usize, role: impl Fn(Rank) -> T + Sync) -> Option<Vec<T>> {
    let (driver, nccl) = (driver()?, nccl()?);
    let id = nccl.identifier().expect("an identifier");
    let on = |index: usize| match driver.emulation_schedule(0) {
        true => Device::open_apart(&driver, 0),
        false => Device::open(&driver, index as u32),
    };
    // A real NCCL wants a device for each rank.
    if on(count - 1).is_err() {
        eprintln!("skipped: fewer than {count} devices");
        return None;
    }
    Some(thread::scope(|scope| {
        let ranks: Vec<_> = (0..count)
            .map(|index| {
                let (role, nccl, device) = (&role, &nccl, on(index).expect("a device"));
                scope.spawn(move || role(rank(nccl, &device, id, (index, count))))
            })
            .collect();
        let ends = ranks.into_iter().map(|rank| rank.join().expect("a rank"));
        ends.collect()
    }))
}

fn rank(nccl: &Arc<Nccl>, device: &Arc<Device>, id: NcclId, place: (usize, usize)) -> Rank {
    let (index, count) = place;
    Rank {
        index,
        count,
        group: Communicator::meet(nccl, device, id, place, PATIENCE).expect("the others"),
        arena: Arena::new(device, SLOT * count).expect("an arena"),
        stream: device.stream().expect("a stream"),
    }
}

#[test]
fn every_rank_gets_all_slots_in_the_order_of_the_stream() {
    for count in [1, 2, 3, 4] {
        among(count, |rank| {
            let (arena, stream, slots) = (&rank.arena, &rank.stream, rank.slots());
            let all: Vec<u8> = (0..count).map(|index| 10 + index as u8).collect();
            arena.fill(stream, slots, 0xEE).expect("poison");
            rank.fill(rank.index, 10 + rank.index as u8);
            rank.group.all_gather(arena, stream, slots).expect("queued");
            // Queued behind it: what it reads is not this.
            rank.settle().expect("all slots");
            assert_eq!(rank.values(), all);
            // Recorded once, it moves what is there at each replay.
            let gather = || rank.group.all_gather(arena, stream, slots);
            let graph = arena.capture(stream, gather).expect("a graph");
            for turn in [1, 2] {
                rank.fill(rank.index, turn * 50 + rank.index as u8);
                arena.replay(stream, &graph).expect("a replay");
                let all: Vec<u8> = (0..count).map(|index| turn * 50 + index as u8).collect();
                assert_eq!(rank.values(), all, "replay {turn}");
            }
        });
    }
}

#[test]
fn rank_0_alone_gets_what_is_gathered_and_bits_of_one_rank_are_whole_after_a_sum() {
    among(3, |rank| {
        let (arena, stream, slots) = (&rank.arena, &rank.stream, rank.slots());
        arena.fill(stream, slots, 0xEE).expect("poison");
        rank.fill(rank.index, 7 + rank.index as u8);
        rank.group.gather(arena, stream, slots).expect("queued");
        let mut own = vec![0xEE; 3];
        own[rank.index] = 7 + rank.index as u8;
        let all = if rank.index == 0 { vec![7, 8, 9] } else { own };
        assert_eq!(rank.values(), all);
        // Negative zeros, NaNs and what a float's addition would round: they are bits.
        let bits = [0x8000_0000_u32, 0x7fc0_1234, 0xffff_ffff, 1];
        let part = slots.cut(0, 4 * 3 * bits.len());
        let own = part.cut(4 * rank.index * bits.len(), 4 * bits.len());
        arena.fill(stream, part, 0).expect("zeros");
        arena.write(stream, own, &bits).expect("a copy");
        rank.group.add_bits(arena, stream, part).expect("queued");
        let mut found = [0u32; 12];
        arena.read(stream, part, &mut found).expect("sums");
        assert_eq!(found.chunks(4).collect::<Vec<_>>(), [&bits; 3]);
    });
}

#[test]
fn parts_that_are_not_whole_or_of_another_arena_are_refused() {
    among(2, |rank| {
        let Rank {
            group,
            arena,
            stream,
            ..
        } = &rank;
        let odd = rank.slots().cut(0, 3);
        let refused = group.all_gather(arena, stream, odd).unwrap_err();
        assert!(matches!(refused, DriverError::Size { .. }), "{refused}");
        let refused = group.add_bits(arena, stream, odd).unwrap_err();
        assert!(matches!(refused, DriverError::Size { .. }), "{refused}");
        let other = Arena::new(&another_device(), 64).expect("an arena");
        let apart = other.part(0, 64).expect("a part");
        for refused in [
            group.all_gather(arena, stream, apart).unwrap_err(),
            group.gather(arena, stream, apart).unwrap_err(),
            group.add_bits(arena, stream, apart).unwrap_err(),
        ] {
            assert!(matches!(refused, DriverError::Outside { .. }), "{refused}");
        }
    });
}

fn another_device() -> Arc<Device> {
    let driver = driver().expect("a driver");
    Device::open_apart(&driver, 0).expect("a device")
}

#[test]
fn a_rank_that_is_gone_silent_or_elsewhere_ends_the_wait_of_the_others() {
    // It goes without a word.
    let ends = among(2, |rank| match rank.index {
        1 => String::new(),
        _ => {
            let queued = rank
                .group
                .all_gather(&rank.arena, &rank.stream, rank.slots());
            queued.expect("queued");
            rank.settle().unwrap_err().to_string()
        }
    });
    let Some(ends) = ends else { return };
    assert!(ends[0].contains("remote process exited"), "{}", ends[0]);
    // It is there and does nothing: whoever waits gives up, and can queue no more.
    let done = std::sync::Barrier::new(2);
    let ends = among(2, |rank| {
        let mut end = String::new();
        if rank.index == 0 {
            let gather = || {
                rank.group
                    .all_gather(&rank.arena, &rank.stream, rank.slots())
            };
            gather().expect("queued");
            for _ in 0..20 {
                assert!(!rank.stream.is_idle().expect("a stream"));
                thread::sleep(Duration::from_millis(5));
            }
            rank.group.abort();
            rank.stream.synchronize().expect("nothing waits any more");
            end = gather().unwrap_err().to_string();
        }
        done.wait();
        end
    });
    let ends = ends.expect("as before");
    assert!(ends[0].contains("was aborted"), "{}", ends[0]);
    // It calls for something else.
    let ends = among(2, |rank| {
        let (group, arena, stream) = (&rank.group, &rank.arena, &rank.stream);
        arena.fill(stream, rank.slots(), 0).expect("zeros");
        let queued = match rank.index {
            0 => group.all_gather(arena, stream, rank.slots()),
            _ => group.add_bits(arena, stream, rank.slots()),
        };
        queued.expect("queued");
        rank.settle().map_err(|error| error.to_string())
    });
    let ends = ends.expect("as before");
    assert!(ends.iter().all(Result::is_err), "{ends:?}");
    let found = |words: &str| {
        ends.iter()
            .flat_map(|end| end.as_ref().err())
            .any(|end| end.contains(words))
    };
    assert!(found("invalid usage"), "{ends:?}");
}

#[test]
fn a_meeting_ends_when_a_rank_does_not_come() {
    let (Some(driver), Some(nccl)) = (driver(), nccl()) else {
        return;
    };
    let device = Device::open_apart(&driver, 0).expect("a device");
    let id = nccl.identifier().expect("an identifier");
    let soon = Duration::from_millis(300);
    let error = Communicator::meet(&nccl, &device, id, (0, 2), soon).expect_err("nobody came");
    assert!(matches!(error, DriverError::Late { .. }), "{error}");
    let error = Nccl::load(Some("/no/such/libnccl.so.2".as_ref())).expect_err("no file");
    assert_eq!(
        error.to_string(),
        "no NCCL: cannot load /no/such/libnccl.so.2"
    );
    let error = Nccl::load(Some("libc.so.6".as_ref())).expect_err("no NCCL");
    let words = "NCCL has no ncclGetVersion; it is older than 2.18";
    assert_eq!(error.to_string(), words);
}
