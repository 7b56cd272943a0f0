//! From what a user wrote to what can be planned: `ModelDeployment` → [`ValidDeployment`].
//!
//! Every rule of the CRD is here again, because a stored object may be older than a rule, and the
//! rules that no schema can state. A [`ValidDeployment`] cannot hold a value that a later stage
//! would have to refuse. All violations are reported at once.

mod accelerator;
mod model;
mod placement;
mod rollout;
mod template;

use std::fmt;

use engine_spec::{Dtype, KvCacheDtype, NUM_SPECULATIVE_TOKENS_MAX, Parallelism, Quantization};
use operator_api::{Autoscaling, ModelDeployment, ModelDeploymentSpec, PodTemplate, Precision};

pub use accelerator::{ValidAccelerator, ValidMig};
pub use model::{CLAIM_MOUNT, Source};
pub use placement::ValidPlacement;
pub use rollout::{Step, ValidAnalysis, ValidRollout};

/// Sequences per replica when the user names no number.
pub const MAX_NUM_SEQS_DEFAULT: u32 = 16;

/// A rule that a spec breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field, for example `spec.replicas`.
    pub field: String,
    /// The value found, as the user wrote it; empty when it is missing.
    pub value: String,
    /// What would be right.
    pub way_out: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            field,
            value,
            way_out,
        } = self;
        if value.is_empty() {
            write!(f, "{field}: {way_out}")
        } else {
            write!(f, "{field} = {value}: {way_out}")
        }
    }
}

/// All rules a spec breaks; never empty.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Violations(pub Vec<Violation>);

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, violation) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{violation}")?;
        }
        Ok(())
    }
}

/// A wish that contradicts neither itself nor what is served.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidDeployment {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Uid, for owner references.
    pub uid: String,
    /// Generation of the spec.
    pub generation: Option<i64>,
    /// Where the model is.
    pub source: Source,
    /// Branch, tag or commit.
    pub model_revision: Option<String>,
    /// Digest the inspection must find.
    pub digest: Option<String>,
    /// Name clients ask for.
    pub served_name: String,
    /// Secret with credentials.
    pub secret: Option<String>,
    /// Config map with the published config, which replaces inspection.
    pub config_map: Option<String>,
    /// What to compute on.
    pub accelerator: ValidAccelerator,
    /// Given parallelism; none for automatic.
    pub parallelism: Option<Parallelism>,
    /// Secret that the pods of a replica know.
    pub group_secret: Option<String>,
    /// Number format.
    pub dtype: Dtype,
    /// Integer weights.
    pub quantization: Quantization,
    /// Longest sequence, when given.
    pub max_model_len: Option<u32>,
    /// Sequences per replica.
    pub max_num_seqs: u32,
    /// What keys and values are kept as.
    pub kv_cache: KvCacheDtype,
    /// Tokens drafted for each sequence and step.
    pub draft_tokens: u32,
    /// How many replicas.
    pub scale: Scale,
    /// How replicas are exchanged.
    pub rollout: ValidRollout,
    /// Which nodes.
    pub placement: ValidPlacement,
    /// Overrides.
    pub template: PodTemplate,
}

/// How many replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scale {
    /// A fixed number.
    Fixed(u32),
    /// A range that follows demand.
    Range(ScaleRange),
}

/// A range of replicas that follows demand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScaleRange {
    /// Fewest.
    pub min: u32,
    /// Most.
    pub max: u32,
    /// Requests waiting per replica to steer by, unless only the other target is given.
    pub queued_per_replica: Option<u32>,
    /// KV use in percent to steer by, unless only the other target is given.
    pub kv_percent: Option<u32>,
    /// Seconds demand must be above.
    pub up_seconds: u32,
    /// Seconds demand must be below.
    pub down_seconds: u32,
}

/// Collects violations.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    broken: Vec<Violation>,
}

impl Rules {
    pub(crate) fn refuse(&mut self, field: &str, value: impl fmt::Display, way_out: &str) {
        self.broken.push(Violation {
            field: field.to_owned(),
            value: value.to_string(),
            way_out: way_out.to_owned(),
        });
    }

    pub(crate) fn require(
        &mut self,
        holds: bool,
        field: &str,
        value: impl fmt::Display,
        way_out: &str,
    ) {
        if !holds {
            self.refuse(field, value, way_out);
        }
    }

    /// A number within its range, or the default when absent.
    fn number(&mut self, field: &str, value: Option<i32>, range: (u32, u32), default: u32) -> u32 {
        let Some(value) = value else { return default };
        match u32::try_from(value) {
            Ok(number) if (range.0..=range.1).contains(&number) => number,
            _ => {
                let way_out = format!("must be between {} and {}", range.0, range.1);
                self.refuse(field, value, &way_out);
                default
            }
        }
    }

