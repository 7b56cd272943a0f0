//! A case: launches over buffers of their own, what they move and compute, and what they leave.

use std::fmt;
use std::rc::Rc;

use half::bf16;
use kernels::driver::{Buffer, DriverError, Plain, Stream};
use kernels::params::{Address, Params};
use kernels::plan::{Launch, Unsupported};

use crate::compare::{Kind, Output};
use crate::harness::Lab;

type Step = Box<dyn Fn(&Stream) -> Result<(), DriverError>>;

/// Kernels in order over their buffers.
pub struct Case {
    earlier: Vec<&'static str>,
    launches: Vec<Launch>,
    steps: Vec<Step>,
    outputs: Vec<(&'static str, Kind, usize, Rc<Buffer>)>,
    /// Bytes that must be moved.
    pub bytes: f64,
    /// Floating-point operations.
    pub flops: f64,
    _buffers: Vec<Rc<Buffer>>,
}

impl Case {
    pub fn queue(&self, stream: &Stream) -> Result<(), DriverError> {
        self.steps.iter().try_for_each(|step| step(stream))
    }

    /// Of all launches, those that made its inputs included.
    pub fn kernels(&self) -> Vec<&'static str> {
        let launches = self.launches.iter().map(|launch| launch.kernel);
        self.earlier.iter().copied().chain(launches).collect()
    }

    pub fn read(&self, stream: &Stream, case: &str) -> Result<Vec<Output>, DriverError> {
        let read = |(name, kind, bytes, buffer): &(&str, Kind, usize, Rc<Buffer>)| {
            Ok(Output {
                name: format!("{case}: {name}"),
                kind: *kind,
                bytes: stream.read::<u8>(buffer, *bytes)?,
            })
        };
        self.outputs.iter().map(read).collect()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.launches.iter().map(Launch::to_string).collect();
        formatter.write_str(&lines.join("; "))
    }
}

/// Collects a case. Inputs repeat a random half megabyte: enough that no bit is predictable, and quick to make.
pub struct Builder<'a> {
    lab: &'a mut Lab,
    earlier: Vec<&'static str>,
    launches: Vec<Launch>,
    steps: Vec<Step>,
    outputs: Vec<(&'static str, Kind, usize, Rc<Buffer>)>,
    buffers: Vec<Rc<Buffer>>,
}

const PATTERN: usize = 1 << 19;

impl<'a> Builder<'a> {
    pub fn new(lab: &'a mut Lab) -> Self {
        Self {
            lab,
            earlier: Vec::new(),
            launches: Vec::new(),
            steps: Vec::new(),
            outputs: Vec::new(),
            buffers: Vec::new(),
        }
    }

    fn keep(&mut self, buffer: Buffer) -> Address {
        let address = buffer.address();
        self.buffers.push(Rc::new(buffer));
        address
    }

    fn repeat<T: Plain>(&mut self, pattern: &[T], count: usize) -> Address {
        let mut values = pattern.repeat(count.div_ceil(pattern.len().max(1)));
        values.truncate(count);
        self.values(&values)
    }

    pub fn values<T: Plain>(&mut self, values: &[T]) -> Address {
        let buffer = self.lab.upload(values);
        self.keep(buffer)
    }

    pub fn bf16s(&mut self, count: usize, amplitude: f32) -> Address {
        let pattern: Vec<bf16> = self.lab.random.bf16s(count.min(PATTERN), amplitude);
        self.repeat(&pattern, count)
    }

    pub fn floats(&mut self, count: usize, amplitude: f32) -> Address {
        let pattern = self.lab.random.floats(count.min(PATTERN), amplitude);
        self.repeat(&pattern, count)
    }

    pub fn codes(&mut self, count: usize) -> Address {
        let pattern = self.lab.random.codes(count.min(PATTERN));
        self.repeat(&pattern, count)
    }

    /// Positive, near one 448th: scales of codes.
    pub fn scales(&mut self, count: usize) -> Address {
        let some = |value: f32| (value.abs() + 0.5) / 448.0;
        let random = self.lab.random.floats(count.min(PATTERN), 1.0);
        let pattern: Vec<f32> = random.into_iter().map(some).collect();
        self.repeat(&pattern, count)
    }

    pub fn below(&mut self, count: usize, bound: usize) -> Vec<i32> {
        (0..count)
            .map(|_| self.lab.random.below(bound) as i32)
            .collect()
    }

    pub fn shuffled(&mut self, count: usize) -> Vec<i32> {
        let order = self.lab.random.shuffled(count);
        order.into_iter().map(|index| index as i32).collect()
    }

    /// Scratch that is not compared.
    pub fn room(&mut self, bytes: usize) -> Address {
        let buffer = self.lab.poisoned(bytes);
        self.keep(buffer)
    }

    /// An output of so many values.
    pub fn out(&mut self, name: &'static str, kind: Kind, count: usize) -> Address {
        let bytes = count * kind.bytes();
        let address = self.room(bytes);
        if let Some(buffer) = self.buffers.last() {
            self.outputs.push((name, kind, bytes, buffer.clone()));
        }
        address
    }

    /// Runs once now, outside of what is timed.
    pub fn before<P: Params>(&mut self, launch: Launch, params: &P) {
        self.lab.run(&launch, params);
        self.earlier.push(launch.kernel);
    }

    pub fn step<P: Params + 'static>(&mut self, launch: Result<Launch, Unsupported>, params: P) {
        let launch = launch.expect("a shape that the kernels take");
        self.launches.push(launch);
        self.steps.push(Box::new(move |stream| {
            // SAFETY: the case keeps the buffers, of the shapes that the launch was planned for.
            #[allow(unsafe_code)]
            unsafe {
                stream.launch(&launch, &params)
            }
        }));
    }

    pub fn map(&self, shape: &kernels::params::TensorShape) -> kernels::params::TensorMap {
        self.lab.device.tensor_map(shape).expect("a map")
    }

    pub fn finish(self, bytes: usize, flops: usize) -> Case {
        Case {
            earlier: self.earlier,
            launches: self.launches,
            steps: self.steps,
            outputs: self.outputs,
            bytes: bytes as f64,
            flops: flops as f64,
            _buffers: self.buffers,
        }
    }
}

/// Angles of positions: `[positions, rotary / 2, {cos, sin}]`.
pub fn table(positions: usize, rotary: usize) -> Vec<f32> {
    (0..positions * rotary / 2)
        .flat_map(|index| {
            let (position, pair) = (index / (rotary / 2), index % (rotary / 2));
            let angle = position as f64 * 10_000f64.powf(-2.0 * pair as f64 / rotary as f64);
            [angle.cos() as f32, angle.sin() as f32]
        })
        .collect()
}
