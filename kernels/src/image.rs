//! The prebuilt fatbins and which kernel is in which.
//!
//! Invariant: `prebuilt/manifest.json` names the hash of every source and output; tests compare both, so a kernel that
//! was edited without a rebuild fails the suite and not a user.

use std::path::Path;

use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Compiled code of one source file.
#[derive(Clone, Copy, Debug)]
pub struct Fatbin {
    /// The source's name without its ending.
    pub name: &'static str,
    /// Code for sm_80, sm_90a and sm_100a, and PTX for what comes later.
    pub image: &'static [u8],
    /// Entry points.
    pub kernels: &'static [&'static str],
}

macro_rules! fatbins {
    ($($name:literal: [$($kernel:literal),+]),+ $(,)?) => {
        /// Every fatbin.
        pub const FATBINS: &[Fatbin] = &[$(Fatbin {
            name: $name,
            image: include_bytes!(concat!("../prebuilt/", $name, ".fatbin")),
            kernels: &[$($kernel),+],
        }),+];
    };
}

fatbins! {
    "combine_bf16": ["combine_bf16"],
    "copy_blocks": ["copy_blocks"],
    "embed_bf16": ["embed_bf16"],
    "gate_f32": ["gate_f32"],
    "gemm_bf16": ["gemm_bf16_stream16", "gemm_bf16_stream32", "gemm_bf16_tile"],
    "gemm_fp8": ["gemm_fp8_stream16", "gemm_fp8_stream32", "gemm_fp8_tile"],
    "gqa_cache_write_bf16": ["gqa_cache_write_bf16"],
    "gqa_decode_bf16": ["gqa_decode_bf16_128", "gqa_decode_bf16_64"],
    "gqa_prefill_bf16": ["gqa_prefill_bf16_128", "gqa_prefill_bf16_64"],
    "greedy_f32": ["greedy_f32"],
    "grouped_gemm_bf16": ["grouped_gemm_bf16_stream16", "grouped_gemm_bf16_tile"],
    "grouped_gemm_fp8": ["grouped_gemm_fp8_stream16", "grouped_gemm_fp8_tile"],
    "hopper_gemm_bf16": ["hopper_gemm_bf16_128", "hopper_gemm_bf16_16", "hopper_gemm_bf16_32", "hopper_gemm_bf16_64"],
    "hopper_gemm_fp8": ["hopper_gemm_fp8_128", "hopper_gemm_fp8_16", "hopper_gemm_fp8_32", "hopper_gemm_fp8_64"],
    "hopper_mla_decode_bf16": ["hopper_mla_decode_bf16_512_64", "hopper_mla_decode_bf16_64_32"],
    "hopper_mla_prefill_bf16": ["hopper_mla_prefill_bf16_128_64_128", "hopper_mla_prefill_bf16_32_32_32"],
    "logprobs_f32": ["logprobs_f32"],
    "mla_cache_write_bf16": ["mla_cache_write_bf16"],
    "mla_cache_write_fp8": ["mla_cache_write_fp8"],
    "mla_combine_bf16": ["mla_combine_bf16"],
    "mla_decode_bf16": ["mla_decode_bf16_512_64", "mla_decode_bf16_64_32"],
    "mla_decode_fp8": ["mla_decode_fp8_512_64"],
    "mla_prefill_bf16": ["mla_prefill_bf16_128_64_128", "mla_prefill_bf16_32_32_32"],
    "permute": ["permute"],
    "quantise_fp8": ["quantise_fp8"],
    "rms_norm_bf16": ["rms_norm_bf16"],
    "rms_norm_fp8": ["rms_norm_fp8"],
    "rope_bf16": ["rope_bf16"],
    "sample_adjust_f32": ["sample_adjust_f32"],
    "sample_f32": ["sample_f32"],
    "share_columns": ["share_columns"],
    "swiglu_bf16": ["swiglu_bf16"],
    "swiglu_fp8": ["swiglu_fp8"],
}

/// The fatbin that holds a kernel.
pub fn fatbin_of(kernel: &str) -> Option<&'static Fatbin> {
    FATBINS
        .iter()
        .find(|fatbin| fatbin.kernels.contains(&kernel))
}

/// What `build.py` wrote about the fatbins.
#[derive(Debug, Deserialize)]
pub struct Manifest {
    /// The package that compiled them.
    pub compiler: String,
    /// One entry per file.
    pub fatbins: Vec<ManifestEntry>,
}

/// A fatbin in the manifest.
#[derive(Debug, Deserialize)]
pub struct ManifestEntry {
    /// The source's name without its ending.
    pub name: String,
    /// The source, relative to this crate.
    pub source: String,
    /// Over the source and all headers.
    pub source_sha256: String,
    /// Of the fatbin.
    pub sha256: String,
    /// Registers by kernel and architecture.
    pub registers: std::collections::BTreeMap<String, std::collections::BTreeMap<String, u32>>,
}

impl Manifest {
    /// The committed one.
    ///
    /// # Errors
    /// It is not what `build.py` writes.
    pub fn committed() -> Result<Self, serde_json::Error> {
        serde_json::from_str(include_str!("../prebuilt/manifest.json"))
    }
}

/// SHA-256 in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The hash of a source and all headers under `root`, as `build.py` computes it.
///
/// # Errors
/// A file cannot be read.
pub fn source_sha256(root: &Path, source: &str) -> std::io::Result<String> {
    let mut headers = Vec::new();
    let mut folders = vec![root.join("cuda")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "h") {
                headers.push(path);
            }
        }
    }
    headers.sort();
    headers.push(root.join(source));
    let mut digest = Sha256::new();
    for path in headers {
        let name = path.strip_prefix(root).unwrap_or(&path);
        digest.update(name.to_string_lossy().as_bytes());
        digest.update(b"\0");
        digest.update(std::fs::read(&path)?);
        digest.update(b"\0");
    }
    Ok(digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_committed_fatbins_are_those_of_the_manifest_and_of_the_sources() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let manifest = Manifest::committed().expect("a manifest");
        assert_eq!(manifest.fatbins.len(), FATBINS.len());
        for (entry, fatbin) in manifest.fatbins.iter().zip(FATBINS) {
            assert_eq!(entry.name, fatbin.name);
            assert_eq!(
                entry.sha256,
                sha256(fatbin.image),
                "{} was changed by hand",
                entry.name
            );
            assert_eq!(
                entry.source_sha256,
                source_sha256(root, &entry.source).expect("the source"),
                "{} or a header changed after the fatbin was built: run kernels/build.py",
                entry.source
            );
            let named: BTreeSet<&str> = entry.registers.keys().map(String::as_str).collect();
            assert_eq!(named, fatbin.kernels.iter().copied().collect());
        }
    }

    #[test]
    fn fatbins_stay_small() {
        let total: usize = FATBINS.iter().map(|fatbin| fatbin.image.len()).sum();
        assert!(total < 5 << 20, "{total} bytes");
    }
}
