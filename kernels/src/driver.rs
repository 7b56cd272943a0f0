//! The CUDA driver, looked up at run time.
//!
//! Invariant: no call panics and none is made through a missing symbol; a machine without a driver gets an error that says
//! so. Buffers, modules and streams keep their device alive.
//!
//! Surprise: the driver reports a kernel's fault at the next call, whatever that call is, and from then on at every one.

// Foreign functions and device addresses have no safe form. Everything unsafe of this crate is in this module.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;

use libloading::Library;
use thiserror::Error;

use crate::params::TensorMap;

/// Calls the driver with the device's context current.
macro_rules! call {
    ($device:expr, $name:ident($($argument:expr),* $(,)?)) => {{
        let device: &$crate::driver::Device = $device;
        // SAFETY: the context is alive as long as the device.
        device.driver.check("cuCtxSetCurrent", unsafe {
            (device.driver.functions.cuCtxSetCurrent)(device.context)
        })?;
        // SAFETY: arguments are owned by the caller for the length of the call and match the declaration above.
        device.driver.check(stringify!($name), unsafe { (device.driver.functions.$name)($($argument),*) })
    }};
}

/// What the loader looks for when no path is given.
pub const LIBRARY: &str = "libcuda.so.1";
/// The oldest driver that runs our fatbins.
const DRIVER_VERSION_MIN: c_int = 13_000;

/// Why the driver or the device cannot be used, or failed.
#[derive(Debug, Error)]
pub enum DriverError {
    /// There is no driver on this machine.
    #[error("no CUDA driver: cannot load {path}")]
    NoDriver {
        /// What was tried.
        path: PathBuf,
        /// The loader's words.
        #[source]
        source: libloading::Error,
    },
    /// A library lacks a function.
    #[error("{library} has no {symbol}; it is older than {needed}")]
    NoSymbol {
        /// Which library.
        library: &'static str,
        /// The oldest version that has them all.
        needed: &'static str,
        /// The function.
        symbol: &'static str,
        /// The loader's words.
        #[source]
        source: libloading::Error,
    },
    /// The driver is too old for the fatbins.
    #[error("the CUDA driver is {}.{}, but the kernels need 13.0: upgrade the driver to 580 or later", version / 1000, version % 1000 / 10)]
    OldDriver {
        /// As the driver counts it.
        version: i32,
    },
    /// The device is too old for the kernels.
    #[error("{name} has compute capability {major}.{minor}, but the kernels need 8.0 or later")]
    OldDevice {
        /// The device.
        name: String,
        /// Of its capability.
        major: u32,
        /// Of its capability.
        minor: u32,
    },
    /// No such device.
    #[error("there is no CUDA device {ordinal}; the driver knows {count}")]
    NoDevice {
        /// Asked for.
        ordinal: u32,
        /// How many there are.
        count: i32,
    },
    /// A call failed.
    #[error("{call} failed with {name} ({code}): {detail}")]
    Call {
        /// The function.
        call: &'static str,
        /// The driver's code.
        code: i32,
        /// Its name.
        name: String,
        /// The driver's words.
        detail: String,
    },
    /// A kernel that no fatbin has.
    #[error("no fatbin has a kernel {kernel}")]
    NoKernel {
        /// Its name.
        kernel: String,
    },
    /// A fatbin that holds nothing for the device, or not the kernel, or is damaged.
    #[error(
        "kernel {kernel} cannot be had from fatbin {fatbin}: {reason}. The fatbin does not fit compute capability {major}.{minor} or this program: use a release that does, or build it anew with make kernels"
    )]
    Image {
        /// The kernel.
        kernel: &'static str,
        /// What should hold it.
        fatbin: &'static str,
        /// Of the device's capability.
        major: u32,
        /// Of the device's capability.
        minor: u32,
        /// What the driver said.
        #[source]
        reason: Box<DriverError>,
    },
    /// A place outside the arena.
    #[error("{what}: address {address:#x} with {bytes} bytes is outside the arena")]
    Outside {
        /// The kernel or the copy.
        what: &'static str,
        /// Where.
        address: u64,
        /// How many.
        bytes: usize,
    },
    /// NCCL is not on this machine.
    #[error("no NCCL: cannot load {path}")]
    NoNccl {
        /// What was tried.
        path: PathBuf,
        /// The loader's words.
        #[source]
        source: libloading::Error,
    },
    /// NCCL is too old.
    #[error("NCCL is {}.{}.{}, but 2.18 or later is needed", version / 10_000, version % 10_000 / 100, version % 100)]
    OldNccl {
        /// As NCCL counts it.
        version: i32,
    },
    /// A call of NCCL failed.
    #[error("{call} failed: {detail} ({code})")]
    Nccl {
        /// The function.
        call: &'static str,
        /// NCCL's code.
        code: i32,
        /// NCCL's words.
        detail: String,
    },
    /// Something did not come to its end in time.
    #[error("{what} did not end within {seconds} seconds")]
    Late {
        /// What.
        what: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// More values than a buffer holds.
    #[error("{asked} bytes do not fit a buffer of {bytes}")]
    Size {
        /// Of the copy.
        asked: usize,
        /// Of the buffer.
        bytes: usize,
    },
}

