//! The model's source.

use std::fmt;

use operator_api::Model;

use super::{Rules, is_object_name, is_word};

/// Where a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder in the engine's container.
    File {
        /// Absolute path.
        path: String,
    },
    /// A folder of a persistent volume claim.
    Claim {
        /// Name of the claim.
        claim: String,
        /// Path below its root, without a leading slash; empty for the root.
        path: String,
    },
    /// A repository of a hub.
    Hub {
        /// `org/name`.
        repository: String,
    },
    /// A prefix of an object store.
    Bucket {
        /// `bucket/prefix`.
        prefix: String,
    },
}

/// Where a claim is mounted in the engine's container.
pub const CLAIM_MOUNT: &str = "/models/pvc";

impl Source {
    /// What the engine is told.
    pub fn engine_uri(&self) -> String {
        match self {
            Self::File { path } => format!("file://{path}"),
            Self::Claim { path, .. } if path.is_empty() => format!("file://{CLAIM_MOUNT}"),
            Self::Claim { path, .. } => format!("file://{CLAIM_MOUNT}/{path}"),
            Self::Hub { repository } => format!("hf://{repository}"),
            Self::Bucket { prefix } => format!("s3://{prefix}"),
        }
    }

    /// Whether the engine copies it to local disk before loading.
    pub fn is_fetched(&self) -> bool {
        matches!(self, Self::Hub { .. } | Self::Bucket { .. })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Claim { claim, path } => write!(f, "pvc://{claim}/{path}"),
            other => f.write_str(&other.engine_uri()),
        }
    }
}

const FIELD: &str = "spec.model.source";

/// Reads the source and checks the fields that belong to it.
pub(super) fn source(rules: &mut Rules, model: &Model) -> Option<Source> {
    let Model {
        source,
        revision,
        digest,
        served_name,
        secret_ref,
        config_map_ref,
    } = model;
    let parsed = parse(rules, source);
    let is_hub = source.starts_with("hf://");
    if let Some(revision) = revision {
        rules.require(
            is_word(revision, 128, "._/-"),
            "spec.model.revision",
            revision,
            "must be a branch, tag or commit",
        );
        rules.require(
            is_hub,
            "spec.model.revision",
            revision,
            "names a branch, tag or commit of an hf:// source; pin other sources with spec.model.digest",
        );
    }
    if let Some(digest) = digest {
        let hex = digest.strip_prefix("sha256:").unwrap_or("");
        rules.require(
            hex.len() == 64 && hex.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f')),
            "spec.model.digest",
            digest,
            "must be sha256: and 64 hexadecimal digits, as status.digest shows it",
        );
        rules.require(
            config_map_ref.is_none(),
            "spec.model.digest",
            digest,
            "is checked by the inspection that spec.model.configMapRef skips; remove one of them",
        );
    }
    if let Some(name) = served_name {
        rules.require(
            is_word(name, 253, "._:/-"),
            "spec.model.servedName",
            name,
            "must be letters, digits, '.', '_', ':', '/' and '-', starting with a letter or digit",
        );
    }
    if let Some(secret) = secret_ref {
        rules.require(
            is_hub || source.starts_with("s3://"),
            "spec.model.secretRef",
            &secret.name,
            "holds credentials for hf:// and s3:// sources; remove it for file:// and pvc://",
        );
    }
    parsed
}

fn parse(rules: &mut Rules, text: &str) -> Option<Source> {
    let quoted = format_args!("\"{text}\"").to_string();
    let mut refuse = |way_out: &str| {
        rules.refuse(FIELD, &quoted, way_out);
        None
    };
    if text.len() > 1024 || text.chars().any(|c| c.is_control() || c == ' ') {
        return refuse("must be at most 1024 printable characters without spaces");
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return refuse("must begin with hf://, s3://, pvc:// or file://");
    };
    if scheme == "oci" {
        return refuse("oci:// is not served yet; use hf://, s3://, pvc:// or file://");
    }
    if rest.is_empty() || !matches!(scheme, "hf" | "s3" | "pvc" | "file") {
        return refuse("must begin with hf://, s3://, pvc:// or file:// and name a model");
    }
    if rest.split('/').any(|segment| segment == "..") {
        return refuse("must not contain '..' as a path segment");
    }
    let trimmed = rest.trim_end_matches('/');
    match scheme {
        "file" if rest.starts_with('/') && trimmed.len() > 1 => Some(Source::File {
            path: trimmed.to_owned(),
        }),
        "file" => refuse("file:// needs an absolute path: file:///models/name"),
        "hf" => {
            let is_repository = trimmed
                .split_once('/')
                .is_some_and(|(org, name)| is_word(org, 96, "._-") && is_word(name, 96, "._-"))
                && trimmed == rest;
            if is_repository {
                Some(Source::Hub {
                    repository: rest.to_owned(),
                })
            } else {
                refuse(
                    "hf:// needs an organisation and a name: hf://org/name; a branch, tag or commit goes into spec.model.revision",
                )
            }
        }
        "s3" => {
            let bucket = trimmed.split('/').next().unwrap_or("");
            if is_object_name(bucket) && bucket.len() >= 3 {
                Some(Source::Bucket {
                    prefix: trimmed.to_owned(),
                })
            } else {
                refuse("s3:// needs a bucket and a prefix: s3://bucket/prefix")
            }
        }
        _ => {
            let (claim, path) = trimmed.split_once('/').unwrap_or((trimmed, ""));
            if is_object_name(claim) {
                Some(Source::Claim {
                    claim: claim.to_owned(),
                    path: path.to_owned(),
                })
            } else {
                refuse("pvc:// needs the name of a claim and a path: pvc://claim/path")
            }
        }
    }
}
