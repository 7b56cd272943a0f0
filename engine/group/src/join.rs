//! How ranks find each other: every rank tells rank 0 what it is, rank 0 tells every rank where the others are.
//!
//! Rank 0 listens; a rank that comes says its place, what it is about to serve and how much its cache would hold. Rank 0
//! refuses one that differs and goes on waiting, since the right one may yet come. When all are there it sends the
//! addresses, each rank connects to those of lower number, and a barrier ends it. Messages are a length and JSON.
//!
//! Invariant: whoever connects and says nothing, or something else, costs seconds and changes nothing.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use engine_spec::Rank;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::GroupError;
use crate::group::ProcessGroup;
use crate::tcp::{TcpGroup, listed};

/// Of the messages below; a rank of another version is refused.
const PROTOCOL: u32 = 1;
/// Longest message.
const MESSAGE_BYTES_MAX: u32 = 64 << 10;
/// How long a connection may take to say what it is.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts to find somebody.
const RETRY: Duration = Duration::from_millis(100);

/// What all ranks must agree on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// Names and values that must be equal, such as the model's digest; compared in order.
    pub equal: Vec<(String, String)>,
    /// Blocks that this rank's cache has room for; the group uses the fewest.
    pub kv_blocks: u32,
}

/// Who wants to be part of a group, and where it is.
#[derive(Clone, Debug)]
pub struct Joining {
    /// This rank.
    pub rank: Rank,
    /// Host and port of rank 0.
    pub leader: String,
    /// What it brings.
    pub terms: Terms,
    /// How long all may take to come.
    pub patience: Duration,
    /// Silence after which a rank of the complete group counts as gone.
    pub timeout: Duration,
}

/// From a rank to rank 0.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    protocol: u32,
    rank: Rank,
    terms: Terms,
    /// Where ranks of higher number find it.
    port: u16,
}

/// From rank 0 to a rank.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Refused(String),
    /// All are there.
    Welcome(Welcome),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Welcome {
    /// By rank; rank 0's is not used.
    addresses: Vec<SocketAddr>,
    /// Proof between two ranks that both were welcome.
    key: u64,
    kv_blocks: u32,
}

/// From a rank to one of lower number.
#[derive(Debug, Serialize, Deserialize)]
struct Greeting {
    key: u64,
    rank: u32,
}

/// Waits until the group is complete; gives it, and the blocks that every rank's cache has room for.
///
/// # Errors
/// This rank is refused, another does not come in time, or no socket can be had.
pub fn join(joining: &Joining) -> Result<(TcpGroup, u32), GroupError> {
    match joining.rank.is_leader() {
        true => lead_at(joining, listen(&joining.leader)?),
        false => complete(joining, follow),
    }
}

/// The same for rank 0 that listens already.
///
/// # Errors
/// See [`join`].
pub fn lead_at(joining: &Joining, listener: TcpListener) -> Result<(TcpGroup, u32), GroupError> {
    complete(joining, |joining, deadline| {
        lead(joining, listener, deadline)
    })
}

fn complete(
    joining: &Joining,
    connect: impl FnOnce(&Joining, Instant) -> Result<Connected, GroupError>,
) -> Result<(TcpGroup, u32), GroupError> {
    let (streams, kv_blocks) = connect(joining, Instant::now() + joining.patience)?;
    let group = TcpGroup::new(joining.rank, streams, joining.timeout)?;
    group.barrier(joining.timeout)?;
    Ok((group, kv_blocks))
}

type Connected = (Vec<Option<TcpStream>>, u32);

/// A rank that said hello.
struct Guest {
    stream: TcpStream,
    address: SocketAddr,
    kv_blocks: u32,
}

