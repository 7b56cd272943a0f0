//! Who may join a group: ranks that know its secret, however many others come to the door.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use engine_group::{GroupError, Joining, ProcessGroup, Secret, TcpGroup, Terms, join};
use engine_spec::Rank;

const PATIENCE: Duration = Duration::from_secs(20);

fn address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn secret(text: &str) -> Secret {
    Secret::new(text.as_bytes()).unwrap()
}

type Joined = JoinHandle<Result<TcpGroup, GroupError>>;

fn rank(
    leader: &str,
    index: u32,
    count: u32,
    secret: Option<&Secret>,
    patience: Duration,
) -> Joined {
    let joining = Joining {
        rank: Rank::new(index, count).unwrap(),
        leader: leader.into(),
        terms: Terms::default(),
        patience,
        timeout: PATIENCE,
        secret: secret.cloned(),
    };
    thread::spawn(move || join(&joining).map(|(group, _)| group))
}

fn connect(leader: &str) -> TcpStream {
    let start = Instant::now();
    loop {
        match TcpStream::connect(leader) {
            Ok(stream) => return stream,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn send(stream: &mut TcpStream, text: &[u8]) {
    let length = u32::try_from(text.len()).unwrap().to_le_bytes();
    stream.write_all(&[&length, text].concat()).unwrap();
}

/// A message, or none at the end of the stream.
fn receive(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut text = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut text).ok()?;
    Some(text)
}

#[test]
fn ranks_that_know_the_secret_meet() {
    let (leader, secret) = (address(), secret("0123456789abcdef, all know it"));
    let ranks: Vec<_> = (0..3)
        .map(|index| rank(&leader, index, 3, Some(&secret), PATIENCE))
        .collect();
    let parties: Vec<_> = ranks
        .into_iter()
        .map(|rank| thread::spawn(move || rank.join().unwrap().unwrap().barrier(PATIENCE).unwrap()))
        .collect();
    parties.into_iter().for_each(|it| it.join().unwrap());
}

#[test]
fn one_that_does_not_know_it_is_refused_at_once_and_told_why() {
    let ours = secret("0123456789abcdef, all know it");
    let theirs = secret("fedcba9876543210, some know it");
    for (host, guest, words) in [
        (Some(&ours), Some(&theirs), "its group secret differs"),
        (
            Some(&ours),
            None,
            "it has no group secret and this rank has one",
        ),
        (
            None,
            Some(&ours),
            "it has a group secret and this rank has none",
        ),
    ] {
        let leader = address();
        let host_rank = rank(&leader, 0, 2, host, Duration::from_secs(2));
        let error = rank(&leader, 1, 2, guest, PATIENCE).join().unwrap();
        let error = error.map(|_| ()).unwrap_err();
        assert!(matches!(error, GroupError::Refused { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains(words) && text.contains("--group-secret-file"),
            "{text}"
        );
        // Rank 0 goes on waiting: the right one may yet come.
        let error = host_rank.join().unwrap().map(|_| ()).unwrap_err();
        assert!(matches!(error, GroupError::NotComplete { .. }), "{error}");
    }
}

/// A stranger who claims to be rank 0 has no proof; one who sends back what it got has that of the wrong side.
#[test]
fn who_passes_for_rank_0_is_found_out() {
    let secret = secret("0123456789abcdef, all know it");
    for reflects in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let leader = listener.local_addr().unwrap().to_string();
        let rank = rank(&leader, 1, 2, Some(&secret), PATIENCE);
        let (mut stream, _) = listener.accept().unwrap();
        let knock: serde_json::Value =
            serde_json::from_slice(&receive(&mut stream).unwrap()).unwrap();
        let nonce = match reflects {
            true => knock["nonce"].clone(),
            false => serde_json::json!(vec![1; 32]),
        };
        let come = serde_json::json!({"Come": {"nonce": nonce, "proof": vec![2; 32]}});
        send(&mut stream, come.to_string().as_bytes());
        assert_eq!(
            receive(&mut stream),
            None,
            "it proves nothing to a stranger"
        );
        let error = rank.join().unwrap().map(|_| ()).unwrap_err();
        assert!(
            error.to_string().contains("its group secret differs"),
            "{error}"
        );
    }
}

/// Everything that a right rank once sent, sent again, lets nobody in.
#[test]
fn what_was_overheard_is_of_no_use() {
    let secret = secret("0123456789abcdef, all know it");
    let (leader, between) = (address(), TcpListener::bind("127.0.0.1:0").unwrap());
    let host = rank(&leader, 0, 2, Some(&secret), PATIENCE);
    let way = between.local_addr().unwrap().to_string();
    let guest = rank(&way, 1, 2, Some(&secret), PATIENCE);
    let (mut from_guest, _) = between.accept().unwrap();
    let mut to_host = connect(&leader);
    let knock = receive(&mut from_guest).unwrap();
    send(&mut to_host, &knock);
    send(&mut from_guest, &receive(&mut to_host).unwrap());
    let proof = receive(&mut from_guest).unwrap();
    let hello = receive(&mut from_guest).unwrap();
    drop((to_host, from_guest));

    let mut again = connect(&leader);
    send(&mut again, &knock);
    receive(&mut again).unwrap();
    send(&mut again, &proof);
    send(&mut again, &hello);
    assert_eq!(receive(&mut again), None);
    // The right one, on its own way, is let in.
    let right = rank(&leader, 1, 2, Some(&secret), PATIENCE);
    drop(between);
    let both = [host, right].map(|it| thread::spawn(move || it.join().unwrap().map(|_| ())));
    for it in both {
        it.join().unwrap().unwrap();
    }
    drop(guest);
}

/// Forty strangers who say nothing, each for as long as it may, would have taken more than three minutes one by one.
#[test]
fn strangers_who_say_nothing_keep_nobody_waiting() {
    let leader = address();
    let host = rank(&leader, 0, 2, None, PATIENCE);
    let silent: Vec<TcpStream> = (0..40).map(|_| connect(&leader)).collect();
    let guest = rank(&leader, 1, 2, None, PATIENCE);
    for it in [host, guest] {
        it.join().unwrap().unwrap();
    }
    drop(silent);
}

#[test]
fn a_secret_has_limits_and_says_them() {
    let plain = Secret::new(b"0123456789abcdef");
    assert_eq!(Secret::new(b"0123456789abcdef\n"), plain);
    assert_eq!(Secret::new(b"0123456789abcdef\r\n"), plain);
    assert!(Secret::new(&[b'x'; 4096]).is_ok());
    for bytes in [&b""[..], b"0123456789abcde\n", &[b'x'; 4097]] {
        let error = Secret::new(bytes).unwrap_err().to_string();
        assert!(error.contains("expected 16 to 4096"), "{error}");
    }
}