type Handle = *mut c_void;

/// Functions of a library, all of them there or none used. Their types are the declarations in its header.
macro_rules! functions {
    ($library:literal, $needed:literal; $($name:ident: fn($($argument:ty),*) $(-> $result:ty)?;)+) => {
        #[allow(non_snake_case)]
        struct Functions { $($name: functions!(@type ($($argument),*) $($result)?)),+ }
        impl Functions {
            fn load(library: &Library) -> Result<Self, DriverError> {
                Ok(Self { $($name: {
                    // SAFETY: the type is the function's declaration, see above.
                    let symbol = unsafe { library.get(stringify!($name).as_bytes()) };
                    *symbol.map_err(|source| DriverError::NoSymbol { library: $library, needed: $needed, symbol: stringify!($name), source })?
                }),+ })
            }
        }
    };
    (@type ($($argument:ty),*)) => { unsafe extern "C" fn($($argument),*) -> c_int };
    (@type ($($argument:ty),*) $result:ty) => { unsafe extern "C" fn($($argument),*) -> $result };
}

mod arena;
mod device;
mod nccl;
mod staging;
mod stream;

pub use arena::{Arena, ArenaGraph, Part};
pub use device::{Buffer, Device, Plain};
pub use nccl::{Communicator, NCCL_LIBRARY, Nccl, NcclId};
pub use staging::Staging;
pub use stream::{Event, Graph, Stream};

functions! {
    "the CUDA driver", "13.0";
    cuInit: fn(c_uint);
    cuDriverGetVersion: fn(*mut c_int);
    cuDeviceGetCount: fn(*mut c_int);
    cuDeviceGet: fn(*mut c_int, c_int);
    cuDeviceGetName: fn(*mut c_char, c_int, c_int);
    cuDeviceGetUuid_v2: fn(*mut [u8; 16], c_int);
    cuDeviceGetAttribute: fn(*mut c_int, c_int, c_int);
    cuDevicePrimaryCtxRetain: fn(*mut Handle, c_int);
    cuDevicePrimaryCtxRelease_v2: fn(c_int);
    cuCtxCreate_v2: fn(*mut Handle, c_uint, c_int);
    cuCtxDestroy_v2: fn(Handle);
    cuCtxSetCurrent: fn(Handle);
    cuMemGetInfo_v2: fn(*mut usize, *mut usize);
    cuMemAlloc_v2: fn(*mut u64, usize);
    cuMemFree_v2: fn(u64);
    cuMemHostAlloc: fn(*mut Handle, usize, c_uint);
    cuMemFreeHost: fn(Handle);
    cuMemcpyHtoDAsync_v2: fn(u64, *const c_void, usize, Handle);
    cuMemcpyDtoHAsync_v2: fn(*mut c_void, u64, usize, Handle);
    cuMemsetD8Async: fn(u64, u8, usize, Handle);
    cuStreamCreate: fn(*mut Handle, c_uint);
    cuStreamDestroy_v2: fn(Handle);
    cuStreamSynchronize: fn(Handle);
    cuStreamQuery: fn(Handle);
    cuStreamWaitEvent: fn(Handle, Handle, c_uint);
    cuStreamBeginCapture_v2: fn(Handle, c_int);
    cuStreamEndCapture: fn(Handle, *mut Handle);
    cuEventCreate: fn(*mut Handle, c_uint);
    cuEventDestroy_v2: fn(Handle);
    cuEventRecord: fn(Handle, Handle);
    cuEventSynchronize: fn(Handle);
    cuEventElapsedTime_v2: fn(*mut f32, Handle, Handle);
    cuGraphInstantiateWithFlags: fn(*mut Handle, Handle, u64);
    cuGraphLaunch: fn(Handle, Handle);
    cuGraphDestroy: fn(Handle);
    cuGraphExecDestroy: fn(Handle);
    cuModuleLoadData: fn(*mut Handle, *const c_void);
    cuModuleUnload: fn(Handle);
    cuModuleGetFunction: fn(*mut Handle, Handle, *const c_char);
    cuFuncSetAttribute: fn(Handle, c_int, c_int);
    cuGetErrorName: fn(c_int, *mut *const c_char);
    cuGetErrorString: fn(c_int, *mut *const c_char);
    cuTensorMapEncodeTiled: fn(*mut TensorMap, c_int, c_uint, u64, *const u64, *const u64, *const c_uint, *const c_uint, c_int, c_int, c_int, c_int);
    cuLaunchKernel: fn(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut Handle, *mut Handle);
}

