//! Which kernels multiply matrices: those that run on every device, or Hopper's.
//!
//! Invariant: one choice for the life of a [`crate::Gpu`]. The two sum in different orders, so a model that mixed them would
//! answer a token differently in another step.
//!
//! Surprise: Hopper's are checked on the device before they are trusted, in a context of their own that may be lost.

mod check;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use kernels::driver::Device;
use kernels::plan::{Format, Launch, hopper_kernels};

use crate::CudaError;

/// The environment variable that chooses.
pub const VARIABLE: &str = "CACHALOT_CUDA_PRODUCTS";

/// Kernels that multiply matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// For compute capability 8.0 and later.
    Portable,
    /// For compute capability 9.0, with TMA and wgmma.
    Hopper,
}

impl Products {
    /// What must be loaded before a step is recorded.
    pub(crate) fn kernels(self) -> Vec<Launch> {
        match self {
            Self::Portable => Vec::new(),
            Self::Hopper => [Format::Bf16, Format::Fp8]
                .into_iter()
                .flat_map(hopper_kernels)
                .collect(),
        }
    }
}

impl fmt::Display for Products {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Portable => "portable",
            Self::Hopper => "hopper",
        })
    }
}

/// Who decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProductChoice {
    /// Hopper's where the device has them and they agree with the portable ones there.
    #[default]
    Auto,
    /// The user, and nothing is checked.
    Fixed(Products),
}

impl ProductChoice {
    /// What the environment says.
    pub(crate) fn from_environment() -> Result<Self, CudaError> {
        match std::env::var(VARIABLE) {
            Ok(text) => text.parse(),
            Err(_) => Ok(Self::Auto),
        }
    }
}

impl FromStr for ProductChoice {
    type Err = CudaError;

    fn from_str(text: &str) -> Result<Self, CudaError> {
        match text {
            "" | "auto" => Ok(Self::Auto),
            "portable" => Ok(Self::Fixed(Products::Portable)),
            "hopper" => Ok(Self::Fixed(Products::Hopper)),
            _ => Err(CudaError::Products(format!(
                "{VARIABLE} is {text:?}, but it is one of auto, portable, hopper"
            ))),
        }
    }
}

/// The kernels that a device gets, and why not Hopper's where it could have had them.
pub(crate) fn choose(
    device: &Arc<Device>,
    choice: ProductChoice,
) -> Result<(Products, Option<String>), CudaError> {
    let (major, minor) = device.capability();
    let has_wgmma = (major, minor) == (9, 0);
    match choice {
        ProductChoice::Fixed(Products::Hopper) if !has_wgmma => Err(CudaError::Products(format!(
            "{VARIABLE} is hopper, but {} has compute capability {major}.{minor}, not 9.0: set it to auto",
            device.name()
        ))),
        ProductChoice::Fixed(products) => Ok((products, None)),
        ProductChoice::Auto if !has_wgmma => Ok((Products::Portable, None)),
        ProductChoice::Auto => Ok(
            match device
                .apart()
                .map_err(CudaError::from)
                .and_then(|apart| check::run(&apart))
            {
                Ok(()) => (Products::Hopper, None),
                Err(hung @ CudaError::Hung(_)) => return Err(hung),
                Err(problem) => (Products::Portable, Some(problem.to_string())),
            },
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_one_of_three_words() {
        let parse = |text: &str| text.parse::<ProductChoice>();
        assert_eq!(parse("").ok(), Some(ProductChoice::Auto));
        for products in [Products::Portable, Products::Hopper] {
            let parsed = parse(&products.to_string()).ok();
            assert_eq!(parsed, Some(ProductChoice::Fixed(products)));
        }
        let problem = parse("sm80").err().map(|e| e.to_string());
        let wanted = r#"CACHALOT_CUDA_PRODUCTS is "sm80", but it is one of auto, portable, hopper"#;
        assert_eq!(problem.as_deref(), Some(wanted));
    }
}
