//! NCCL, looked up at run time: what moves bytes between GPUs without host memory.
//!
//! Invariant: whatever is queued works on an arena that outlives it, no call is made through a missing symbol, and nothing
//! waits for another rank without an end: meeting has a deadline, and a stream that waits for one is left by
//! [`Communicator::abort`].
//!
//! Sums are of bits in which all ranks but one have zeros, so they are exact whatever order NCCL adds in.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use libloading::Library;

use super::{Arena, Device, DriverError, Handle, Part, Stream};

/// What the loader looks for when no path is given.
pub const NCCL_LIBRARY: &str = "libnccl.so.2";
/// `major * 10000 + minor * 100 + patch`; sends between ranks and errors that can be asked for came before it.
const VERSION_MIN: c_int = 21_800;
/// `ncclUint8`, `ncclInt32` and `ncclSum` of nccl.h.
const UINT8: c_int = 1;
const INT32: c_int = 2;
const SUM: c_int = 0;

functions! {
    "NCCL", "2.18";
    ncclGetVersion: fn(*mut c_int);
    ncclGetUniqueId: fn(*mut NcclId);
    ncclCommInitRank: fn(*mut Handle, c_int, NcclId, c_int);
    ncclCommGetAsyncError: fn(Handle, *mut c_int);
    ncclCommAbort: fn(Handle);
    ncclAllGather: fn(*const c_void, *mut c_void, usize, c_int, Handle, Handle);
    ncclAllReduce: fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Handle);
    ncclSend: fn(*const c_void, usize, c_int, c_int, Handle, Handle);
    ncclRecv: fn(*mut c_void, usize, c_int, c_int, Handle, Handle);
    ncclGroupStart: fn();
    ncclGroupEnd: fn();
    ncclGetErrorString: fn(c_int) -> *const c_char;
}

/// A loaded NCCL.
pub struct Nccl {
    functions: Functions,
    version: c_int,
    _library: Library,
}

impl fmt::Debug for Nccl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Nccl({})", self.version())
    }
}

/// What rank 0 makes and all ranks of a communicator need.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NcclId(pub [u8; 128]);

impl Nccl {
    /// Loads [`NCCL_LIBRARY`], or the library at `path`.
    ///
    /// # Errors
    /// There is none, or it is too old.
    pub fn load(path: Option<&Path>) -> Result<Arc<Self>, DriverError> {
        let path = path.unwrap_or(Path::new(NCCL_LIBRARY));
        // SAFETY: loading NCCL runs its initialisers, which is what the caller wants.
        let library = unsafe { Library::new(path) }.map_err(|source| DriverError::NoNccl {
            path: path.to_owned(),
            source,
        })?;
        let functions = Functions::load(&library)?;
        let mut version = 0;
        // SAFETY: writes one int.
        let code = unsafe { (functions.ncclGetVersion)(&mut version) };
        let nccl = Self {
            functions,
            version,
            _library: library,
        };
        nccl.check("ncclGetVersion", code)?;
        if version < VERSION_MIN {
            return Err(DriverError::OldNccl { version });
        }
        Ok(Arc::new(nccl))
    }

    /// Major, minor and patch.
    pub fn version(&self) -> String {
        let version = self.version;
        let (major, minor, patch) = (version / 10_000, version % 10_000 / 100, version % 100);
        format!("{major}.{minor}.{patch}")
    }

    /// A new identifier; rank 0 makes one and tells the others.
    ///
    /// # Errors
    /// NCCL found no network device to be called on.
    pub fn identifier(&self) -> Result<NcclId, DriverError> {
        let mut id = NcclId([0; 128]);
        // SAFETY: writes 128 bytes.
        let code = unsafe { (self.functions.ncclGetUniqueId)(&mut id) };
        self.check("ncclGetUniqueId", code).map(|()| id)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), DriverError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: NCCL keeps the string.
        let detail = unsafe {
            let text = (self.functions.ncclGetErrorString)(code);
            match text.is_null() {
                true => "unknown error".to_owned(),
                false => CStr::from_ptr(text).to_string_lossy().into_owned(),
            }
        };
        Err(DriverError::Nccl { call, code, detail })
    }
}

/// NCCL's handle; it may go from thread to thread.
struct Raw(Handle);

// SAFETY: NCCL wants one call at a time, not one thread; a communicator is not Sync.
unsafe impl Send for Raw {}

/// The ranks of a replica, as NCCL knows them. All must make the same calls in the same order.
pub struct Communicator {
    nccl: Arc<Nccl>,
    device: Arc<Device>,
    raw: Raw,
    rank: usize,
    ranks: usize,
    is_aborted: AtomicBool,
}

impl fmt::Debug for Communicator {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Communicator({} of {})", self.rank, self.ranks)
    }
}

