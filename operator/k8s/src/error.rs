//! What can go wrong between us and the cluster, in categories that metrics and events share.
//!
//! A user's mistake is not an error here: that is a `Violation` in the status. An error is a call that did not do what
//! was asked; [`Category`] says whether asking again can help.

use std::fmt;
use std::time::Duration;

use operator_api::{EventReason, Reason};
use operator_core::status::Refusal;
use thiserror::Error;

/// The call that failed: verb, kind and name, as one would say it aloud.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// `create`, `apply`, `delete`, `get`, `list`, `watch`.
    pub verb: &'static str,
    /// The Kubernetes kind, or `Prometheus` or `engine`.
    pub kind: &'static str,
    /// `namespace/name`, or a URL.
    pub name: String,
}

impl Call {
    /// A call on an object of a namespace.
    pub fn on(verb: &'static str, kind: &'static str, namespace: &str, name: &str) -> Self {
        let name = if namespace.is_empty() {
            name.to_string()
        } else {
            format!("{namespace}/{name}")
        };
        Call { verb, kind, name }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {} {}", self.verb, self.kind, self.name)
    }
}

/// A call that failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The API server answered with an error, or could not be reached.
    #[error("{call}: {}", describe(source))]
    Api {
        /// What was asked.
        call: Call,
        /// What came back.
        #[source]
        source: Box<kube::Error>,
    },
    /// No answer in time.
    #[error("{call}: no answer within {} s", limit.as_secs_f32())]
    Timeout {
        /// What was asked.
        call: Call,
        /// How long was waited.
        limit: Duration,
    },
    /// Refused, after an attempt that got no answer and may have taken effect.
    #[error("{refused}, after an attempt that got no answer")]
    Repeated {
        /// How the last attempt ended.
        #[source]
        refused: Box<Error>,
    },
    /// An HTTP server that is not the API server answered badly.
    #[error("{call}: {message}")]
    Http {
        /// What was asked.
        call: Call,
        /// What came back.
        message: String,
    },
    /// The lease was lost while there was still something to write.
    #[error("{call}: not written, because this operator no longer holds the lease")]
    NotLeader {
        /// What was not asked.
        call: Call,
    },
}

/// Groups of errors; the label value of `cachalot_operator_reconcile_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Category {
    /// Somebody else wrote first (409), or owns a field.
    Conflict,
    /// A create met an object of that name.
    AlreadyExists,
    /// The object is gone (404), or its namespace is ending.
    NotFound,
    /// A right is missing (401, 403).
    Forbidden,
    /// The API server refused what was sent (400, 422).
    Invalid,
    /// Asked to slow down (429).
    Throttled,
    /// The API server failed (5xx).
    Server,
    /// The list or watch is too old (410).
    Gone,
    /// No answer in time.
    Timeout,
    /// No connection.
    Transport,
    /// An answer that is not understood.
    Malformed,
    /// The lease was lost.
    NotLeader,
}

impl Category {
    /// Every category, so that each metric series exists from the start.
    pub const ALL: [Category; 12] = [
        Category::Conflict,
        Category::AlreadyExists,
        Category::NotFound,
        Category::Forbidden,
        Category::Invalid,
        Category::Throttled,
        Category::Server,
        Category::Gone,
        Category::Timeout,
        Category::Transport,
        Category::Malformed,
        Category::NotLeader,
    ];

    /// The metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Category::Conflict => "conflict",
            Category::AlreadyExists => "already_exists",
            Category::NotFound => "not_found",
            Category::Forbidden => "forbidden",
            Category::Invalid => "invalid",
            Category::Throttled => "throttled",
            Category::Server => "server",
            Category::Gone => "gone",
            Category::Timeout => "timeout",
            Category::Transport => "transport",
            Category::Malformed => "malformed",
            Category::NotLeader => "not_leader",
        }
    }

    /// The reason of the Warning event on the object concerned.
    pub fn reason(self) -> &'static str {
        match self {
            Category::Conflict => EventReason::WriteConflict.as_str(),
            Category::AlreadyExists => Reason::NameTaken.as_str(),
            Category::NotFound => EventReason::ObjectGone.as_str(),
            Category::Forbidden => Reason::CallRefused.as_str(),
            Category::Invalid => Reason::ObjectRefused.as_str(),
            Category::Throttled
            | Category::Server
            | Category::Timeout
            | Category::Transport
            | Category::Gone => EventReason::ApiServerTrouble.as_str(),
            Category::Malformed => EventReason::AnswerNotUnderstood.as_str(),
            Category::NotLeader => EventReason::LeaseLost.as_str(),
        }
    }

    /// Whether the same call may succeed a moment later.
    pub fn is_transient(self) -> bool {
        matches!(
            self,
            Category::Throttled | Category::Server | Category::Timeout | Category::Transport
        )
    }
}