    fn name(&mut self, field: &str, value: Option<&str>) -> Option<String> {
        let value = value?;
        self.require(
            is_object_name(value),
            field,
            format_args!("\"{value}\""),
            "must be a Kubernetes object name: lower case letters, digits, '-' and '.', at most 253",
        );
        Some(value.to_owned())
    }
}

/// Checks a wish.
///
/// # Errors
/// All rules that it breaks, each with field, value and way out.
pub fn validate(deployment: &ModelDeployment) -> Result<ValidDeployment, Violations> {
    let mut rules = Rules::default();
    let ModelDeploymentSpec {
        model,
        accelerator,
        parallelism,
        precision,
        quantization,
        context,
        speculation,
        replicas,
        autoscaling,
        rollout,
        placement,
        pod_template,
    } = &deployment.spec;
    let name = deployment.metadata.name.clone().unwrap_or_default();
    rules.require(
        name.len() <= 40 && is_service_name(&name),
        "metadata.name",
        &name,
        "must be at most 40 lower case letters, digits and '-', starting with a letter: it names a Service and, with a suffix, pods; create the ModelDeployment again under another name",
    );
    let source = model::source(&mut rules, model);
    let accelerator = accelerator::valid_accelerator(&mut rules, accelerator);
    let group_secret = parallelism
        .as_ref()
        .and_then(|it| it.group_secret_ref.as_ref());
    let group_secret = rules.name(
        "spec.parallelism.groupSecretRef.name",
        group_secret.map(|r| r.name.as_str()),
    );
    let parallelism = valid_parallelism(&mut rules, parallelism.as_ref(), &accelerator);
    let quantization = match quantization {
        operator_api::Quantization::None => Quantization::None,
        operator_api::Quantization::Int8 => Quantization::Int8,
        operator_api::Quantization::Int4 => Quantization::Int4,
    };
    let on_cpu = matches!(accelerator, ValidAccelerator::Cpu);
    rules.require(
        quantization.is_none() || (on_cpu && *precision != Precision::Float32),
        "spec.quantization",
        quantization,
        "makes integers on the cpu accelerator, with precision auto or bfloat16; set it to none or change those",
    );
    let max_model_len = context
        .max_tokens
        .map(|tokens| rules.number("spec.context.maxTokens", Some(tokens), (16, 1 << 24), 16));
    let max_num_seqs = rules.number(
        "spec.context.maxConcurrentSequences",
        context.max_concurrent_sequences,
        (1, 4096),
        MAX_NUM_SEQS_DEFAULT,
    );
    let kv_cache = match context.kv_cache_dtype {
        operator_api::KvCacheDtype::Auto => KvCacheDtype::Auto,
        operator_api::KvCacheDtype::Fp8 => KvCacheDtype::Fp8,
    };
    rules.require(
        kv_cache.is_auto() || !on_cpu,
        "spec.context.kvCacheDtype",
        kv_cache,
        "is computed on GPUs; set it to auto or choose accelerator type nvidia",
    );
    let draft_tokens = rules.number(
        "spec.speculation.draftTokens",
        speculation.draft_tokens,
        (0, NUM_SPECULATIVE_TOKENS_MAX),
        0,
    );
    let scale = valid_scale(&mut rules, *replicas, autoscaling.as_ref());
    let rollout = rollout::valid_rollout(&mut rules, rollout);
    let placement = placement::valid_placement(&mut rules, placement);
    accelerator::check_binding(&mut rules, &accelerator, placement.binding);
    template::check(&mut rules, pod_template);
    let secret = rules.name(
        "spec.model.secretRef.name",
        model.secret_ref.as_ref().map(|r| r.name.as_str()),
    );
    let config_map = rules.name(
        "spec.model.configMapRef.name",
        model.config_map_ref.as_ref().map(|r| r.name.as_str()),
    );
    let Some(source) = source.filter(|_| rules.broken.is_empty()) else {
        return Err(Violations(rules.broken));
    };
    Ok(ValidDeployment {
        served_name: model.served_name.clone().unwrap_or_else(|| name.clone()),
        name,
        namespace: deployment.metadata.namespace.clone().unwrap_or_default(),
        uid: deployment.metadata.uid.clone().unwrap_or_default(),
        generation: deployment.metadata.generation,
        source,
        model_revision: model.revision.clone(),
        digest: model.digest.clone(),
        secret,
        config_map,
        accelerator,
        parallelism,
        group_secret,
        dtype: match precision {
            Precision::Auto => Dtype::Auto,
            Precision::Float32 => Dtype::Float32,
            Precision::Bfloat16 => Dtype::Bfloat16,
        },
        quantization,
        max_model_len,
        max_num_seqs,
        kv_cache,
        draft_tokens,
        scale,
        rollout,
        placement,
        template: pod_template.clone(),
    })
}