/// A loaded driver.
pub struct Driver {
    functions: Functions,
    library: Library,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl Driver {
    /// Loads [`LIBRARY`], or the library at `path`.
    ///
    /// # Errors
    /// There is none, or it is too old.
    pub fn load(path: Option<&Path>) -> Result<Arc<Self>, DriverError> {
        let path = path.unwrap_or(Path::new(LIBRARY));
        // SAFETY: loading the driver runs its initialisers, which is what the caller wants.
        let library = unsafe { Library::new(path) }.map_err(|source| DriverError::NoDriver {
            path: path.to_owned(),
            source,
        })?;
        let functions = Functions::load(&library)?;
        let driver = Self { functions, library };
        // SAFETY: no preconditions.
        driver.check("cuInit", unsafe { (driver.functions.cuInit)(0) })?;
        let mut version = 0;
        // SAFETY: writes one int.
        driver.check("cuDriverGetVersion", unsafe {
            (driver.functions.cuDriverGetVersion)(&mut version)
        })?;
        if version < DRIVER_VERSION_MIN {
            return Err(DriverError::OldDriver { version });
        }
        Ok(Arc::new(driver))
    }

    /// A symbol that only the emulated driver has.
    pub fn emulation_schedule(&self, schedule: u32) -> bool {
        // SAFETY: the emulated driver declares it so.
        let symbol = unsafe {
            self.library
                .get::<unsafe extern "C" fn(c_int) -> c_int>(b"cachalot_emulation_schedule")
        };
        // SAFETY: it only stores a number for this thread.
        symbol.is_ok_and(|set| unsafe { set(schedule as c_int) } == 0)
    }

    /// See [`Device::emulation_fault`]; for the context that is current.
    fn emulation_fault(&self, launches: u32) -> bool {
        // SAFETY: the emulated driver declares it so.
        let symbol = unsafe {
            self.library
                .get::<unsafe extern "C" fn(c_int) -> c_int>(b"cachalot_emulation_fault")
        };
        // SAFETY: it only stores a number in the current context.
        symbol.is_ok_and(|set| unsafe { set(launches as c_int) } == 0)
    }

    /// Name, block size and argument bytes of every kernel of the emulated driver; none on a real one.
    pub fn emulation_kernels(&self) -> Vec<(String, u32, usize)> {
        type Kernel =
            unsafe extern "C" fn(c_uint, *mut *const c_char, *mut c_uint, *mut usize) -> c_int;
        // SAFETY: the emulated driver declares it so.
        let Ok(kernel) = (unsafe { self.library.get::<Kernel>(b"cachalot_emulation_kernel") })
        else {
            return Vec::new();
        };
        let mut kernels = Vec::new();
        for index in 0.. {
            let (mut name, mut threads, mut bytes) = (ptr::null(), 0, 0);
            // SAFETY: writes three values; the name is a literal of the library.
            if unsafe { kernel(index, &mut name, &mut threads, &mut bytes) } != 0 {
                break;
            }
            // SAFETY: as above.
            let name = unsafe { CStr::from_ptr(name) }
                .to_string_lossy()
                .into_owned();
            kernels.push((name, threads, bytes));
        }
        kernels
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), DriverError> {
        if code == 0 {
            return Ok(());
        }
        let text = |function: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut at = ptr::null();
            // SAFETY: on success the driver points at a string that it keeps.
            unsafe {
                if function(code, &mut at) == 0 && !at.is_null() {
                    CStr::from_ptr(at).to_string_lossy().into_owned()
                } else {
                    "unknown error".to_owned()
                }
            }
        };
        Err(DriverError::Call {
            call,
            code,
            name: text(self.functions.cuGetErrorName),
            detail: text(self.functions.cuGetErrorString),
        })
    }
}