impl Error {
    /// The group this error belongs to.
    pub fn category(&self) -> Category {
        match self {
            Error::Api { source, .. } => categorise(source),
            Error::Timeout { .. } => Category::Timeout,
            Error::Repeated { refused } => refused.category(),
            Error::Http { .. } => Category::Malformed,
            Error::NotLeader { .. } => Category::NotLeader,
        }
    }

    /// Whether it leaves open if a write took effect.
    pub fn is_open(&self) -> bool {
        matches!(self, Error::Repeated { .. })
            || matches!(
                self.category(),
                Category::Timeout | Category::Transport | Category::Server | Category::Malformed
            )
    }

    /// The refusal that a status tells of: what no repetition helps against, with the way out.
    pub fn refusal(&self) -> Option<Refusal> {
        let reason = match self.category() {
            Category::Forbidden => Reason::CallRefused,
            Category::Invalid => Reason::ObjectRefused,
            _ => return None,
        };
        let message = format!("{self}. {}", self.way_out());
        Some(Refusal { reason, message })
    }

    fn way_out(&self) -> String {
        let text = self.to_string();
        if let Some((verb, resource, group)) = missing_right(&text) {
            return format!(
                "Grant the operator the verb {verb} on {resource} (apiGroup \"{group}\") in its ClusterRole or Role: the chart does so with rbac.create=true, and its templates/rbac.yaml lists every right"
            );
        }
        match self.status_code() {
            Some(401) => "The API server does not know the operator: see its ServiceAccount and token".into(),
            Some(403) => "No right is missing: a quota, an admission rule, the pod security of the namespace or its deletion is in the way, and the answer says which".into(),
            _ => "An admission rule of the cluster is in the way, or this is a bug of the operator: then please report it with this message".into(),
        }
    }

    fn status_code(&self) -> Option<u16> {
        match self {
            Error::Repeated { refused } => refused.status_code(),
            Error::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            _ => None,
        }
    }

    /// How long the API server asked us to wait.
    pub fn retry_after(&self) -> Option<Duration> {
        let Error::Api { source, .. } = self else {
            return None;
        };
        let kube::Error::Api(status) = source.as_ref() else {
            return None;
        };
        let seconds = status.details.as_ref()?.retry_after_seconds;
        (seconds > 0).then(|| Duration::from_secs(u64::from(seconds)))
    }
}

/// The category of an error of the client.
pub fn categorise(error: &kube::Error) -> Category {
    match error {
        kube::Error::Api(status) if status.is_already_exists() => Category::AlreadyExists,
        kube::Error::Api(status) => match status.code {
            409 => Category::Conflict,
            404 => Category::NotFound,
            401 | 403 => Category::Forbidden,
            410 => Category::Gone,
            429 => Category::Throttled,
            408 | 504 => Category::Timeout,
            500..=599 => Category::Server,
            400..=499 => Category::Invalid,
            _ => Category::Malformed,
        },
        kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) => Category::Malformed,
        _ => Category::Transport,
    }
}

/// Verb, resource and API group of the right that is missing, from the words of the API server's RBAC authoriser:
/// `User "u" cannot patch resource "services" in API group "" in the namespace "d"`.
fn missing_right(text: &str) -> Option<(&str, &str, &str)> {
    let (_, rest) = text.split_once(" cannot ")?;
    let (verb, rest) = rest.split_once(" resource \"")?;
    let (resource, rest) = rest.split_once('"')?;
    let (group, _) = rest.split_once("in API group \"")?.1.split_once('"')?;
    Some((verb, resource, group))
}

