//! A device, its memory and its queues.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Driver, DriverError, Handle, Stream};
use crate::image::{Fatbin, fatbin_of};
use crate::params::{Address, TensorMap, TensorShape};
use crate::plan::{Format, Launch};

/// `cp.async`, bf16 tensor cores: the lowest level the kernels are built for.
const CAPABILITY_MIN: (u32, u32) = (8, 0);
const SHARED_DEFAULT_BYTES: u32 = 48 * 1024;
/// Errors of the hardware that only its repair mends: CUDA_ERROR_ECC_UNCORRECTABLE, CUDA_ERROR_NVLINK_UNCORRECTABLE.
/// Not those that a program may cause too, such as an illegal address (700), a failed launch (719), and an error that the
/// GPU contained (226), after which a new process goes on.
const HARDWARE_ERRORS: [c_int; 2] = [214, 220];

/// A GPU and a context on it.
pub struct Device {
    pub(super) driver: Arc<Driver>,
    pub(super) context: Handle,
    ordinal: c_int,
    own_context: bool,
    name: String,
    uuid: String,
    capability: (u32, u32),
    functions: Mutex<HashMap<&'static str, Function>>,
    modules: Mutex<HashMap<&'static str, Handle>>,
}

/// A loaded kernel and the shared memory that it may be launched with.
#[derive(Clone, Copy)]
struct Function {
    handle: Handle,
    shared_bytes: u32,
}

// SAFETY: driver handles may be used from any thread that makes the context current, which every call does.
unsafe impl Send for Device {}
// SAFETY: as above; the driver synchronises itself.
unsafe impl Sync for Device {}
// SAFETY: as above.
unsafe impl Send for Function {}

impl std::fmt::Debug for Device {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Device")
            .field("name", &self.name)
            .field("capability", &self.capability)
            .finish_non_exhaustive()
    }
}

fn hardware_error(error: &DriverError) -> Option<String> {
    match error {
        DriverError::Call { code, name, .. } if HARDWARE_ERRORS.contains(code) => {
            Some(format!("{name} ({code})"))
        }
        _ => None,
    }
}

/// `GPU-` and five groups of hexadecimal digits; `MIG-` for a part of a GPU, which its name tells.
fn uuid_words(name: &str, bytes: [u8; 16]) -> String {
    let kind = if name.contains(" MIG ") { "MIG" } else { "GPU" };
    let groups = [0..4, 4..6, 6..8, 8..10, 10..16];
    groups.into_iter().fold(kind.to_owned(), |words, group| {
        let digits: String = bytes[group]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        words + "-" + &digits
    })
}

impl Device {
    /// Makes its context the calling thread's, for a library that works on the current one.
    ///
    /// # Errors
    /// The device failed.
    pub(super) fn make_current(&self) -> Result<(), DriverError> {
        // SAFETY: the context is alive as long as the device.
        self.driver.check("cuCtxSetCurrent", unsafe {
            (self.driver.functions.cuCtxSetCurrent)(self.context)
        })
    }

    /// Opens a device with its primary context.
    ///
    /// # Errors
    /// There is no such device, or the kernels do not run on it.
    pub fn open(driver: &Arc<Driver>, ordinal: u32) -> Result<Arc<Self>, DriverError> {
        Self::with_context(driver, ordinal, false)
    }

    /// Opens a device with a context of its own: a kernel's fault there leaves other contexts usable.
    ///
    /// # Errors
    /// See [`Device::open`].
    pub fn open_apart(driver: &Arc<Driver>, ordinal: u32) -> Result<Arc<Self>, DriverError> {
        Self::with_context(driver, ordinal, true)
    }