fn valid_parallelism(
    rules: &mut Rules,
    given: Option<&operator_api::Parallelism>,
    accelerator: &ValidAccelerator,
) -> Option<Parallelism> {
    let given = given?;
    let &operator_api::Parallelism {
        tensor,
        expert,
        pipeline,
        group_secret_ref: _,
    } = given;
    if tensor.is_none() && expert.is_none() && pipeline.is_none() {
        return None;
    }
    let expert_default = 1;
    let valid = Parallelism {
        tensor: rules.number("spec.parallelism.tensor", tensor, (1, 64), 1),
        expert: rules.number("spec.parallelism.expert", expert, (1, 1024), expert_default),
        pipeline: rules.number("spec.parallelism.pipeline", pipeline, (1, 64), 1),
    };
    rules.require(
        valid.pipeline == 1,
        "spec.parallelism.pipeline",
        valid.pipeline,
        "is not served above 1: each device holds a part of every layer; use spec.parallelism.tensor",
    );
    rules.require(
        valid.expert == 1 || valid.expert == valid.tensor,
        "spec.parallelism.expert",
        valid.expert,
        "must be 1 or equal to spec.parallelism.tensor: both use the same GPUs",
    );
    accelerator::check_ranks(rules, accelerator, valid.ranks());
    Some(valid)
}

fn valid_scale(rules: &mut Rules, replicas: Option<i32>, range: Option<&Autoscaling>) -> Scale {
    match (replicas, range) {
        (Some(_), None) => Scale::Fixed(rules.number("spec.replicas", replicas, (0, 10_000), 1)),
        (None, Some(range)) => Scale::Range(valid_range(rules, range)),
        (Some(number), Some(_)) => {
            rules.refuse(
                "spec.replicas",
                number,
                "set exactly one of spec.replicas (a fixed number) and spec.autoscaling (a range)",
            );
            Scale::Fixed(1)
        }
        (None, None) => {
            rules.refuse(
                "spec.replicas",
                "",
                "set exactly one of spec.replicas (a fixed number) and spec.autoscaling (a range)",
            );
            Scale::Fixed(1)
        }
    }
}

fn valid_range(rules: &mut Rules, given: &Autoscaling) -> ScaleRange {
    let Autoscaling {
        min_replicas,
        max_replicas,
        targets,
        stabilization,
    } = given;
    let field = "spec.autoscaling.minReplicas";
    if *min_replicas == 0 {
        rules.refuse(field, 0, "scaling to zero is not served yet; use at least 1, or spec.replicas: 0 to stop the model");
    } else {
        rules.number(field, Some(*min_replicas), (1, 10_000), 1);
    }
    let max = rules.number(
        "spec.autoscaling.maxReplicas",
        Some(*max_replicas),
        (1, 10_000),
        1,
    );
    let min = u32::try_from(*min_replicas).unwrap_or(1);
    rules.require(
        min_replicas <= max_replicas,
        field,
        min_replicas,
        "must not be above spec.autoscaling.maxReplicas",
    );
    let queued = targets.queued_requests_per_replica.map(|n| {
        rules.number(
            "spec.autoscaling.targets.queuedRequestsPerReplica",
            Some(n),
            (1, 10_000),
            2,
        )
    });
    let kv = targets.kv_cache_utilization_percent.map(|n| {
        rules.number(
            "spec.autoscaling.targets.kvCacheUtilizationPercent",
            Some(n),
            (1, 100),
            75,
        )
    });
    let neither = queued.is_none() && kv.is_none();
    ScaleRange {
        min,
        max,
        queued_per_replica: if neither { Some(2) } else { queued },
        kv_percent: if neither { Some(75) } else { kv },
        up_seconds: rules.number(
            "spec.autoscaling.stabilization.scaleUpSeconds",
            stabilization.scale_up_seconds,
            (0, 3600),
            0,
        ),
        down_seconds: rules.number(
            "spec.autoscaling.stabilization.scaleDownSeconds",
            stabilization.scale_down_seconds,
            (0, 86_400),
            300,
        ),
    }
}

/// A letter or digit first, then letters, digits and `more`.
pub(crate) fn is_word(text: &str, length_max: usize, more: &str) -> bool {
    text.len() <= length_max
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || more.contains(c))
}

/// RFC 1035: a letter first, no '-' at the end.
fn is_service_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && !text.ends_with('-')
        && text
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// RFC 1123 subdomain.
pub(crate) fn is_object_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text.split('.').all(|part| {
            !part.is_empty()
                && !part.starts_with('-')
                && !part.ends_with('-')
                && part
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        })
}
