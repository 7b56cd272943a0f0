//! What a request body asks for, checked field by field.
//!
//! Fields that OpenAI knows and this engine does not serve are refused by name unless they ask for nothing; fields
//! that nobody knows are ignored.

use std::collections::BTreeMap;
use std::time::Duration;

use engine_core::{SamplingParameters, TOP_LOGPROBS_MAX, TokenId};
use engine_text::GenerationDefaults;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::{Fields, show, wrong};
use crate::resume::{FIELD, Resume};

/// Stop strings a request may have; OpenAI takes 4, vLLM any number.
const STOPS_MAX: usize = 16;
/// Bytes of a stop string.
const STOP_BYTES_MAX: usize = 1024;
/// Entries of `stop_token_ids`: each token of an answer is compared with them.
const STOP_TOKENS_MAX: usize = 1024;
/// Entries of `logit_bias`.
const BIASES_MAX: usize = 1024;

/// What both kinds of request have in common.
#[derive(Clone, Debug)]
pub struct Asked {
    pub stream: bool,
    pub include_usage: bool,
    pub choices: u32,
    /// Absent: until the context is full.
    pub max_tokens: Option<usize>,
    pub parameters: SamplingParameters,
    pub stops: Vec<String>,
    pub stop_tokens: Vec<TokenId>,
    pub cache_salt: String,
    /// Lower goes first; vLLM's field.
    pub priority: i64,
    /// Whose request this is.
    pub tenant: String,
    /// How long it may take, waiting included.
    pub timeout: Option<Duration>,
    /// Continue this answer.
    pub resume: Option<Resume>,
}

/// A known field that is not served, when it asks for nothing, and the way out.
pub type Unserved = (&'static str, fn(&Value) -> bool, &'static str);

/// Whether a list or an object asks for nothing.
pub fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty)
}

/// Refuses known fields that are not served.
pub fn refuse_unserved(fields: &Fields, unserved: &[Unserved]) -> Result<(), ApiError> {
    for (name, asks_for_nothing, way_out) in unserved {
        if let Some(value) = fields.get(name).filter(|value| !asks_for_nothing(value)) {
            return Err(ApiError::unsupported(
                *name,
                format!(
                    "{name} is {}, but this engine does not serve it yet; {way_out}",
                    show(value)
                ),
            ));
        }
    }
    Ok(())
}

/// The `model` field: absent is fine, another name is not.
pub fn check_model(fields: &Fields, served: &str) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(asked) if asked != served => Err(ApiError::unknown_model(asked, served)),
        _ => Ok(()),
    }
}

impl Asked {
    /// Checks the fields that chat and completions share.
    ///
    /// # Errors
    /// Names the first field that is wrong.
    pub fn parse(
        fields: &Fields,
        defaults: &GenerationDefaults,
        seed: u64,
    ) -> Result<Self, ApiError> {
        let stream = fields.flag("stream")?;
        let options = fields.object("stream_options")?;
        if let (false, Some(_)) = (stream, options) {
            let message = "stream_options is an object, but stream is false; set stream to true or leave stream_options out";
            return Err(ApiError::invalid("stream_options", message));
        }
        let include_usage =
            options.is_some_and(|options| options.get("include_usage") == Some(&Value::Bool(true)));
        let choices = fields.count("n")?.unwrap_or(1);
        let choices = u32::try_from(choices)
            .ok()
            .filter(|n| *n > 0)
            .ok_or_else(|| wrong("n", &choices.into(), "at least 1"))?;
        let max_tokens = match fields.count("max_completion_tokens")? {
            Some(count) => Some(count),
            None => fields.count("max_tokens")?,
        };
        if max_tokens == Some(0) {
            return Err(wrong("max_tokens", &0.into(), "at least 1"));
        }
        let stops = fields.strings("stop")?;
        if stops.len() > STOPS_MAX
            || stops
                .iter()
                .any(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX)
        {
            let message = format!(
                "stop must be at most {STOPS_MAX} strings of 1 to {STOP_BYTES_MAX} bytes each"
            );
            return Err(ApiError::invalid("stop", message));
        }
        let mut parameters = parameters(fields, defaults, seed)?;
        let resume = Resume::parse(fields)?;
        if let Some(resume) = &resume {
            if choices != 1 {
                let message =
                    format!("{FIELD} is given, but n is {choices}; only one answer can go on");
                return Err(ApiError::invalid(FIELD, message));
            }
            parameters.seed = resume.seed;
        }
        Ok(Self {
            stream,
            include_usage,
            choices,
            max_tokens: max_tokens.map(|count| usize::try_from(count).unwrap_or(usize::MAX)),
            parameters,
            stops,
            stop_tokens: stop_tokens(fields)?,
            cache_salt: fields.string("cache_salt")?.unwrap_or_default().to_owned(),
            priority: fields.integer("priority")?.unwrap_or(0),
            tenant: String::new(),
            timeout: None,
            resume,
        })
    }
}

