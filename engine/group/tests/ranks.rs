//! Ranks on the loopback interface: they find each other, get each other's pieces, and part with an error that says why.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use engine_group::{GroupError, Joining, Layout, ProcessGroup, TcpGroup, Terms, join};
use engine_spec::Rank;
use proptest::prelude::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn joining(leader: &str, index: u32, count: u32) -> Joining {
    Joining {
        rank: Rank::new(index, count).unwrap(),
        leader: leader.into(),
        terms: Terms {
            equal: vec![("model".into(), "m".into())],
            // The last rank has the least room.
            kv_blocks: 200 - index,
        },
        patience: PATIENCE,
        timeout: PATIENCE,
        secret: None,
    }
}

/// Runs `rank` on a thread for each of `count` ranks and gives what they returned.
fn ranks<T: Send + 'static>(
    count: u32,
    timeout: Duration,
    rank: impl Fn(TcpGroup) -> T + Clone + Send + 'static,
) -> Vec<T> {
    let leader = address();
    let threads: Vec<_> = (0..count)
        .map(|index| {
            let mut joining = joining(&leader, index, count);
            joining.timeout = timeout;
            let rank = rank.clone();
            thread::spawn(move || {
                let (group, kv_blocks) = join(&joining).unwrap();
                assert_eq!(kv_blocks, 201 - count, "the fewest");
                rank(group)
            })
        })
        .collect();
    threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect()
}

/// Rows of a table, of which each rank has its share of the columns.
#[derive(Clone, Copy, Debug)]
struct Columns {
    rows: usize,
    width: usize,
    ranks: u32,
}

impl Layout for Columns {
    fn piece(&self, rank: usize, index: usize) -> Option<Range<usize>> {
        let share = Rank::new(rank as u32, self.ranks)?.share(self.width);
        let row = index * self.width;
        (index < self.rows).then_some(row + share.start..row + share.end)
    }
}

/// What the whole table holds.
fn value(at: usize) -> u8 {
    (at % 251) as u8
}

/// The table with this rank's own columns, and zeros.
fn own_part(columns: Columns, rank: usize) -> Vec<u8> {
    let mut table = vec![0; columns.rows * columns.width];
    for piece in (0..).map_while(|index| columns.piece(rank, index)) {
        piece.for_each(|at| table[at] = value(at));
    }
    table
}

fn whole(columns: Columns) -> Vec<u8> {
    (0..columns.rows * columns.width).map(value).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn every_rank_gets_the_pieces_of_all(
        count in 1u32..6,
        rows in 0usize..70,
        width in 0usize..40,
    ) {
        let columns = Columns { rows, width, ranks: count };
        let found = ranks(count, PATIENCE, move |group| {
            let rank = group.rank().index();
            let mut all = own_part(columns, rank);
            group.all_gather(&mut all, &columns).unwrap();
            let mut leaders = own_part(columns, rank);
            group.gather(&mut leaders, &columns).unwrap();
            (all, leaders)
        });
        for (rank, (all, leaders)) in found.into_iter().enumerate() {
            prop_assert_eq!(&all, &whole(columns));
            let expected = if rank == 0 { whole(columns) } else { own_part(columns, rank) };
            prop_assert_eq!(&leaders, &expected);
        }
    }
}

#[test]
fn more_than_sockets_buffer_moves_both_ways_at_once() {
    // 24 MB from each rank to each other, in pieces of 12 KB.
    let columns = Columns {
        rows: 2000,
        width: 4 * 12_000,
        ranks: 4,
    };
    let found = ranks(4, PATIENCE, move |group| {
        let mut all = own_part(columns, group.rank().index());
        group.all_gather(&mut all, &columns).unwrap();
        all == whole(columns)
    });
    assert_eq!(found, [true; 4]);
}

#[test]
fn messages_of_rank_0_arrive_in_order_between_other_operations() {
    let columns = Columns {
        rows: 3,
        width: 8,
        ranks: 3,
    };
    let found = ranks(3, PATIENCE, move |group| {
        let mut heard = Vec::new();
        for length in [0, 1, 100_000, 7] {
            let mut message = vec![length as u8; length];
            if group.rank().is_leader() {
                group.broadcast(&message).unwrap();
            } else {
                while !group.receive(&mut message, PATIENCE).unwrap() {}
            }
            heard.push(message);
            let mut all = own_part(columns, group.rank().index());
            group.all_gather(&mut all, &columns).unwrap();
            assert_eq!(all, whole(columns));
            group.barrier(PATIENCE).unwrap();
        }
        // Nothing more comes.
        let mut rest = Vec::new();
        let quiet = Duration::from_millis(30);
        if group.rank().is_leader() {
            thread::sleep(10 * quiet);
        } else {
            assert!(!group.receive(&mut rest, quiet).unwrap());
        }
        group.barrier(PATIENCE).unwrap();
        heard
    });
    let expected = [0, 1, 100_000, 7].map(|length| vec![length as u8; length]);
    assert!(found.iter().all(|heard| *heard == expected));
}