    fn with_context(
        driver: &Arc<Driver>,
        ordinal: u32,
        own_context: bool,
    ) -> Result<Arc<Self>, DriverError> {
        let functions = &driver.functions;
        let mut count = 0;
        // SAFETY: writes one int.
        driver.check("cuDeviceGetCount", unsafe {
            (functions.cuDeviceGetCount)(&mut count)
        })?;
        let Some(wanted) = c_int::try_from(ordinal)
            .ok()
            .filter(|wanted| *wanted < count)
        else {
            return Err(DriverError::NoDevice { ordinal, count });
        };
        let mut device = 0;
        // SAFETY: writes one int.
        driver.check("cuDeviceGet", unsafe {
            (functions.cuDeviceGet)(&mut device, wanted)
        })?;
        let mut name: [c_char; 128] = [0; 128];
        // SAFETY: writes up to 128 bytes with a terminator.
        driver.check("cuDeviceGetName", unsafe {
            (functions.cuDeviceGetName)(name.as_mut_ptr(), name.len() as c_int, device)
        })?;
        // SAFETY: terminated by the driver.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }
            .to_string_lossy()
            .into_owned();
        let mut uuid = [0; 16];
        // SAFETY: writes 16 bytes.
        driver.check("cuDeviceGetUuid", unsafe {
            (functions.cuDeviceGetUuid_v2)(&mut uuid, device)
        })?;
        let uuid = uuid_words(&name, uuid);
        let attribute = |which| -> Result<u32, DriverError> {
            let mut value = 0;
            // SAFETY: writes one int.
            driver.check("cuDeviceGetAttribute", unsafe {
                (functions.cuDeviceGetAttribute)(&mut value, which, device)
            })?;
            Ok(value.unsigned_abs())
        };
        let capability = (attribute(75)?, attribute(76)?);
        if capability < CAPABILITY_MIN {
            let (major, minor) = capability;
            return Err(DriverError::OldDevice { name, major, minor });
        }
        let mut context = ptr::null_mut();
        // SAFETY: writes one handle.
        let (call, code) = unsafe {
            if own_context {
                (
                    "cuCtxCreate",
                    (functions.cuCtxCreate_v2)(&mut context, 0, device),
                )
            } else {
                (
                    "cuDevicePrimaryCtxRetain",
                    (functions.cuDevicePrimaryCtxRetain)(&mut context, device),
                )
            }
        };
        driver.check(call, code)?;
        Ok(Arc::new(Self {
            driver: driver.clone(),
            context,
            ordinal: device,
            own_context,
            name,
            uuid,
            capability,
            functions: Mutex::default(),
            modules: Mutex::default(),
        }))
    }

    /// The same device with a context of its own.
    ///
    /// # Errors
    /// The driver has no room for one.
    pub fn apart(&self) -> Result<Arc<Self>, DriverError> {
        Self::open_apart(&self.driver, self.ordinal.unsigned_abs())
    }

    /// As the driver calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As nvidia-smi prints it.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Name and code of the error that ended this context, where it is the hardware's and only its repair mends it.
    pub fn hardware_error(&self) -> Option<String> {
        // A context that an error ended answers every call with it.
        let asked = || call!(self, cuStreamQuery(ptr::null_mut()));
        match asked() {
            Err(error) => hardware_error(&error),
            Ok(()) => None,
        }
    }

    /// Major and minor compute capability.
    pub fn capability(&self) -> (u32, u32) {
        self.capability
    }

    /// Loads kernels now instead of at their first use: what does not fit the device is then known at start, and a graph
    /// can be recorded at once.
    ///
    /// # Errors
    /// No image of a kernel fits the device, or it failed.
    pub fn load(&self, launches: &[Launch]) -> Result<(), DriverError> {
        launches.iter().try_for_each(|launch| {
            self.function(launch.kernel, launch.shared_bytes)
                .map(|_| ())
        })
    }

    /// Lets the kernel after `launches` more fail as if it had read outside its memory. False on a real driver.
    pub fn emulation_fault(&self, launches: u32) -> bool {
        // Makes the context current, too.
        self.memory().is_ok() && self.driver.emulation_fault(launches)
    }

