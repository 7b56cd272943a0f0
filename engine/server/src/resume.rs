//! What it takes to continue an answer elsewhere: the state that an aborted request is sent home with.
//!
//! The tokens so far, the seed and a fingerprint of what was asked are enough, because a token is a function of seed,
//! position and what came before. The client repeats its request with the state as `cachalot_resume` and gets what is
//! missing; put together it is the answer that an undisturbed engine would have given, byte by byte.

use engine_core::{SamplingParameters, TokenId};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::request::tokens;

/// The field, in requests and in the last event of an aborted answer.
pub const FIELD: &str = "cachalot_resume";
/// The only version so far; another one is refused.
const VERSION: u64 = 1;

/// An answer that was cut off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// Key of the random stream.
    pub seed: u64,
    /// Output so far.
    pub tokens: Vec<TokenId>,
    /// Of the request; see [`fingerprint`].
    pub request: String,
}

impl Resume {
    /// Reads the field of a request.
    ///
    /// # Errors
    /// It is of another version, or no state.
    pub fn parse(fields: &Fields) -> Result<Option<Self>, ApiError> {
        let Some(object) = fields.object(FIELD)? else {
            return Ok(None);
        };
        let get = |key: &str| object.get(key).unwrap_or(&Value::Null);
        if get("version") != VERSION {
            let expected =
                "1, the version that this engine writes; send the request without the state";
            return Err(wrong(&format!("{FIELD}.version"), get("version"), expected));
        }
        let text = |key: &str, expected: &str| {
            let text = get(key).as_str();
            text.ok_or_else(|| wrong(&format!("{FIELD}.{key}"), get(key), expected))
        };
        let expected = "a whole number of 64 bits as a string";
        let seed = text("seed", expected)?
            .parse()
            .map_err(|_| wrong(&format!("{FIELD}.seed"), get("seed"), expected))?;
        let name = format!("{FIELD}.tokens");
        let list = get("tokens")
            .as_array()
            .ok_or_else(|| wrong(&name, get("tokens"), "a list of token ids"))?;
        Ok(Some(Self {
            seed,
            tokens: tokens(list, &name)?,
            request: text("request", "a string")?.to_owned(),
        }))
    }

    /// The state as a client gets it. The seed is a string because JavaScript's numbers are too short for it.
    pub fn to_json(&self) -> Value {
        json!({
            "version": VERSION,
            "seed": self.seed.to_string(),
            "tokens": self.tokens.iter().map(|token| token.0).collect::<Vec<_>>(),
            "request": self.request,
        })
    }

    /// Checks that the state belongs to this request.
    ///
    /// # Errors
    /// It belongs to another one.
    pub fn check(&self, fingerprint: &str, max_tokens: usize) -> Result<(), ApiError> {
        if self.request != fingerprint {
            let message = format!(
                "{FIELD} belongs to a request with another model, prompt or sampling; repeat the request unchanged"
            );
            return Err(ApiError::invalid(FIELD, message));
        }
        if self.tokens.len() >= max_tokens {
            let message = format!(
                "{FIELD}.tokens has {} tokens, but max_tokens is {max_tokens}: nothing is left to generate",
                self.tokens.len()
            );
            return Err(ApiError::invalid(format!("{FIELD}.tokens"), message));
        }
        Ok(())
    }
}

/// A digest of all that decides an answer, but for the seed.
pub fn fingerprint(model: &str, prompt: &[TokenId], parameters: &SamplingParameters) -> String {
    let SamplingParameters {
        temperature,
        top_p,
        top_k,
        min_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        logit_bias,
        seed: _,
        logprobs: _,
        ignore_eos,
    } = parameters;
    let mut hash = Sha256::new();
    hash.update(model.as_bytes());
    hash.update([0]);
    for number in [
        temperature,
        top_p,
        min_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
    ] {
        hash.update(number.to_bits().to_le_bytes());
    }
    hash.update(top_k.to_le_bytes());
    hash.update([u8::from(*ignore_eos)]);
    hash.update((logit_bias.len() as u64).to_le_bytes());
    for (token, bias) in logit_bias {
        hash.update(token.0.to_le_bytes());
        hash.update(bias.to_bits().to_le_bytes());
    }
    for token in prompt {
        hash.update(token.0.to_le_bytes());
    }
    let digest = hash.finalize();
    digest[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let state = Resume {
            seed: u64::MAX,
            tokens: vec![TokenId(7), TokenId(0)],
            request: fingerprint("m", &[TokenId(1)], &SamplingParameters::default()),
        };
        let parse = |value: Value| {
            let body = json!({FIELD: value}).to_string();
            Resume::parse(&Fields::parse(body.as_bytes()).unwrap())
        };
        assert_eq!(parse(state.to_json()).unwrap().as_ref(), Some(&state));
        assert_eq!(parse(Value::Null).unwrap(), None);
        for (key, value) in [
            ("version", json!(2)),
            ("seed", json!(7)),
            ("tokens", json!("x")),
            ("request", json!(1)),
        ] {
            let mut wrong = state.to_json();
            wrong[key] = value;
            let error = parse(wrong).unwrap_err();
            assert_eq!(error.param, Some(format!("{FIELD}.{key}")));
        }
    }

    #[test]
    fn a_state_fits_its_own_request_only() {
        let base = SamplingParameters::default();
        let own = fingerprint("m", &[TokenId(1)], &base);
        let other_seed = SamplingParameters {
            seed: 9,
            ..base.clone()
        };
        assert_eq!(fingerprint("m", &[TokenId(1)], &other_seed), own);
        let warm = SamplingParameters {
            temperature: 0.5,
            ..base.clone()
        };
        for other in [
            fingerprint("n", &[TokenId(1)], &base),
            fingerprint("m", &[TokenId(2)], &base),
            fingerprint("m", &[TokenId(1)], &warm),
        ] {
            assert_ne!(other, own);
        }
        let state = Resume {
            seed: 0,
            tokens: vec![TokenId(1); 4],
            request: own.clone(),
        };
        assert!(state.check(&own, 5).is_ok());
        assert!(state.check(&own, 4).is_err() && state.check("x", 5).is_err());
    }
}
