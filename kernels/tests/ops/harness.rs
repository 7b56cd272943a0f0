//! Devices, random inputs and comparisons for the tests.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use half::bf16;
use kernels::driver::{Buffer, Device, Driver, NCCL_LIBRARY, Nccl, Plain, Stream};
use kernels::emulation::{BuildError, Emulation};
use kernels::params::{Address, Params};
use kernels::plan::Launch;

/// Where emulated drivers are built.
pub fn build_folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulation")
}

/// The emulated driver, with the address sanitizer where `KERNELS_SANITIZE` is set.
fn emulation() -> Emulation {
    let emulation = Emulation::new(&build_folder());
    match std::env::var_os("KERNELS_SANITIZE") {
        Some(_) => emulation.sanitized(),
        None => emulation,
    }
}

/// The driver under test, or none on a machine without a C++ compiler.
pub fn driver() -> Option<Arc<Driver>> {
    static DRIVER: OnceLock<Option<Arc<Driver>>> = OnceLock::new();
    DRIVER
        .get_or_init(|| {
            let path = match std::env::var_os("KERNELS_DRIVER") {
                Some(path) => PathBuf::from(path),
                None => match emulation().build_with_nccl() {
                    Ok(path) => path,
                    Err(error @ (BuildError::NoCompiler | BuildError::WrongMachine)) => {
                        eprintln!("skipped: {error}");
                        return None;
                    }
                    Err(error) => panic!("the emulated driver does not build: {error}"),
                },
            };
            Some(Driver::load(Some(&path)).expect("the driver loads"))
        })
        .clone()
}

/// NCCL: `KERNELS_NCCL`, or the emulated one beside an emulated driver.
pub fn nccl() -> Option<Arc<Nccl>> {
    driver()?;
    let path = match (
        std::env::var_os("KERNELS_NCCL"),
        std::env::var_os("KERNELS_DRIVER"),
    ) {
        (Some(path), _) => PathBuf::from(path),
        (None, Some(_)) => {
            eprintln!("skipped: KERNELS_NCCL names no libnccl.so.2");
            return None;
        }
        (None, None) => {
            let driver = emulation().build_with_nccl();
            let driver = driver.expect("it was built already");
            driver.with_file_name(NCCL_LIBRARY)
        }
    };
    Some(Nccl::load(Some(&path)).expect("NCCL loads"))
}

/// A device with a context of its own, under one schedule.
pub struct Lab {
    pub device: Arc<Device>,
    pub stream: Stream,
    pub schedule: u32,
    pub random: Random,
}

/// Of all random inputs: `KERNELS_SEED`, or a fresh one of the clock's for each run.
pub fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| match std::env::var("KERNELS_SEED") {
        Ok(seed) => seed.parse().expect("KERNELS_SEED is a number"),
        Err(_) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            now.map_or(1, |since| since.as_nanos() as u64)
        }
    })
}

/// Says how to repeat a test's inputs when it fails.
struct SaidOnFailure;

impl Drop for SaidOnFailure {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let thread = std::thread::current();
            let test = thread.name().unwrap_or_default();
            let seed = seed();
            eprintln!(
                "with these inputs again: KERNELS_SEED={seed} cargo test -p kernels --test ops -- --exact {test}"
            );
        }
    }
}

/// Runs a test under every schedule of the emulator, or once on a real device, with fresh inputs each time.
pub fn on_every_schedule(name: &str, test: impl Fn(&mut Lab)) {
    let Some(driver) = driver() else { return };
    let _said = SaidOnFailure;
    let schedules = if driver.emulation_schedule(0) { 3 } else { 1 };
    for schedule in 0..schedules {
        driver.emulation_schedule(schedule);
        let device = Device::open_apart(&driver, 0).expect("a device");
        let stream = device.stream().expect("a stream");
        let random = Random::new(seed(), name, schedule);
        test(&mut Lab {
            device,
            stream,
            schedule,
            random,
        });
    }
}

impl Lab {
    pub fn upload<T: Plain>(&self, values: &[T]) -> Buffer {
        self.stream.upload(values).expect("room for an input")
    }

    /// An output: NaN in every float, -1 in every integer.
    pub fn poisoned(&self, bytes: usize) -> Buffer {
        let mut buffer = self.device.allocate(bytes).expect("room for an output");
        self.stream.fill(&mut buffer, 0xFF).expect("poison");
        buffer
    }

    /// The first `count` values of an output.
    pub fn read<T: Plain + Default>(&self, buffer: &Buffer, count: usize) -> Vec<T> {
        self.stream.read(buffer, count).expect("an output")
    }

    pub fn read_bf16(&self, buffer: &Buffer, count: usize) -> Vec<f64> {
        kernels::reference::widen(&self.read::<bf16>(buffer, count))
    }

    pub fn read_f32(&self, buffer: &Buffer, count: usize) -> Vec<f64> {
        self.read::<f32>(buffer, count)
            .into_iter()
            .map(f64::from)
            .collect()
    }

    pub fn read_i32(&self, buffer: &Buffer, count: usize) -> Vec<i32> {
        self.read(buffer, count)
    }

    /// Launches and waits.
    pub fn run<P: Params>(&self, launch: &Launch, params: &P) {
        // SAFETY: the tests keep their buffers, of the shapes they planned for, until this returns.
        #[allow(unsafe_code)]
        let launched = unsafe { self.stream.launch(launch, params) };
        launched.unwrap_or_else(|error| panic!("{launch}: {error}"));
        self.stream
            .synchronize()
            .unwrap_or_else(|error| panic!("{launch}, schedule {}: {error}", self.schedule));
    }
}

pub fn address(buffer: Option<&Buffer>) -> Address {
    buffer.map_or(Address::NULL, Buffer::address)
}

/// SplitMix64 (Steele, Lea, Flood 2014), seeded by a name so that every test has its own inputs.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64, name: &str, schedule: u32) -> Self {
        let mut state = seed ^ u64::from(schedule) << 32;
        for byte in name.bytes() {
            state = (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        Self(state)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Uniform in [-amplitude, amplitude).
    pub fn float(&mut self, amplitude: f32) -> f32 {
        ((self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * amplitude
    }

    pub fn floats(&mut self, count: usize, amplitude: f32) -> Vec<f32> {
        (0..count).map(|_| self.float(amplitude)).collect()
    }

    pub fn bf16s(&mut self, count: usize, amplitude: f32) -> Vec<bf16> {
        (0..count)
            .map(|_| bf16::from_f32(self.float(amplitude)))
            .collect()
    }

    /// Any e4m3 code but NaN.
    pub fn codes(&mut self, count: usize) -> Vec<u8> {
        (0..count)
            .map(|_| {
                let code = self.next() as u8;
                if code & 0x7f == 0x7f {
                    code & 0x80 | 0x38
                } else {
                    code
                }
            })
            .collect()
    }

    /// A random order of 0..count.
    pub fn shuffled(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for i in (1..count).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

/// Half a unit in the last place of bf16, relative.
pub const BF16: f64 = 1.0 / 256.0;

/// Panics at the first value further than `relative * |want| + absolute`, and at every NaN that is not wanted.
pub fn close(what: &str, got: &[f64], want: &[f64], relative: f64, absolute: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (index, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (g - w).abs();
        assert!(
            error <= relative * w.abs() + absolute,
            "{what}: value {index} is {g}, but should be {w}"
        );
    }
}