    /// Free and total bytes.
    ///
    /// # Errors
    /// The device failed.
    pub fn memory(&self) -> Result<(usize, usize), DriverError> {
        let (mut free, mut total) = (0, 0);
        call!(self, cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok((free, total))
    }

    /// Memory of its own.
    ///
    /// # Errors
    /// There is not enough.
    pub fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Buffer, DriverError> {
        let mut address = 0;
        call!(self, cuMemAlloc_v2(&mut address, bytes.max(1)))?;
        Ok(Buffer {
            device: self.clone(),
            address,
            bytes,
        })
    }

    /// What the Hopper kernels load boxes of, swizzled by 128 bytes; zeros outside.
    ///
    /// # Errors
    /// The address or a stride is not a multiple of 16 bytes.
    pub fn tensor_map(&self, shape: &TensorShape) -> Result<TensorMap, DriverError> {
        const SWIZZLE_128: c_int = 3;
        const PROMOTE_256: c_int = 3;
        // e4m3 is loaded as bytes: TMA does not look at values.
        let driver_type: c_int = match shape.format {
            Format::Bf16 => 9,
            Format::Fp8 => 0,
        };
        let value_bytes = shape.format.bytes();
        let mut map = TensorMap::default();
        let [rows, layers] = shape.lengths.map(|length| length as u64);
        let dimensions = [shape.columns as u64, rows, layers];
        let strides = shape.strides.map(|stride| (stride * value_bytes) as u64);
        let [box_rows, box_layers] = shape.boxes.map(|length| length as c_uint);
        let box_size = [(128 / value_bytes) as c_uint, box_rows, box_layers];
        let steps: [c_uint; 3] = [1; 3];
        call!(
            self,
            cuTensorMapEncodeTiled(
                &mut map,
                driver_type,
                3,
                shape.at.0,
                dimensions.as_ptr(),
                strides.as_ptr(),
                box_size.as_ptr(),
                steps.as_ptr(),
                0,
                SWIZZLE_128,
                PROMOTE_256,
                0,
            )
        )?;
        Ok(map)
    }

    /// A queue of work.
    ///
    /// # Errors
    /// The device failed.
    pub fn stream(self: &Arc<Self>) -> Result<Stream, DriverError> {
        let mut handle = ptr::null_mut();
        // 1: does not wait for the default stream.
        call!(self, cuStreamCreate(&mut handle, 1))?;
        Ok(Stream::new(self.clone(), handle))
    }

    /// A kernel, loaded at its first use.
    pub(super) fn function(
        &self,
        kernel: &'static str,
        shared_bytes: u32,
    ) -> Result<Handle, DriverError> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions
            .get(kernel)
            .filter(|f| f.shared_bytes >= shared_bytes)
        {
            return Ok(function.handle);
        }
        let fatbin = fatbin_of(kernel).ok_or_else(|| DriverError::NoKernel {
            kernel: kernel.to_owned(),
        })?;
        let handle = self.load_from(fatbin, kernel).map_err(|reason| {
            if !is_misfit(&reason) {
                return reason;
            }
            let (major, minor) = self.capability();
            DriverError::Image {
                kernel,
                fatbin: fatbin.name,
                major,
                minor,
                reason: Box::new(reason),
            }
        })?;
        if shared_bytes > SHARED_DEFAULT_BYTES {
            // 8: the most dynamic shared memory that launches may ask for.
            call!(self, cuFuncSetAttribute(handle, 8, shared_bytes as c_int))?;
        }
        let shared_bytes = shared_bytes.max(SHARED_DEFAULT_BYTES);
        functions.insert(
            kernel,
            Function {
                handle,
                shared_bytes,
            },
        );
        Ok(handle)
    }

