//! What HTTP tasks and the engine's thread share.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine_core::{Limits, Load};
use engine_spec::StartupPhase;
use engine_text::Text;
use tokio::sync::watch;

use crate::caller::ApiKeys;
use crate::error::ApiError;
use crate::health::Heartbeat;
use crate::metrics::Metrics;
use crate::startup::StartupHandle;
use crate::tls::Tls;
use crate::weights::Weights;
use crate::worker::Command;

/// What is told of a failure that the engine does not survive, on the thread that failed: it may add to the words.
#[derive(Clone)]
pub struct OnFailure(pub Arc<dyn Fn(String) -> String + Send + Sync>);

impl std::fmt::Debug for OnFailure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("OnFailure").finish()
    }
}

/// Limits and times of the server.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The name clients ask for.
    pub model_name: String,
    /// Version of the binary.
    pub version: String,
    /// How long running requests may take after a shutdown began.
    pub drain_timeout: Duration,
    /// Largest request body.
    pub body_bytes_max: usize,
    /// Most messages in a conversation.
    pub messages_max: usize,
    /// Most prompts in one completion request.
    pub prompts_max: usize,
    /// Time for a TLS handshake, and for the head of a request.
    pub header_timeout: Duration,
    /// Time for its body.
    pub body_timeout: Duration,
    /// Connections at once.
    pub connections_max: usize,
    /// How long a failed engine keeps answering probes before it ends, so that someone can read why.
    pub failure_linger: Duration,
    /// Who is told of a failure.
    pub on_failure: Option<OnFailure>,
    /// Shortest time without progress that counts as a hang.
    pub stall_timeout: Duration,
    /// Who is let in.
    pub api_keys: ApiKeys,
    /// Who may replace weights; nobody without.
    pub admin_keys: ApiKeys,
    /// Speak TLS only.
    pub tls: Option<Arc<Tls>>,
    /// Longest time that a request may take, waiting included.
    pub request_timeout: Option<Duration>,
    /// Tokens that waiting requests may cost together.
    pub max_queued_tokens: Option<usize>,
}

impl ServerOptions {
    /// Defaults for a model.
    pub fn new(model_name: impl Into<String>) -> Self {
        Self {
            model_name: model_name.into(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            drain_timeout: Duration::from_secs(60),
            body_bytes_max: 8 << 20,
            messages_max: 2048,
            prompts_max: 128,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            connections_max: 4096,
            failure_linger: Duration::from_secs(10),
            on_failure: None,
            // Noticed, looked at and answered within 5 s.
            stall_timeout: Duration::from_secs(4),
            api_keys: ApiKeys::default(),
            admin_keys: ApiKeys::default(),
            tls: None,
            request_timeout: None,
            max_queued_tokens: None,
        }
    }
}

/// Set once the canary answered.
#[derive(Debug)]
pub struct Model {
    pub text: Text,
    pub limits: Limits,
    pub created_unix_seconds: u64,
}

/// How far a shutdown is.
#[derive(Debug, Default)]
pub struct Shutdown {
    /// Nothing new is taken.
    pub draining: AtomicBool,
    /// What still runs is ended.
    pub aborting: AtomicBool,
}

/// Shared by everything in the server.
#[derive(Debug)]
pub struct Shared {
    pub options: ServerOptions,
    pub startup: StartupHandle,
    pub heartbeat: Heartbeat,
    pub metrics: Metrics,
    pub model: OnceLock<Arc<Model>>,
    pub weights: Weights,
    pub commands: SyncSender<Command>,
    pub shutdown: Shutdown,
    /// What is wrong with the engine's thread; tasks that wait for tokens watch it.
    pub problem: watch::Sender<Option<String>>,
    /// Responses that are not finished.
    pub in_flight: AtomicUsize,
    pub retry_after_seconds: AtomicU64,
    load: Mutex<Load>,
    entropy: RandomState,
    next_id: AtomicU64,
}

impl Shared {
    pub fn new(options: ServerOptions, commands: SyncSender<Command>) -> Self {
        Self {
            startup: StartupHandle::default(),
            heartbeat: Heartbeat::new(options.stall_timeout),
            metrics: Metrics::new(&options.model_name, &options.version),
            model: OnceLock::new(),
            weights: Weights::default(),
            commands,
            shutdown: Shutdown::default(),
            problem: watch::Sender::new(None),
            in_flight: AtomicUsize::new(0),
            retry_after_seconds: AtomicU64::new(1),
            load: Mutex::new(Load::default()),
            entropy: RandomState::new(),
            next_id: AtomicU64::new(1),
            options,
        }
    }

    /// Tells of a failure that the engine does not survive; returns what is said of it.
    pub fn failed(&self, failure: String) -> String {
        match &self.options.on_failure {
            Some(OnFailure(tell)) => tell(failure),
            None => failure,
        }
    }

    /// The model, or why requests are not taken now.
    pub fn serving(&self) -> Result<&Arc<Model>, ApiError> {
        if let Some(problem) = self.heartbeat.problem() {
            return Err(ApiError::unavailable(
                "engine_failed",
                problem + "; send it again",
                5,
            ));
        }
        if self.is_draining() {
            let message = "this replica is draining and takes no new requests; send it again";
            return Err(ApiError::unavailable("draining", message, 1));
        }
        self.model.get().ok_or_else(|| {
            let report = self.startup.report();
            let message = match report.phase {
                StartupPhase::Failed => format!(
                    "the model failed to load: {}",
                    report.message.unwrap_or_default()
                ),
                _ => format!(
                    "the model is not ready yet ({:.0} % loaded); send it again",
                    report.percent
                ),
            };
            let wait = report.eta_seconds.unwrap_or(2.0).clamp(1.0, 60.0);
            ApiError::unavailable("not_ready", message, wait as u64)
        })
    }

    /// The model, for a request that will be counted: a refusal while draining is one too.
    pub fn admitting(&self) -> Result<&Arc<Model>, ApiError> {
        let model = self.serving();
        if let (true, Err(_), Some(metrics)) = (self.is_draining(), &model, self.metrics.serving())
        {
            metrics.observe_rejection("draining");
        }
        model
    }

    pub fn is_draining(&self) -> bool {
        self.shutdown.draining.load(Ordering::Acquire)
    }

    pub fn load(&self) -> Load {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_load(&self, load: Load) {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = load;
    }

    /// A number that no other call in this process gives.
    pub fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// 64 bits that nobody can guess.
    pub fn random(&self) -> u64 {
        self.entropy.hash_one(self.next_id())
    }
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}
