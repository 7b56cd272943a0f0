//! What to compute on: kinds of GPU, and whether parts of them.

use operator_api::{AcceleratorType, Binding, Mig};

use super::{Rules, is_word};
use crate::devices::DEVICE_CLASS_DEFAULT;
use crate::mig::MigProfile;

/// Products and profiles that may be listed.
const LISTED_MAX: usize = 16;

/// What to compute on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValidAccelerator {
    /// The node's processors.
    Cpu,
    /// NVIDIA GPUs.
    Nvidia {
        /// Product prefixes in order of preference; empty for any.
        products: Vec<String>,
        /// Least memory of one device.
        memory_bytes_min: Option<u64>,
        /// Whether parts of GPUs are used.
        mig: ValidMig,
        /// Device class of the claims that GPUs are asked for by; none for `nvidia.com/gpu`.
        claim: Option<String>,
    },
}

/// Whether MIG devices are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValidMig {
    /// Whole GPUs alone.
    Never,
    /// Whole GPUs and MIG devices.
    Allowed {
        /// Profiles; empty for any.
        profiles: Vec<MigProfile>,
    },
    /// MIG devices alone.
    Only {
        /// Profiles; empty for any.
        profiles: Vec<MigProfile>,
    },
}

pub(super) fn valid_accelerator(
    rules: &mut Rules,
    given: &operator_api::Accelerator,
) -> ValidAccelerator {
    let memory_bytes_min = given.min_memory.as_ref().and_then(|quantity| {
        let value = quantity.value();
        rules.require(
            value.is_some(),
            "spec.accelerator.minMemory",
            quantity,
            "must be a quantity such as 80Gi",
        );
        value
    });
    rules.require(
        given.products.len() <= LISTED_MAX,
        "spec.accelerator.products",
        format_args!("{} entries", given.products.len()),
        "at most 16 entries",
    );
    for product in &given.products {
        rules.require(
            is_word(product, 63, "._-"),
            "spec.accelerator.products",
            format_args!("\"{product}\""),
            "must be the beginning of a value of the node label nvidia.com/gpu.product, such as NVIDIA-H200",
        );
    }
    let mig = valid_mig(rules, given);
    let claim = given.claim.as_ref().map(|claim| {
        let class = claim.device_class_name.as_deref();
        let given = rules.name("spec.accelerator.claim.deviceClassName", class);
        given.unwrap_or_else(|| DEVICE_CLASS_DEFAULT.to_owned())
    });
    rules.require(
        claim.is_none() || mig == ValidMig::Never,
        "spec.accelerator.claim",
        "",
        "gives out whole GPUs; remove it or set spec.accelerator.mig to never",
    );
    match given.kind {
        AcceleratorType::Nvidia => ValidAccelerator::Nvidia {
            products: given.products.clone(),
            memory_bytes_min,
            mig,
            claim,
        },
        AcceleratorType::Cpu => {
            rules.require(
                given.products.is_empty(),
                "spec.accelerator.products",
                given.products.join(", "),
                "names GPUs; remove it or choose accelerator type nvidia",
            );
            rules.require(
                given.min_memory.is_none(),
                "spec.accelerator.minMemory",
                given.min_memory.as_ref().map_or("", |q| q.0.as_str()),
                "is the memory of one GPU; remove it or choose accelerator type nvidia",
            );
            rules.require(
                given.mig.is_none(),
                "spec.accelerator.mig",
                word(given.mig.unwrap_or_default()),
                "is about parts of GPUs; remove it or choose accelerator type nvidia",
            );
            rules.require(
                claim.is_none(),
                "spec.accelerator.claim",
                "",
                "is about GPUs; remove it or choose accelerator type nvidia",
            );
            ValidAccelerator::Cpu
        }
    }
}

/// Who allocates claims binds the pod.
pub(super) fn check_binding(rules: &mut Rules, accelerator: &ValidAccelerator, binding: Binding) {
    let is_claimed = matches!(accelerator, ValidAccelerator::Nvidia { claim: Some(_), .. });
    rules.require(
        !is_claimed || binding == Binding::Scheduler,
        "spec.placement.binding",
        "direct",
        "kube-scheduler allocates resource claims; set it to scheduler or remove spec.accelerator.claim",
    );
}

fn word(mig: Mig) -> &'static str {
    match mig {
        Mig::Never => "never",
        Mig::Allowed => "allowed",
        Mig::Only => "only",
    }
}

fn valid_mig(rules: &mut Rules, given: &operator_api::Accelerator) -> ValidMig {
    let field = "spec.accelerator.migProfiles";
    rules.require(
        given.mig_profiles.len() <= LISTED_MAX,
        field,
        format_args!("{} entries", given.mig_profiles.len()),
        "at most 16 entries",
    );
    let mut profiles = Vec::new();
    for text in &given.mig_profiles {
        match text.parse::<MigProfile>() {
            Ok(profile) => profiles.push(profile),
            Err(error) => rules.refuse(field, format_args!("\"{text}\""), &error.to_string()),
        }
    }
    match given.mig.unwrap_or_default() {
        Mig::Allowed => ValidMig::Allowed { profiles },
        Mig::Only => ValidMig::Only { profiles },
        Mig::Never => {
            rules.require(
                given.mig_profiles.is_empty(),
                field,
                given.mig_profiles.join(", "),
                "needs spec.accelerator.mig allowed or only",
            );
            ValidMig::Never
        }
    }
}

/// A replica on MIG devices is one device.
pub(super) fn check_ranks(rules: &mut Rules, accelerator: &ValidAccelerator, ranks: u32) {
    let is_mig = matches!(
        accelerator,
        ValidAccelerator::Nvidia {
            mig: ValidMig::Only { .. },
            ..
        }
    );
    rules.require(
        !is_mig || ranks == 1,
        "spec.parallelism",
        format_args!("{ranks} devices"),
        "nothing connects MIG devices, so a replica on them is one device; remove spec.parallelism or set spec.accelerator.mig to allowed or never",
    );
}
