//! How ranks find each other: every rank tells rank 0 what it is, rank 0 tells every rank where the others are.
//!
//! Rank 0 listens; a rank that comes is let in at the [`crate::door`], says its place, what it is about to serve and how
//! much its cache would hold. Rank 0 refuses one that differs and goes on waiting, since the right one may yet come. When
//! all are there it sends the addresses, each rank connects to those of lower number, and a barrier ends it.
//!
//! Invariant: whoever connects and says nothing, or something else, changes nothing and delays nobody else.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use engine_spec::Rank;
use serde::{Deserialize, Serialize};

use crate::door::{Arrival, Door, GREETING_TIMEOUT, Shut, enter, read_until, write};
use crate::error::GroupError;
use crate::group::ProcessGroup;
use crate::secret::{Nonce, Secret, nonce};
use crate::tcp::{TcpGroup, listed};

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
    /// What only ranks of this group know; without one, whoever reaches the ports can join.
    pub secret: Option<Secret>,
}

/// From a rank to rank 0.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
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
    key: Nonce,
    kv_blocks: u32,
}

/// From a rank to one of lower number.
#[derive(Debug, Serialize, Deserialize)]
struct Greeting {
    key: Nonce,
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
    let mut door = Door::new(&listener, joining.secret.clone())?;
    let mut guests: Vec<Option<Guest>> = joining.rank.all().map(|_| None).collect();
    let missing = |guests: &[Option<Guest>]| {
        let ranks = (1..guests.len()).filter(|rank| guests[*rank].is_none());
        listed(ranks)
    };
    while guests.iter().skip(1).any(Option::is_none) {
        let Some(arrival) = door.next(deadline) else {
            return Err(GroupError::NotComplete {
                missing: missing(&guests),
                seconds: joining.patience.as_secs(),
            });
        };
        let from = arrival.from;
        match take_guest(joining, arrival, &mut guests) {
            Err(problem) => tracing::warn!(%from, problem, "a rank was not let in"),
            Ok(()) => tracing::info!(%from, missing = missing(&guests), "a rank joined"),
        }
    }
    let own = joining.terms.kv_blocks;
    let guests: Vec<Guest> = guests.into_iter().flatten().collect();
    let welcome = Welcome {
        addresses: std::iter::once(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))
            .chain(guests.iter().map(|guest| guest.address))
            .collect(),
        key: nonce()?,
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

/// Gives one rank its place, or says why not, to it too.
fn take_guest(
    joining: &Joining,
    arrival: Arrival<Hello>,
    guests: &mut [Option<Guest>],
) -> Result<(), String> {
    let Arrival {
        mut stream,
        from,
        said: hello,
    } = arrival;
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
    let refused = |reason| {
        Attempt::Final(GroupError::Refused {
            leader: joining.leader.clone(),
            reason,
        })
    };
    match enter(&mut leader, joining.secret.as_ref(), deadline) {
        Ok(()) => {}
        Err(Shut::Refused(reason)) => return Err(refused(reason)),
        Err(Shut::Broken(error)) => return Err(Attempt::Again(error)),
    }
    let hello = Hello {
        rank: joining.rank,
        terms: joining.terms.clone(),
        port: listener.local_addr()?.port(),
    };
    write(&mut leader, &hello)?;
    let welcome: Welcome = match read_until(&mut leader, deadline)? {
        Answer::Welcome(welcome) => welcome,
        Answer::Refused(reason) => return Err(refused(reason)),
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
        enter(&mut stream, joining.secret.as_ref(), deadline).map_err(|shut| match shut {
            Shut::Broken(error) => lost(error),
            Shut::Refused(reason) => {
                let problem = format!("it refuses this rank: {reason}");
                Attempt::Final(GroupError::OutOfStep { rank, problem })
            }
        })?;
        write(&mut stream, &greeting).map_err(lost)?;
        *place = Some(stream);
    }
    accept_higher(joining, &listener, &welcome.key, deadline, &mut streams)
        .map_err(Attempt::Final)?;
    Ok((streams, welcome.kv_blocks))
}

/// Takes the connections of the ranks of higher number.
fn accept_higher(
    joining: &Joining,
    listener: &TcpListener,
    key: &Nonce,
    deadline: Instant,
    streams: &mut [Option<TcpStream>],
) -> Result<(), GroupError> {
    let own = joining.rank.index();
    let mut door: Door<'_, Greeting> = Door::new(listener, joining.secret.clone())?;
    loop {
        let missing: Vec<usize> = (own + 1..streams.len())
            .filter(|rank| streams[*rank].is_none())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let Some(Arrival { stream, from, said }) = door.next(deadline) else {
            return Err(GroupError::NotComplete {
                missing: listed(missing.into_iter()),
                seconds: joining.timeout.as_secs(),
            });
        };
        if said.key == *key && missing.contains(&(said.rank as usize)) {
            streams[said.rank as usize] = Some(stream);
        } else {
            tracing::warn!(%from, "somebody who is no rank of this group connected");
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
