//! Finding a GPU.

use std::path::Path;
use std::sync::Arc;

use kernels::driver::{Device, Driver};
use kernels::plan;

use crate::{AttentionChoice, CudaError};

/// A GPU that the kernels run on.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub(crate) device: Arc<Device>,
    pub(crate) attention: AttentionChoice,
}

impl Gpu {
    /// Opens device `ordinal` of the driver at `driver`, or of the one that the loader finds.
    ///
    /// # Errors
    /// No driver, no device, one that is too old, or no image that fits it: the error says which.
    pub fn open(driver: Option<&Path>, ordinal: u32) -> Result<Self, CudaError> {
        let driver = Driver::load(driver)?;
        Self::over(Device::open(&driver, ordinal)?)
    }

    /// Over a device that is open already.
    ///
    /// # Errors
    /// No image fits it.
    pub fn over(device: Arc<Device>) -> Result<Self, CudaError> {
        // The smallest kernel: a driver that has no code for this device says so at the first one.
        device.load(&[plan::embed(1, 8)?])?;
        Ok(Self {
            device,
            attention: AttentionChoice::default(),
        })
    }

    /// The same GPU, where models attend with other kernels.
    #[must_use]
    pub fn with_attention(self, attention: AttentionChoice) -> Self {
        Self { attention, ..self }
    }

    /// As the driver calls it.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Major and minor compute capability.
    pub fn capability(&self) -> (u32, u32) {
        self.device.capability()
    }

    /// Bytes of its memory that nobody holds.
    ///
    /// # Errors
    /// The device failed.
    pub fn free_bytes(&self) -> Result<u64, CudaError> {
        Ok(self.device.memory()?.0 as u64)
    }
}