fn lead(
    joining: &Joining,
    listener: TcpListener,
    deadline: Instant,
) -> Result<Connected, GroupError> {
    listener.set_nonblocking(true)?;
    let mut guests: Vec<Option<Guest>> = joining.rank.all().map(|_| None).collect();
    let missing = |guests: &[Option<Guest>]| {
        let ranks = (1..guests.len()).filter(|rank| guests[*rank].is_none());
        listed(ranks)
    };
    while guests.iter().skip(1).any(Option::is_none) {
        if Instant::now() >= deadline {
            return Err(GroupError::NotComplete {
                missing: missing(&guests),
                seconds: joining.patience.as_secs(),
            });
        }
        match listener.accept() {
            Ok((stream, from)) => {
                if let Err(problem) = receive_guest(joining, stream, from, &mut guests) {
                    tracing::warn!(%from, problem, "a rank was not let in");
                } else {
                    tracing::info!(%from, missing = missing(&guests), "a rank joined");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(RETRY),
            // The peer hung up before it was accepted, or the like.
            Err(error) => tracing::warn!(%error, "a connection could not be accepted"),
        }
    }
    let own = joining.terms.kv_blocks;
    let guests: Vec<Guest> = guests.into_iter().flatten().collect();
    let welcome = Welcome {
        addresses: std::iter::once(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))
            .chain(guests.iter().map(|guest| guest.address))
            .collect(),
        key: RandomState::new().hash_one(deadline),
        kv_blocks: guests
            .iter()
            .fold(own, |least, guest| least.min(guest.kv_blocks)),
    };
    let mut streams = vec![None];
    for (index, mut guest) in guests.into_iter().enumerate() {
        let lost = |source| GroupError::Lost {
            rank: index + 1,
            source,
        };
        write(&mut guest.stream, &Answer::Welcome(welcome.clone())).map_err(lost)?;
        streams.push(Some(guest.stream));
    }
    Ok((streams, welcome.kv_blocks))
}

/// Lets one rank in, or says why not, to it too.
fn receive_guest(
    joining: &Joining,
    mut stream: TcpStream,
    from: SocketAddr,
    guests: &mut [Option<Guest>],
) -> Result<(), String> {
    let broken = |error: io::Error| format!("its greeting could not be read: {error}");
    stream.set_nonblocking(false).map_err(broken)?;
    stream
        .set_write_timeout(Some(GREETING_TIMEOUT))
        .map_err(broken)?;
    let hello: Hello = read(&mut Greeted::new(&mut stream)).map_err(broken)?;
    let refusal = refusal(joining, &hello).or_else(|| {
        let earlier = guests.get(hello.rank.index())?.as_ref()?;
        is_open(&earlier.stream).then(|| {
            let (rank, address) = (hello.rank, earlier.address.ip());
            format!("{rank} joined already, from {address}; give each rank a number of its own")
        })
    });
    if let Some(reason) = refusal {
        // It may be gone; the refusal is logged here too.
        let _ = write(&mut stream, &Answer::Refused(reason.clone()));
        return Err(reason);
    }
    if let Some(place) = guests.get_mut(hello.rank.index()) {
        *place = Some(Guest {
            address: SocketAddr::new(from.ip(), hello.port),
            stream,
            kv_blocks: hello.terms.kv_blocks,
        });
    }
    Ok(())
}

/// Why a rank is not one of the group.
fn refusal(joining: &Joining, hello: &Hello) -> Option<String> {
    if hello.protocol != PROTOCOL {
        let theirs = hello.protocol;
        return Some(format!(
            "it speaks version {theirs} of the protocol between ranks, rank 0 version {PROTOCOL}; run the same engine on \
             every rank"
        ));
    }
    let (rank, world) = (hello.rank, joining.rank.count());
    if rank.count() != world {
        let theirs = rank.count();
        return Some(format!(
            "its --world-size is {theirs}, rank 0 has {world}; start every rank with the same"
        ));
    }
    if rank.is_leader() || Rank::new(rank.index() as u32, rank.count() as u32).is_none() {
        return Some(format!(
            "there is no room for {rank}; ranks are numbered from 0"
        ));
    }
    let (ours, theirs) = (&joining.terms.equal, &hello.terms.equal);
    let differs = ours.iter().find(|term| !theirs.contains(term));
    let (name, _) = differs.or_else(|| theirs.iter().find(|term| !ours.contains(term)))?;
    let find = |terms: &[(String, String)]| {
        let found = terms.iter().find(|(other, _)| other == name);
        found
            .map_or("nothing", |(_, value)| value.as_str())
            .to_owned()
    };
    Some(format!(
        "{name} is {} on {rank}, and {} on rank 0; start every rank with the same model and settings",
        find(theirs),
        find(ours)
    ))
}

/// Whether the other end is still there; it has nothing to say yet.
fn is_open(stream: &TcpStream) -> bool {
    let peek = || {
        stream.set_nonblocking(true)?;
        let found = stream.peek(&mut [0]);
        stream.set_nonblocking(false)?;
        found
    };
    match peek() {
        Ok(bytes) => bytes > 0,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

fn follow(joining: &Joining, deadline: Instant) -> Result<Connected, GroupError> {
    let mut last = "it was not tried".to_owned();
    loop {
        if Instant::now() >= deadline {
            return Err(GroupError::NoLeader {
                leader: joining.leader.clone(),
                seconds: joining.patience.as_secs(),
                last,
            });
        }
        match attempt(joining, deadline) {
            Ok(connected) => return Ok(connected),
            Err(Attempt::Final(error)) => return Err(error),
            // Rank 0 is not there yet, or has begun anew.
            Err(Attempt::Again(error)) => last = error.to_string(),
        }
        std::thread::sleep(RETRY);
    }
}

/// Why an attempt to join failed.
enum Attempt {
    Again(io::Error),
    Final(GroupError),
}

impl From<io::Error> for Attempt {
    fn from(error: io::Error) -> Self {
        Self::Again(error)
    }
}

fn attempt(joining: &Joining, deadline: Instant) -> Result<Connected, Attempt> {
    let mut leader = connect(&joining.leader, deadline)?;
    let host = leader.local_addr()?.ip();
    let listener = TcpListener::bind((host, 0))?;
    leader.set_read_timeout(Some(left(deadline)))?;
    leader.set_write_timeout(Some(GREETING_TIMEOUT))?;
    let hello = Hello {
        protocol: PROTOCOL,
        rank: joining.rank,
        terms: joining.terms.clone(),
        port: listener.local_addr()?.port(),
    };
    write(&mut leader, &hello)?;
    let welcome = match read(&mut leader)? {
        Answer::Welcome(welcome) => welcome,
        Answer::Refused(reason) => {
            return Err(Attempt::Final(GroupError::Refused {
                leader: joining.leader.clone(),
                reason,
            }));
        }
    };
    let (own, count) = (joining.rank.index(), joining.rank.count());
    let mut streams: Vec<Option<TcpStream>> = (0..count).map(|_| None).collect();
    streams[0] = Some(leader);
    // All were there a moment ago.
    let deadline = deadline.min(Instant::now() + joining.timeout);
    let greeting = Greeting {
        key: welcome.key,
        rank: own as u32,
    };
    for (rank, place) in streams.iter_mut().enumerate().take(own).skip(1) {
        let lost = |source| Attempt::Final(GroupError::Lost { rank, source });
        let address = welcome.addresses.get(rank).copied();
        let address = address.ok_or_else(|| lost(io::ErrorKind::NotFound.into()))?;
        let mut stream = TcpStream::connect_timeout(&address, left(deadline)).map_err(lost)?;
        write(&mut stream, &greeting).map_err(lost)?;
        *place = Some(stream);
    }
    accept_higher(joining, &listener, welcome.key, deadline, &mut streams)
        .map_err(Attempt::Final)?;
    Ok((streams, welcome.kv_blocks))
}

/// Takes the connections of the ranks of higher number.
fn accept_higher(
    joining: &Joining,
    listener: &TcpListener,
    key: u64,
    deadline: Instant,
    streams: &mut [Option<TcpStream>],
) -> Result<(), GroupError> {
    let own = joining.rank.index();
    listener.set_nonblocking(true)?;
    loop {
        let missing: Vec<usize> = (own + 1..streams.len())
            .filter(|rank| streams[*rank].is_none())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(GroupError::NotComplete {
                missing: listed(missing.into_iter()),
                seconds: joining.timeout.as_secs(),
            });
        }
        let Ok((mut stream, from)) = listener.accept() else {
            std::thread::sleep(RETRY / 10);
            continue;
        };
        let greet = |stream: &mut TcpStream| {
            stream.set_nonblocking(false)?;
            read::<Greeting>(&mut Greeted::new(stream))
        };
        match greet(&mut stream) {
            Ok(greeting) if greeting.key == key && missing.contains(&(greeting.rank as usize)) => {
                streams[greeting.rank as usize] = Some(stream);
            }
            Ok(_) => tracing::warn!(%from, "somebody who is no rank of this group connected"),
            Err(error) => tracing::warn!(%from, %error, "somebody connected and said nothing"),
        }
    }
}

/// Time until a deadline, and at least enough to find out that it is over.
fn left(deadline: Instant) -> Duration {
    let left = deadline.saturating_duration_since(Instant::now());
    left.max(Duration::from_millis(1))
}

fn connect(leader: &str, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in leader.to_socket_addrs()? {
        let patience = left(deadline).min(GREETING_TIMEOUT);
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Listens at the port of `leader`: on its address where that is a number, else on all, since a name of this machine may
/// not be known before the machine is ready.
fn listen(leader: &str) -> Result<TcpListener, GroupError> {
    let invalid = |problem: String| GroupError::Address {
        address: leader.to_owned(),
        problem,
    };
    let (host, port) = leader
        .rsplit_once(':')
        .ok_or_else(|| invalid("expected HOST:PORT".into()))?;
    let port: u16 = port
        .parse()
        .map_err(|_| invalid(format!("{port} is no port")))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let address = host.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    TcpListener::bind((address, port))
        .map_err(|error| invalid(format!("rank 0 cannot listen there: {error}")))
}

fn write(stream: &mut TcpStream, message: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&length.to_le_bytes(), text.as_slice()].concat())
}

/// A connection that has so long to say what it is: a stranger may send a byte now and then.
struct Greeted<'a> {
    stream: &'a mut TcpStream,
    until: Instant,
}

impl<'a> Greeted<'a> {
    fn new(stream: &'a mut TcpStream) -> Self {
        let until = Instant::now() + GREETING_TIMEOUT;
        Self { stream, until }
    }
}

impl Read for Greeted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if Instant::now() >= self.until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left(self.until)))?;
        self.stream.read(buffer)
    }
}

fn read<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > MESSAGE_BYTES_MAX {
        let problem = format!("a message of {length} bytes, the limit is {MESSAGE_BYTES_MAX}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    let mut text = vec![0; length as usize];
    stream.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}
