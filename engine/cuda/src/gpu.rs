//! Finding a GPU.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use engine_spec::{GpuFault, ModelConfig, Rank};
use kernels::driver::{Device, Driver};
use kernels::plan;

use crate::attention::{self, Tried};
use crate::layout::CudaLimits;
use crate::products::{self, ProductChoice, Products};
use crate::shapes::check_shapes;
use crate::{AttentionChoice, CudaError, ExchangeChoice};

/// The GPUs that a process opened, kept so that they can be asked when it cannot go on.
#[derive(Clone, Debug, Default)]
pub struct Opened(Arc<Mutex<Vec<Arc<Device>>>>);

impl Opened {
    /// See [`Gpu::open`].
    ///
    /// # Errors
    /// See [`Gpu::open`].
    pub fn open(&self, driver: Option<&Path>, ordinal: u32) -> Result<Gpu, CudaError> {
        let driver = Driver::load(driver)?;
        let device = Device::open(&driver, ordinal)?;
        self.devices().push(device.clone());
        Gpu::over(device)
    }

    /// The first of them that its hardware ended.
    pub fn fault(&self) -> Option<GpuFault> {
        let fault = |device: &Arc<Device>| {
            Some(GpuFault {
                error: device.hardware_error()?,
                uuid: device.uuid().to_owned(),
            })
        };
        self.devices().iter().find_map(fault)
    }

    fn devices(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Device>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A GPU that the kernels run on.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub(crate) device: Arc<Device>,
    pub(crate) attention: AttentionChoice,
    pub(crate) products: Products,
    pub(crate) exchange: ExchangeChoice,
    /// The library, where the loader does not find it.
    pub(crate) nccl: Option<PathBuf>,
    fallback: Option<String>,
    pub(crate) tried: Tried,
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

    /// Over a device that is open already; the environment chooses its products.
    ///
    /// # Errors
    /// No image fits it, or the environment asks for what it does not have.
    pub fn over(device: Arc<Device>) -> Result<Self, CudaError> {
        Self::with_products(device, ProductChoice::from_environment()?)
    }

    /// Over a device that is open already.
    ///
    /// # Errors
    /// No image fits it, or the choice does not.
    pub fn with_products(device: Arc<Device>, choice: ProductChoice) -> Result<Self, CudaError> {
        // The smallest kernel: a driver that has no code for this device says so at the first one.
        device.load(&[plan::embed(1, 8)?])?;
        let (products, fallback) = products::choose(&device, choice)?;
        Ok(Self {
            device,
            attention: AttentionChoice::default(),
            products,
            exchange: ExchangeChoice::default(),
            nccl: None,
            fallback,
            tried: Tried::default(),
        })
    }

    /// The same GPU, where models attend with other kernels.
    #[must_use]
    pub fn with_attention(self, attention: AttentionChoice) -> Self {
        Self { attention, ..self }
    }

    /// The same GPU, where ranks exchange in another way; over NCCL with the library at `nccl`, or what the loader finds.
    #[must_use]
    pub fn with_exchange(self, exchange: ExchangeChoice, nccl: Option<PathBuf>) -> Self {
        Self {
            exchange,
            nccl,
            ..self
        }
    }

    /// Loads the kernels of a rank of a model, and tries those that it could attend with unless they were tried: before the
    /// rank meets the others, who would wait for one that has to start anew or cannot.
    ///
    /// # Errors
    /// One has no image that fits; [`CudaError::Hung`].
    pub fn try_kernels(
        &self,
        config: &ModelConfig,
        limits: &CudaLimits,
        rank: Rank,
    ) -> Result<(), CudaError> {
        let model = limits.build(config, rank);
        let mut launches = check_shapes(&model, limits)?;
        launches.extend(self.products.kernels());
        let chosen = attention::choose(self, &model, limits.kv_cache)?;
        launches.extend(attention::launches(chosen.kernels, &model, limits)?);
        Ok(self.device.load(&launches)?)
    }

    /// Which kernels multiply matrices on it.
    pub fn products(&self) -> Products {
        self.products
    }

    /// Why they are not Hopper's, on a Hopper device that was left to choose.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// As the driver calls it.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// As nvidia-smi prints it.
    pub fn uuid(&self) -> &str {
        self.device.uuid()
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