fn parameters(
    fields: &Fields,
    defaults: &GenerationDefaults,
    seed: u64,
) -> Result<SamplingParameters, ApiError> {
    let base = SamplingParameters::default();
    let default_temperature = match defaults.do_sample {
        Some(false) => 0.0,
        _ => defaults.temperature.unwrap_or(base.temperature),
    };
    let parameters = SamplingParameters {
        temperature: fields.number("temperature")?.unwrap_or(default_temperature),
        top_p: fields
            .number("top_p")?
            .or(defaults.top_p)
            .unwrap_or(base.top_p),
        top_k: top_k(fields)?.or(defaults.top_k).unwrap_or(base.top_k),
        min_p: fields.number("min_p")?.unwrap_or(base.min_p),
        presence_penalty: fields
            .number("presence_penalty")?
            .unwrap_or(base.presence_penalty),
        frequency_penalty: fields
            .number("frequency_penalty")?
            .unwrap_or(base.frequency_penalty),
        repetition_penalty: fields
            .number("repetition_penalty")?
            .or(defaults.repetition_penalty)
            .unwrap_or(base.repetition_penalty),
        logit_bias: logit_bias(fields)?,
        seed: fields.bits("seed")?.unwrap_or(seed),
        logprobs: None,
        ignore_eos: fields.flag("ignore_eos")?,
    };
    parameters
        .validate()
        .map_err(|error| ApiError::invalid(error.field, error.to_string()))?;
    Ok(parameters)
}

/// vLLM's clients write -1 for all.
fn top_k(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let Some(value) = fields.get("top_k") else {
        return Ok(None);
    };
    match value.as_i64() {
        Some(-1) => Ok(Some(0)),
        Some(k) => u32::try_from(k)
            .map(Some)
            .map_err(|_| wrong("top_k", value, "at least 0, or -1 for all")),
        None => Err(wrong("top_k", value, "a whole number")),
    }
}

fn logit_bias(fields: &Fields) -> Result<BTreeMap<TokenId, f32>, ApiError> {
    let mut biases = BTreeMap::new();
    let Some(object) = fields.object("logit_bias")? else {
        return Ok(biases);
    };
    if object.len() > BIASES_MAX {
        let message = format!(
            "logit_bias has {} entries, but at most {BIASES_MAX} are taken",
            object.len()
        );
        return Err(ApiError::invalid("logit_bias", message));
    }
    for (key, value) in object {
        let token = key.parse::<u32>().map_err(|_| {
            wrong(
                "logit_bias",
                &Value::String(key.clone()),
                "an object from token ids to numbers",
            )
        })?;
        let bias = value
            .as_f64()
            .ok_or_else(|| wrong("logit_bias", value, "an object from token ids to numbers"))?;
        biases.insert(TokenId(token), bias as f32);
    }
    Ok(biases)
}

fn stop_tokens(fields: &Fields) -> Result<Vec<TokenId>, ApiError> {
    let name = "stop_token_ids";
    match fields.list(name)? {
        None => Ok(Vec::new()),
        Some(list) if list.len() > STOP_TOKENS_MAX => {
            let message = format!(
                "{name} has {} entries, but at most {STOP_TOKENS_MAX} are taken",
                list.len()
            );
            Err(ApiError::invalid(name, message))
        }
        Some(list) => tokens(list, name),
    }
}

/// Token ids of a list.
pub fn tokens(list: &[Value], name: &str) -> Result<Vec<TokenId>, ApiError> {
    list.iter()
        .map(|value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .map(TokenId)
                .ok_or_else(|| wrong(name, value, "a list of token ids"))
        })
        .collect()
}

/// A count of alternatives within the limit.
pub fn check_logprobs(param: &'static str, count: u64) -> Result<u32, ApiError> {
    u32::try_from(count)
        .ok()
        .filter(|count| *count <= TOP_LOGPROBS_MAX)
        .ok_or_else(|| wrong(param, &count.into(), "at most 20"))
}