#[test]
fn a_rank_that_is_gone_ends_the_group_on_all_others_by_name() {
    for gone in 0..3 {
        let columns = Columns {
            rows: 3,
            width: 9,
            ranks: 3,
        };
        let began = Instant::now();
        let found = ranks(3, PATIENCE, move |group| {
            if group.rank().index() == gone {
                return None;
            }
            let mut all = own_part(columns, group.rank().index());
            // The first one may leave before it was missed.
            let error = group.all_gather(&mut all, &columns).unwrap_err();
            let again = group.barrier(PATIENCE).unwrap_err();
            assert!(matches!(again, GroupError::Parted(_)), "{again}");
            Some(error)
        });
        assert!(
            began.elapsed() < PATIENCE / 2,
            "it was noticed, not waited for"
        );
        let errors: Vec<GroupError> = found.into_iter().flatten().collect();
        assert_eq!(errors.len(), 2);
        // Whoever notices first is then gone for the other.
        let names =
            |error: &GroupError| matches!(error, GroupError::Lost { rank, .. } if *rank == gone);
        assert!(errors.iter().any(names), "{errors:?}");
        let lost = |error: &GroupError| matches!(error, GroupError::Lost { .. });
        assert!(errors.iter().all(lost), "{errors:?}");
    }
}

#[test]
fn who_left_is_missed_between_two_operations() {
    let seen = ranks(2, PATIENCE, |group| {
        group.barrier(PATIENCE).unwrap();
        if group.rank().is_leader() {
            group.broadcast(b"a message").unwrap();
            group.leave("its device failed");
            let error = group.barrier(PATIENCE).unwrap_err().to_string();
            return format!(
                "{:?} {error}",
                group.check().map_err(|error| error.to_string())
            );
        }
        // Looking reads nothing: the message is there still.
        let deadline = Instant::now() + PATIENCE;
        let mut message = Vec::new();
        group.check().unwrap();
        while !group.receive(&mut message, PATIENCE).unwrap_or(false) {
            assert!(Instant::now() < deadline, "no message");
        }
        assert_eq!(message, b"a message");
        loop {
            if let Err(error) = group.check() {
                return error.to_string();
            }
            assert!(Instant::now() < deadline, "rank 0 is there still");
            thread::sleep(Duration::from_millis(1));
        }
    });
    assert!(seen[0].contains("its device failed"), "{}", seen[0]);
    assert!(seen[1].contains("rank 0 is gone"), "{}", seen[1]);
}

#[test]
fn a_rank_that_says_nothing_is_not_waited_for_longer_than_the_timeout() {
    let timeout = Duration::from_millis(400);
    let found = ranks(2, timeout, move |group| {
        let began = Instant::now();
        if !group.rank().is_leader() {
            // Alive, its socket open, but elsewhere.
            thread::sleep(3 * timeout);
            return None;
        }
        let error = group.all_gather(
            &mut [],
            &Columns {
                rows: 0,
                width: 1,
                ranks: 2,
            },
        );
        Some((error.unwrap_err(), began.elapsed()))
    });
    let (error, waited) = found.into_iter().flatten().next().unwrap();
    assert!(
        matches!(&error, GroupError::Silent { ranks, .. } if ranks == "1"),
        "{error}"
    );
    assert!(waited >= timeout && waited < 2 * timeout, "{waited:?}");
}

#[test]
fn ranks_that_do_different_things_find_out() {
    let columns = |rows| Columns {
        rows,
        width: 8,
        ranks: 2,
    };
    let found = ranks(2, PATIENCE, move |group| {
        let rows = 1 + group.rank().index();
        let mut all = own_part(columns(rows), group.rank().index());
        group.all_gather(&mut all, &columns(rows)).unwrap_err()
    });
    let out_of_step = |error: &GroupError| {
        matches!(
            error,
            GroupError::OutOfStep { .. } | GroupError::Lost { .. }
        )
    };
    assert!(found.iter().all(out_of_step), "{found:?}");
    assert!(
        found.iter().any(|e| e.to_string().contains("out of step")),
        "{found:?}"
    );
}

/// A leader of `count` ranks on a thread.
fn leader(leader: &str, count: u32) -> thread::JoinHandle<Result<(TcpGroup, u32), GroupError>> {
    let joining = joining(leader, 0, count);
    thread::spawn(move || join(&joining))
}