impl Communicator {
    /// Meets the other ranks, each on a device of its own.
    ///
    /// # Errors
    /// A rank did not come within `patience`, or NCCL cannot connect them. NCCL may then still wait in a thread of its own,
    /// until the process ends.
    pub fn meet(
        nccl: &Arc<Nccl>,
        device: &Arc<Device>,
        id: NcclId,
        (rank, ranks): (usize, usize),
        patience: Duration,
    ) -> Result<Self, DriverError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let (library, on) = (nccl.clone(), device.clone());
        let meet = move || {
            on.make_current()?;
            let mut raw = Raw(ptr::null_mut());
            // SAFETY: writes one handle.
            let code = unsafe {
                (library.functions.ncclCommInitRank)(&mut raw.0, ranks as c_int, id, rank as c_int)
            };
            library.check("ncclCommInitRank", code).map(|()| raw)
        };
        let waiting = thread::Builder::new().name("nccl".to_owned());
        let late = || DriverError::Late {
            what: "the meeting of the ranks over NCCL",
            seconds: patience.as_secs(),
        };
        // A receiver that has gone wants nothing any more.
        let spawned = waiting.spawn(move || drop(sender.send(meet())));
        if spawned.is_err() {
            return Err(late());
        }
        let raw = receiver.recv_timeout(patience).map_err(|_| late())??;
        Ok(Self {
            nccl: nccl.clone(),
            device: device.clone(),
            raw,
            rank,
            ranks,
            is_aborted: AtomicBool::new(false),
        })
    }

    /// Queues that every rank gets all slots of `slots`, one for each rank; this rank's is filled already.
    ///
    /// # Errors
    /// The slots are not in the arena or not a whole number for each rank, or NCCL failed.
    pub fn all_gather(
        &self,
        arena: &Arena,
        stream: &Stream,
        slots: Part,
    ) -> Result<(), DriverError> {
        let each = self.each(arena, slots)?;
        let to = slots.address().0;
        let from = to + (self.rank * each) as u64;
        self.call("ncclAllGather", |functions, group| {
            // SAFETY: the slots are in an arena that outlives the stream's work, checked above.
            unsafe {
                (functions.ncclAllGather)(
                    from as *const c_void,
                    to as *mut c_void,
                    each,
                    UINT8,
                    group,
                    stream.handle,
                )
            }
        })
    }

    /// The same for rank 0 alone.
    ///
    /// # Errors
    /// See [`Communicator::all_gather`].
    pub fn gather(&self, arena: &Arena, stream: &Stream, slots: Part) -> Result<(), DriverError> {
        let each = self.each(arena, slots)?;
        let slot = |rank: usize| slots.address().0 + (rank * each) as u64;
        // SAFETY: no arguments.
        self.call("ncclGroupStart", |functions, _| unsafe {
            (functions.ncclGroupStart)()
        })?;
        let peers = if self.rank == 0 { 1..self.ranks } else { 0..1 };
        let mut sent = Ok(());
        for peer in peers {
            let (call, to) = (peer as c_int, stream.handle);
            // SAFETY: the slots are in an arena that outlives the stream's work, checked above.
            sent = sent.and(match self.rank {
                0 => self.call("ncclRecv", |functions, group| unsafe {
                    (functions.ncclRecv)(slot(peer) as *mut c_void, each, UINT8, call, group, to)
                }),
                own => self.call("ncclSend", |functions, group| unsafe {
                    (functions.ncclSend)(slot(own) as *const c_void, each, UINT8, call, group, to)
                }),
            });
        }
        // Whatever came of them: a group that was begun is ended.
        // SAFETY: no arguments.
        let ended = self.call("ncclGroupEnd", |functions, _| unsafe {
            (functions.ncclGroupEnd)()
        });
        sent.and(ended)
    }

    /// Queues that all ranks get the sums, as 32-bit integers, of what they have in `part`.
    ///
    /// # Errors
    /// The part is not in the arena or not whole integers, or NCCL failed.
    pub fn add_bits(&self, arena: &Arena, stream: &Stream, part: Part) -> Result<(), DriverError> {
        arena.check("a sum of ranks", part, part.bytes())?;
        if !part.bytes().is_multiple_of(4) {
            let (asked, bytes) = (part.bytes(), part.bytes() / 4 * 4);
            return Err(DriverError::Size { asked, bytes });
        }
        let at = part.address().0;
        self.call("ncclAllReduce", |functions, group| {
            // SAFETY: the part is in an arena that outlives the stream's work, checked above.
            unsafe {
                (functions.ncclAllReduce)(
                    at as *const c_void,
                    at as *mut c_void,
                    part.bytes() / 4,
                    INT32,
                    SUM,
                    group,
                    stream.handle,
                )
            }
        })
    }

    /// Whether an operation failed since it was queued.
    ///
    /// # Errors
    /// One did: a rank is gone, or the ranks are not at the same call.
    pub fn check(&self) -> Result<(), DriverError> {
        let mut failure = 0;
        self.call("ncclCommGetAsyncError", |functions, group| {
            // SAFETY: writes one int.
            unsafe { (functions.ncclCommGetAsyncError)(group, &mut failure) }
        })?;
        self.nccl.check("a collective", failure)
    }

    /// Ends whatever waits for another rank. Nothing can be queued after it.
    pub fn abort(&self) {
        if self.is_aborted.swap(true, Ordering::Relaxed) {
            return;
        }
        if self.device.make_current().is_ok() {
            // SAFETY: the handle came from ncclCommInitRank and is not used again: every call looks at the flag.
            // What it returns is of no use to anybody: the communicator is gone either way.
            unsafe { (self.nccl.functions.ncclCommAbort)(self.raw.0) };
        }
    }

    fn each(&self, arena: &Arena, slots: Part) -> Result<usize, DriverError> {
        arena.check("slots of ranks", slots, slots.bytes())?;
        let each = slots.bytes() / self.ranks;
        match each * self.ranks == slots.bytes() {
            true => Ok(each),
            false => Err(DriverError::Size {
                asked: slots.bytes(),
                bytes: each * self.ranks,
            }),
        }
    }

    fn call(
        &self,
        name: &'static str,
        call: impl FnOnce(&Functions, Handle) -> c_int,
    ) -> Result<(), DriverError> {
        if self.is_aborted.load(Ordering::Relaxed) {
            let (code, detail) = (0, "the communicator was aborted".to_owned());
            return Err(DriverError::Nccl {
                call: name,
                code,
                detail,
            });
        }
        self.device.make_current()?;
        self.nccl
            .check(name, call(&self.nccl.functions, self.raw.0))
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // Destroying one waits for the other ranks, which may be gone.
        self.abort();
    }
}
