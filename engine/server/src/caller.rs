//! Who sends a request: the name it goes by, the key it shows, the tenant it counts for, the time it has.

use std::fmt;
use std::time::Duration;

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::request::Asked;
use crate::state::ServerOptions;

/// Names the tenant where there are no API keys.
const TENANT: &str = "x-cachalot-tenant";
/// Seconds that the request may take, waiting included.
const TIMEOUT: &str = "x-request-timeout";
/// Longest time that can be asked for.
const TIMEOUT_SECONDS_MAX: f64 = 86_400.0;
/// Longest name of a tenant.
const TENANT_BYTES_MAX: usize = 256;

/// API keys, as digests; empty lets everybody in.
#[derive(Clone, Default)]
pub struct ApiKeys {
    keys: Vec<(String, [u8; 32])>,
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.keys.iter().map(|(name, _)| name);
        formatter.debug_list().entries(names).finish()
    }
}

impl ApiKeys {
    /// Reads a file: one `NAME:KEY` or `KEY` on each line, `#` begins a comment. A name is a tenant and may have several
    /// keys; a key without a name is a tenant of its own.
    ///
    /// # Errors
    /// There is no key, or a line is wrong; the message never shows a key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut keys = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let number = index + 1;
            let (name, key) = match line.split_once(':') {
                Some((name, key)) => (name.trim().to_owned(), key.trim()),
                None => (format!("key-{number}"), line),
            };
            if name.is_empty() || key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(format!(
                    "line {number} must be NAME:KEY or KEY, the key printable ASCII without spaces"
                ));
            }
            keys.push((name, digest(key)));
        }
        match keys.is_empty() {
            true => Err("there is no key in it; leave the flag out if none is wanted".into()),
            false => Ok(Self { keys }),
        }
    }

    /// Whether everybody is let in.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The name of the key that a request shows; none when no key is needed.
    ///
    /// # Errors
    /// No key or an unknown one.
    pub fn check(&self, headers: &HeaderMap) -> Result<Option<String>, ApiError> {
        if self.keys.is_empty() {
            return Ok(None);
        }
        let shown = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "))
            .ok_or_else(|| {
                ApiError::unauthorized("no API key was sent; send Authorization: Bearer KEY")
            })?;
        let shown = digest(shown.trim());
        // Every key is compared, and each of them whole, so the time taken says nothing.
        let mut found = None;
        for (name, key) in &self.keys {
            let difference = key.iter().zip(&shown).fold(0, |all, (a, b)| all | (a ^ b));
            if std::hint::black_box(difference) == 0 {
                found = Some(name);
            }
        }
        found.cloned().map(Some).ok_or_else(|| {
            ApiError::unauthorized("the API key is not known here; ask whoever runs this engine")
        })
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// What is known of a request before its body is read.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Goes by this name in logs and in its answer.
    pub name: String,
    /// Name of its API key.
    pub key: Option<String>,
}

impl Caller {
    /// Fills in whose request this is and how long it may take.
    ///
    /// # Errors
    /// A header is wrong.
    pub fn mark(
        &self,
        asked: &mut Asked,
        headers: &HeaderMap,
        fields: &Fields,
        options: &ServerOptions,
    ) -> Result<(), ApiError> {
        asked.timeout = timeout(headers, options.request_timeout)?;
        let header = headers.get(TENANT).map(|value| value.to_str());
        asked.tenant = match (&self.key, header) {
            (Some(key), _) => {
                // Cached prefixes of one key are nobody else's business.
                asked.cache_salt = format!("{key}\n{}", asked.cache_salt);
                key.clone()
            }
            (None, Some(Ok(tenant))) if tenant.len() <= TENANT_BYTES_MAX => tenant.to_owned(),
            (None, Some(_)) => {
                let message =
                    format!("{TENANT} must be at most {TENANT_BYTES_MAX} printable characters");
                return Err(ApiError::invalid(TENANT, message));
            }
            (None, None) => {
                let user = fields.string("user")?.unwrap_or_default();
                user.chars().take(TENANT_BYTES_MAX).collect()
            }
        };
        Ok(())
    }
}

/// What the client asks for, but never more than the server allows.
fn timeout(headers: &HeaderMap, limit: Option<Duration>) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(TIMEOUT) else {
        return Ok(limit);
    };
    let seconds = value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse::<f64>().ok())
        .filter(|seconds| *seconds > 0.0 && *seconds <= TIMEOUT_SECONDS_MAX)
        .ok_or_else(|| {
            let message =
                format!("{TIMEOUT} must be seconds above 0 and at most {TIMEOUT_SECONDS_MAX}");
            ApiError::invalid(TIMEOUT, message)
        })?;
    let asked = Duration::from_secs_f64(seconds);
    Ok(Some(limit.map_or(asked, |limit| limit.min(asked))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn keys_are_read_named_and_compared() {
        let keys = ApiKeys::parse("# team keys\nred: abc\nred:def\n\nplain\n").unwrap();
        let name = |key: &str| keys.check(&headers("authorization", key));
        assert_eq!(name("Bearer abc").unwrap().as_deref(), Some("red"));
        assert_eq!(name("Bearer def").unwrap().as_deref(), Some("red"));
        assert_eq!(name("Bearer plain").unwrap().as_deref(), Some("key-5"));
        for wrong in ["Bearer abd", "Bearer ", "abc", "Basic abc", "Bearer abcdef"] {
            assert_eq!(name(wrong).unwrap_err().status.as_u16(), 401, "{wrong}");
        }
        assert_eq!(
            keys.check(&HeaderMap::new()).unwrap_err().code,
            Some("invalid_api_key")
        );
        assert!(!format!("{keys:?}").contains("abc"));
        assert_eq!(ApiKeys::default().check(&HeaderMap::new()).unwrap(), None);
        assert!(ApiKeys::parse("# none").is_err());
        let error = ApiKeys::parse("a:b c").unwrap_err();
        assert!(
            error.contains("line 1") && !error.contains("b c"),
            "{error}"
        );
    }

    #[test]
    fn the_shorter_time_counts() {
        let seconds = |header: &str, limit: Option<u64>| {
            timeout(&headers(TIMEOUT, header), limit.map(Duration::from_secs))
        };
        assert_eq!(
            seconds("2.5", None).unwrap(),
            Some(Duration::from_millis(2500))
        );
        assert_eq!(
            seconds("90", Some(60)).unwrap(),
            Some(Duration::from_secs(60))
        );
        assert_eq!(timeout(&HeaderMap::new(), None).unwrap(), None);
        for wrong in ["0", "-1", "NaN", "inf", "soon", "1e9"] {
            assert_eq!(
                seconds(wrong, None).unwrap_err().param.as_deref(),
                Some(TIMEOUT),
                "{wrong}"
            );
        }
    }
}