    /// A kernel of a fatbin, which is loaded once.
    fn load_from(&self, fatbin: &Fatbin, kernel: &'static str) -> Result<Handle, DriverError> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match modules.get(fatbin.name) {
            Some(module) => *module,
            None => {
                let mut module = ptr::null_mut();
                call!(
                    self,
                    cuModuleLoadData(&mut module, fatbin.image.as_ptr().cast())
                )?;
                modules.insert(fatbin.name, module);
                module
            }
        };
        let name = CString::new(kernel).map_err(|_| DriverError::NoKernel {
            kernel: kernel.to_owned(),
        })?;
        let mut handle = ptr::null_mut();
        call!(
            self,
            cuModuleGetFunction(&mut handle, module, name.as_ptr())
        )?;
        Ok(handle)
    }
}

/// Whether the driver speaks of an image: other errors are of the device, wherever they come up.
fn is_misfit(error: &DriverError) -> bool {
    const INVALID_IMAGE: i32 = 200;
    const NO_BINARY_FOR_GPU: i32 = 209;
    const INVALID_PTX: i32 = 218;
    const JIT_COMPILER_NOT_FOUND: i32 = 221;
    const UNSUPPORTED_PTX_VERSION: i32 = 222;
    const NOT_FOUND: i32 = 500;
    let DriverError::Call { code, .. } = error else {
        return false;
    };
    [
        INVALID_IMAGE,
        NO_BINARY_FOR_GPU,
        INVALID_PTX,
        JIT_COMPILER_NOT_FOUND,
        UNSUPPORTED_PTX_VERSION,
        NOT_FOUND,
    ]
    .contains(code)
}

impl Drop for Device {
    fn drop(&mut self) {
        // Errors on the way out have nowhere to go; a dead context refuses all of these.
        let functions = &self.driver.functions;
        let modules = std::mem::take(
            self.modules
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner),
        );
        // SAFETY: nothing borrowed from the device outlives it, so the handles are not used again.
        unsafe {
            (functions.cuCtxSetCurrent)(self.context);
            for module in modules.into_values() {
                (functions.cuModuleUnload)(module);
            }
            if self.own_context {
                (functions.cuCtxDestroy_v2)(self.context);
            } else {
                (functions.cuDevicePrimaryCtxRelease_v2)(self.ordinal);
            }
        }
    }
}

/// Types whose bytes are their value.
///
/// # Safety
/// No padding, no invalid bit patterns.
pub unsafe trait Plain: Copy {}
// SAFETY: integers and floats.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for i64 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: a transparent u16.
unsafe impl Plain for half::bf16 {}

/// Device memory, freed on drop.
#[derive(Debug)]
pub struct Buffer {
    pub(super) device: Arc<Device>,
    pub(super) address: u64,
    pub(super) bytes: usize,
}

impl Buffer {
    /// Where it is.
    pub fn address(&self) -> Address {
        Address(self.address)
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let functions = &self.device.driver.functions;
        // SAFETY: the address came from cuMemAlloc and nothing else frees it.
        unsafe {
            (functions.cuCtxSetCurrent)(self.device.context);
            (functions.cuMemFree_v2)(self.address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_that_no_program_causes_are_the_hardwares() {
        let told = |code| {
            hardware_error(&DriverError::Call {
                call: "cuStreamQuery",
                code,
                name: "NAME".into(),
                detail: String::new(),
            })
        };
        for code in [214, 220] {
            assert_eq!(told(code), Some(format!("NAME ({code})")));
        }
        for code in [2, 226, 600, 700, 702, 714, 719, 999] {
            assert_eq!(told(code), None, "{code}");
        }
        let late = DriverError::Late {
            what: "a step",
            seconds: 1,
        };
        assert_eq!(hardware_error(&late), None);
    }

    #[test]
    fn a_uuid_is_written_as_nvidia_smi_writes_it() {
        let bytes = std::array::from_fn(|index| 0x10 * index as u8 + 1);
        let digits = "01112131-4151-6171-8191-a1b1c1d1e1f1";
        for (name, kind) in [
            ("NVIDIA H100 80GB HBM3", "GPU"),
            ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "MIG"),
        ] {
            assert_eq!(uuid_words(name, bytes), format!("{kind}-{digits}"));
        }
    }
}