/// The error as one line; kube's own text repeats the whole status.
fn describe(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => {
            format!("{} ({} {})", status.message, status.code, status.reason)
        }
        other => {
            let mut text = other.to_string();
            let mut source = std::error::Error::source(other);
            while let Some(inner) = source {
                let inner_text = inner.to_string();
                if !text.contains(&inner_text) {
                    text = format!("{text}: {inner_text}");
                }
                source = inner.source();
            }
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    fn refused(code: u16, reason: &str) -> Error {
        let status = Status::failure("because", reason).with_code(code);
        Error::Api {
            call: Call::on("apply", "Service", "default", "m"),
            source: Box::new(kube::Error::Api(status.boxed())),
        }
    }

    #[test]
    fn every_answer_of_the_api_server_has_a_category() {
        let table = [
            (409, "Conflict", Category::Conflict, false),
            (409, "AlreadyExists", Category::AlreadyExists, false),
            (404, "NotFound", Category::NotFound, false),
            (403, "Forbidden", Category::Forbidden, false),
            (401, "Unauthorized", Category::Forbidden, false),
            (422, "Invalid", Category::Invalid, false),
            (429, "TooManyRequests", Category::Throttled, true),
            (500, "InternalError", Category::Server, true),
            (503, "ServiceUnavailable", Category::Server, true),
            (504, "Timeout", Category::Timeout, true),
            (410, "Expired", Category::Gone, false),
        ];
        for (code, reason, category, transient) in table {
            let error = refused(code, reason);
            assert_eq!(error.category(), category, "{code} {reason}");
            assert_eq!(
                error.category().is_transient(),
                transient,
                "{code} {reason}"
            );
        }
    }

    #[test]
    fn the_text_names_the_call_and_the_answer_once() {
        assert_eq!(
            refused(422, "Invalid").to_string(),
            "apply Service default/m: because (422 Invalid)"
        );
    }

    #[test]
    fn a_refusal_says_what_to_grant_or_what_else_is_in_the_way() {
        let refused = |code: u16, message: &str| {
            let status = Status::failure(message, "Forbidden").with_code(code);
            let error = Error::Api {
                call: Call::on("create", "PodDisruptionBudget", "d", "m"),
                source: Box::new(kube::Error::Api(status.boxed())),
            };
            error.refusal()
        };
        let right = "poddisruptionbudgets.policy is forbidden: User \"system:serviceaccount:s:cachalot\" cannot create \
            resource \"poddisruptionbudgets\" in API group \"policy\" in the namespace \"d\"";
        let quota = "pods \"m-0\" is forbidden: exceeded quota: q, requested: pods=1, used: pods=1, limited: pods=1";
        for (code, message, reason, words) in [
            (
                403,
                right,
                Reason::CallRefused,
                "the verb create on poddisruptionbudgets (apiGroup \"policy\")",
            ),
            (
                403,
                quota,
                Reason::CallRefused,
                "exceeded quota: q, requested: pods=1, used: pods=1, limited: pods=1 (403 Forbidden). No right is missing",
            ),
            (401, "Unauthorized", Reason::CallRefused, "ServiceAccount"),
            (
                422,
                "spec: Invalid value",
                Reason::ObjectRefused,
                "An admission rule",
            ),
        ] {
            let refusal = refused(code, message).expect("a refusal");
            assert_eq!(refusal.reason, reason, "{message}");
            assert!(refusal.message.contains(words), "{}", refusal.message);
            assert!(
                refusal
                    .message
                    .starts_with("create PodDisruptionBudget d/m: ")
            );
        }
        for code in [404, 409, 410, 429, 500, 504] {
            assert_eq!(refused(code, "because"), None, "{code}: it may pass");
        }
    }

    #[test]
    fn every_event_about_a_failure_has_a_reason_of_a_closed_set() {
        for category in Category::ALL {
            let word = category.reason();
            let is_known = Reason::parse(word).is_some() || EventReason::parse(word).is_some();
            assert!(is_known, "{word}");
            // That word says that the hub refused the credentials.
            assert_ne!(word, Reason::AccessDenied.as_str());
        }
    }

    #[test]
    fn labels_are_distinct() {
        let labels: std::collections::BTreeSet<_> = Category::ALL
            .iter()
            .map(|category| category.as_str())
            .collect();
        assert_eq!(labels.len(), Category::ALL.len());
    }

    fn failed(source: kube::Error) -> Error {
        Error::Api {
            call: Call::on("get", "Pod", "default", "p"),
            source: Box::new(source),
        }
    }

    #[test]
    fn no_connection_is_worth_another_call_and_an_answer_that_is_not_understood_is_not() {
        let cause: Box<dyn std::error::Error + Send + Sync> = "connection refused".into();
        let error = failed(kube::Error::Service(cause));
        assert_eq!(error.category(), Category::Transport);
        assert!(error.category().is_transient() && error.is_open());
        assert!(error.to_string().contains("connection refused"), "{error}");
        let odd = serde_json::from_str::<u32>("odd").expect_err("no number");
        let error = failed(kube::Error::SerdeError(odd));
        assert_eq!(error.category(), Category::Malformed);
        assert!(!error.category().is_transient() && error.is_open());
    }

    #[test]
    fn how_long_to_wait_is_taken_from_the_answer() {
        let asked = |seconds: u32| {
            let status = serde_json::json!({"status": "Failure", "code": 429, "message": "", "reason": "",
                "details": {"retryAfterSeconds": seconds}});
            let status: Status = serde_json::from_value(status).expect("a status");
            failed(kube::Error::Api(status.boxed())).retry_after()
        };
        assert_eq!(asked(7), Some(Duration::from_secs(7)));
        assert_eq!(asked(0), None);
    }
}