#[test]
fn a_rank_that_differs_is_refused_by_name_and_the_right_one_may_still_come() {
    let place = address();
    let leads = leader(&place, 2);
    let refused = |change: &dyn Fn(&mut Joining)| {
        let mut joining = joining(&place, 1, 2);
        change(&mut joining);
        match join(&joining) {
            Err(GroupError::Refused { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    };
    let reason = refused(&|joining| joining.terms.equal[0].1 = "other".into());
    assert!(
        reason.starts_with("model is other on rank 1 of 2, and m on rank 0"),
        "{reason}"
    );
    let reason = refused(&|joining| joining.terms.equal.push(("more".into(), "1".into())));
    assert!(reason.starts_with("more is 1 on"), "{reason}");
    let reason = refused(&|joining| joining.terms.equal.clear());
    assert!(reason.starts_with("model is nothing on"), "{reason}");
    let reason = refused(&|joining| joining.rank = Rank::new(1, 3).unwrap());
    assert!(
        reason.contains("--world-size is 3, rank 0 has 2"),
        "{reason}"
    );
    assert!(!leads.is_finished());
    let (group, _) = join(&joining(&place, 1, 2)).unwrap();
    leads.join().unwrap().unwrap();
    assert_eq!(group.rank().index(), 1);
}

#[test]
fn a_place_is_given_once() {
    let place = address();
    let leads = leader(&place, 3);
    let wait_for = |index| {
        let joining = joining(&place, index, 3);
        thread::spawn(move || join(&joining).map(|_| ()))
    };
    let mut both = vec![wait_for(1), wait_for(1)];
    let deadline = Instant::now() + PATIENCE;
    let refused = loop {
        assert!(Instant::now() < deadline, "none was refused");
        if let Some(index) = both.iter().position(thread::JoinHandle::is_finished) {
            break both.remove(index);
        }
        thread::sleep(Duration::from_millis(5));
    };
    let reason = match refused.join().unwrap() {
        Err(GroupError::Refused { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    assert!(reason.contains("rank 1 of 3 joined already"), "{reason}");
    wait_for(2).join().unwrap().unwrap();
    both.remove(0).join().unwrap().unwrap();
    leads.join().unwrap().unwrap();
}

#[test]
fn strangers_neither_join_nor_stop_the_group() {
    let place = address();
    let leads = leader(&place, 2);
    let connect = || loop {
        if let Ok(stream) = TcpStream::connect(&place) {
            return stream;
        }
        thread::sleep(Duration::from_millis(10));
    };
    let mut web = connect();
    web.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    drop(connect());
    let mut endless = connect();
    endless.write_all(&u32::MAX.to_le_bytes()).unwrap();
    let silent = connect();
    // A byte now and then is no reason to wait on.
    let mut slow = connect();
    slow.write_all(&60_000u32.to_le_bytes()).unwrap();
    let drips = thread::spawn(move || {
        while slow.write_all(b" ").is_ok() {
            thread::sleep(Duration::from_millis(200));
        }
    });
    let (group, _) = join(&joining(&place, 1, 2)).unwrap();
    assert_eq!(group.rank().count(), 2);
    leads.join().unwrap().unwrap();
    drips.join().unwrap();
    drop(silent);
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let mut alone = joining(&address(), 0, 3);
    alone.patience = Duration::from_millis(300);
    let error = join(&alone).unwrap_err().to_string();
    assert!(
        error.starts_with("rank 1, 2 did not join within 0 s"),
        "{error}"
    );
    let mut lost = joining(&address(), 1, 2);
    lost.patience = Duration::from_millis(300);
    let error = join(&lost).unwrap_err().to_string();
    assert!(
        error.starts_with("rank 0 did not answer at 127.0.0.1:"),
        "{error}"
    );
    for (leader, word) in [("here", "HOST:PORT"), ("h:x", "x is no port")] {
        let error = join(&joining(leader, 0, 2)).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_rank_finds_a_leader_that_starts_later_or_anew() {
    let place = address();
    let follower = joining(&place, 1, 2);
    let follows = thread::spawn(move || join(&follower).map(|(group, _)| group.rank()));
    thread::sleep(Duration::from_millis(200));
    // This one takes the greeting and ends.
    let first = TcpListener::bind(&place).unwrap();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        drop(first.accept());
        drop(first);
        sender.send(()).unwrap();
    });
    receiver.recv_timeout(PATIENCE).unwrap();
    let leads = leader(&place, 2);
    assert_eq!(follows.join().unwrap().unwrap().index(), 1);
    leads.join().unwrap().unwrap();
}
