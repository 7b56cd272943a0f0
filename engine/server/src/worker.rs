//! The engine's own thread: load, prove, then schedule → execute → complete until told to end.
//!
//! Invariants: the thread waits for nothing but commands; every channel to a client holds as many events as the
//! request can make, so a slow client never blocks it; a client that is gone is noticed before each step and its
//! blocks are free before that step is scheduled. A panic below ends the thread's work, not the process: all clients
//! are told, and health says so.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use engine_core::{
    Admission, Counters, Engine, Event, EventKind, ExecuteError, Executor, FinishReason, Limits,
    Rejection, Request, RequestId, StagedWeights, StepReport, run_canary,
};
use engine_spec::StartupPhase;
use tokio::sync::{mpsc, oneshot};

use crate::metrics::{SequenceEnd, ServingMetrics};
use crate::startup::{LoadFailure, Loaded, Loader, Roofline};
use crate::state::{Model, Shared, unix_seconds};
use crate::weights::{InFlightRule, Replacement};

/// How long an idle thread waits for a command before it looks at the shutdown flags and marks its progress.
const IDLE_TICK: Duration = Duration::from_millis(100);
/// Commands that may wait for the thread; more are refused like requests beyond the queue.
pub const COMMANDS_MAX: usize = 1024;

/// Events of a client that may be on their way when its sequences restart: its channel has room for these beyond all
/// that the request can make.
pub const RESTART_SLACK: usize = 256;
/// Tokens of a canary, for the watchdog.
const CANARY_TOKENS: usize = 64;

/// What HTTP tasks ask of the thread.
#[derive(Debug)]
pub enum Command {
    /// A new request; its events go to `events`, which must hold all of them.
    Submit {
        request: Box<Request>,
        arrived: Instant,
        /// When its time is over.
        deadline: Option<Instant>,
        events: mpsc::Sender<Event>,
        reply: oneshot::Sender<Result<(), Rejection>>,
    },
    /// A choice reached a stop string.
    Stop { request: RequestId, choice: u32 },
    /// Other weights are loaded.
    ReplaceWeights(Box<Replacement>),
}

struct Client {
    events: mpsc::Sender<Event>,
    arrived: Instant,
    deadline: Option<Instant>,
    prompt: usize,
    open: u32,
    longest: usize,
    choices: Vec<Choice>,
}

#[derive(Clone, Copy, Default)]
struct Choice {
    started: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
    generated: usize,
}

/// Why new weights do not serve.
enum Unused {
    /// The old ones do.
    Refused(String),
    /// Nor do the old ones.
    Lost(String),
}

struct Worker {
    shared: Arc<Shared>,
    engine: Engine,
    executor: Box<dyn Executor>,
    clients: HashMap<RequestId, Client>,
    events: Vec<Event>,
    counters: Counters,
    mean_seconds: f64,
    /// Of recent steps.
    tokens_per_second: f64,
    slots: usize,
    limits: Limits,
    /// Weights that wait for their moment, and since when no request may begin because of it.
    replacement: Option<(Box<Replacement>, Instant)>,
    roofline: Option<Roofline>,
    /// When the step began whose events are being delivered.
    began: Instant,
}

/// Runs on its own thread until the process ends, the senders are gone, or the backend dies.
pub fn run(shared: &Arc<Shared>, loader: Loader, commands: &Receiver<Command>) {
    let started = catch_unwind(AssertUnwindSafe(|| start(shared, loader)));
    let started = started.unwrap_or_else(|panic| {
        Err(LoadFailure {
            reason: "EngineFailed".to_owned(),
            message: format!("the model could not be loaded: {}", describe(&*panic)),
        })
    });
    let mut worker = match started {
        Ok(worker) => worker,
        Err(mut failure) => {
            failure.message = shared.failed(failure.message);
            tracing::error!(
                reason = failure.reason,
                message = failure.message,
                "the model cannot be served"
            );
            shared.startup.fail(failure);
            return;
        }
    };
    let ended = catch_unwind(AssertUnwindSafe(|| worker.serve(commands)));
    let failure = match ended {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(panic) => format!("the engine's thread panicked: {}", describe(&*panic)),
    };
    let failure = shared.failed(failure);
    tracing::error!(failure, "the engine cannot go on");
    worker.give_up(failure);
}

pub fn describe(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Loads the model and decodes the canary.
fn start(shared: &Arc<Shared>, loader: Loader) -> Result<Worker, LoadFailure> {
    let startup = &shared.startup;
    let Loaded {
        mut executor,
        text,
        limits,
        weights,
        roofline,
    } = loader(startup)?;
    startup.enter(StartupPhase::Warming, || (0, 0));
    let failure = |reason: &str, message: String| LoadFailure {
        reason: reason.to_owned(),
        message,
    };
    let mut engine =
        Engine::new(limits).map_err(|error| failure("ConfigurationInvalid", error.to_string()))?;
    engine.set_admission(Admission {
        max_queued_tokens: shared.options.max_queued_tokens,
    });
    let canary = run_canary(executor.as_mut(), &limits).map_err(|error| {
        failure(
            "CanaryFailed",
            format!("the first answer is wrong: {error}"),
        )
    })?;
    tracing::info!(
        deviation = canary.deviation,
        max_model_len = limits.max_model_len,
        max_num_seqs = limits.max_num_seqs,
        kv_blocks = limits.block_count,
        block_size = limits.block_size,
        "the canary answered"
    );
    let metrics = shared.metrics.begin_serving(&limits);
    metrics.canary_deviation.set(f64::from(canary.deviation));
    shared.set_load(engine.load());
    metrics.observe_load(&engine.load(), &Counters::default());
    shared.heartbeat.tick();
    startup.enter(StartupPhase::Ready, || (0, 0));
    for (phase, seconds, bytes) in startup.finished() {
        shared
            .metrics
            .set_startup(&format!("{phase:?}").to_lowercase(), seconds, bytes);
    }
    let model = Arc::new(Model {
        text,
        limits,
        created_unix_seconds: unix_seconds(),
    });
    shared
        .metrics
        .set_weights(1, weights.source.digest.as_deref().unwrap_or_default());
    shared.weights.begin(weights);
    // Set once, here: nobody else sets it.
    let _ = shared.model.set(model);
    Ok(Worker {
        shared: shared.clone(),
        engine,
        executor,
        clients: HashMap::new(),
        events: Vec::new(),
        counters: Counters::default(),
        mean_seconds: 0.0,
        tokens_per_second: 0.0,
        slots: limits.max_num_seqs,
        limits,
        replacement: None,
        roofline,
        began: Instant::now(),
    })
}

impl Worker {
    fn serve(&mut self, commands: &Receiver<Command>) -> Result<(), ExecuteError> {
        loop {
            self.shared.heartbeat.tick();
            if self.engine.is_idle() {
                match commands.recv_timeout(IDLE_TICK) {
                    Ok(command) => self.handle(command),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
                self.executor.idle()?;
            }
            while let Ok(command) = commands.try_recv() {
                self.handle(command);
            }
            self.obey_shutdown();
            self.drop_clients_that_left();
            self.expire_requests();
            self.replace_weights()?;
            if !self.engine.is_idle() {
                self.step()?;
            }
            self.deliver();
            self.publish_load();
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Stop { request, choice } => {
                self.engine.stop(request, choice, &mut self.events);
            }
            Command::ReplaceWeights(replacement) => {
                // One at a time, which whoever sends them sees to.
                self.engine.hold(true);
                self.replacement = Some((replacement, Instant::now()));
            }
            Command::Submit {
                request,
                arrived,
                deadline,
                events,
                reply,
            } => {
                let id = request.id;
                let (prompt, max_tokens, choices) =
                    (request.prompt.len(), request.max_tokens, request.choices);
                let result = self.engine.submit(*request);
                if let Some(metrics) = self.shared.metrics.serving() {
                    match &result {
                        Ok(()) => metrics.observe_admission(prompt, max_tokens, choices),
                        Err(Rejection::QueueFull { .. }) => metrics.observe_rejection("queue_full"),
                        Err(Rejection::TokensQueued { .. }) => {
                            metrics.observe_rejection("queued_tokens");
                        }
                        Err(Rejection::OverShare { .. }) => {
                            metrics.observe_rejection("tenant_share");
                        }
                        Err(Rejection::Draining) => metrics.observe_rejection("draining"),
                        Err(_) => metrics.observe_rejection("invalid"),
                    }
                }
                if result.is_ok() {
                    let client = Client {
                        events,
                        arrived,
                        deadline,
                        prompt,
                        open: choices,
                        longest: 0,
                        choices: vec![Choice::default(); choices as usize],
                    };
                    self.clients.insert(id, client);
                }
                // A client that does not wait for the reply is found by its closed channel.
                let _ = reply.send(result);
            }
        }
    }

    fn obey_shutdown(&mut self) {
        if self.shared.is_draining() {
            self.engine.drain();
        }
        if self.shared.shutdown.aborting.load(Ordering::Acquire) {
            self.engine
                .finish_all(FinishReason::Abort, &mut self.events);
        }
    }

    fn drop_clients_that_left(&mut self) {
        for (id, client) in &self.clients {
            if client.events.is_closed() {
                self.engine.cancel(*id, &mut self.events);
            }
        }
    }

    fn expire_requests(&mut self) {
        let now = Instant::now();
        for (id, client) in &self.clients {
            if client.deadline.is_some_and(|deadline| deadline <= now) {
                self.engine.expire(*id, &mut self.events);
                if let Some(metrics) = self.shared.metrics.serving() {
                    metrics.deadlines.inc();
                }
            }
        }
    }

    /// Exchanges the weights once nothing depends on the old ones; fails where neither version can serve.
    fn replace_weights(&mut self) -> Result<(), ExecuteError> {
        let Some((replacement, since)) = self.replacement.take() else {
            return Ok(());
        };
        match replacement.rule {
            InFlightRule::Finish if !self.engine.is_clear() => {
                self.replacement = Some((replacement, since));
                return Ok(());
            }
            InFlightRule::Finish => {}
            InFlightRule::Restart => {
                let clients = &self.clients;
                let has_room = |id: RequestId| {
                    clients.get(&id).is_none_or(|client| {
                        client.events.capacity() + RESTART_SLACK >= client.events.max_capacity()
                    })
                };
                self.engine.restart(has_room, &mut self.events);
            }
        }
        let Replacement {
            weights,
            digest,
            version,
            reply,
            ..
        } = *replacement;
        let result = self.exchange(weights, &digest, version);
        self.engine.hold(false);
        self.shared.metrics.observe_hold(since.elapsed());
        let (result, outcome) = match result {
            Ok(old) => (Ok(old), Ok(())),
            Err(Unused::Refused(why)) => (Err(why), Ok(())),
            Err(Unused::Lost(why)) => (Err(why.clone()), Err(ExecuteError::Fatal(why))),
        };
        // Without a receiver the weights are freed here.
        let _ = reply.send(result);
        outcome
    }

    /// Uses other weights if they answer the canary; gives those back that are not used any more.
    fn exchange(
        &mut self,
        weights: StagedWeights,
        digest: &str,
        version: u64,
    ) -> Result<StagedWeights, Unused> {
        let (name, before) = self.engine.scheduler().weights();
        let name = name.to_owned();
        let limits = self.limits;
        let executor = self.executor.as_mut();
        self.shared.heartbeat.begin_exchange();
        let old = executor
            .exchange_weights(weights)
            .map_err(|_| Unused::Refused("the backend cannot use these weights".to_owned()))?;
        // The canary writes over blocks: nothing that was cached may be found again, whatever it answers.
        self.engine.begin_weights(digest, version);
        self.shared.heartbeat.begin_step(CANARY_TOKENS);
        let canary = run_canary(executor, &limits);
        let Err(error) = canary else {
            self.shared.heartbeat.tick();
            return Ok(old);
        };
        self.shared.heartbeat.begin_exchange();
        let back = executor.exchange_weights(old);
        self.shared.heartbeat.tick();
        let why = format!("the first answer of the new weights is wrong: {error}");
        if back.is_err() {
            return Err(Unused::Lost(format!(
                "{why}; the old ones could not be put back"
            )));
        }
        self.engine.begin_weights(&name, before);
        Err(Unused::Refused(why))
    }

    fn step(&mut self) -> Result<(), ExecuteError> {
        self.engine.prepare(&mut self.events);
        let tokens = self.engine.prepared_tokens();
        self.shared.heartbeat.begin_step(tokens);
        self.began = Instant::now();
        let result = self.engine.run(self.executor.as_mut(), &mut self.events);
        let took = self.began.elapsed();
        self.shared.heartbeat.end_step(took);
        match result {
            Ok(report) => {
                if let Some(metrics) = self.shared.metrics.serving() {
                    metrics.observe_step(report.tokens, took);
                    self.measure_step(metrics, &report, took);
                }
                if report.tokens > 0 {
                    let rate = report.tokens as f64 / took.as_secs_f64().max(1e-6);
                    self.tokens_per_second = match self.tokens_per_second {
                        0.0 => rate,
                        mean => mean * 0.95 + rate * 0.05,
                    };
                }
                Ok(())
            }
            // The sequences of the batch have ended with an error; the others go on.
            Err(ExecuteError::InvalidBatch(problem)) => {
                tracing::error!(problem, "a step was refused");
                Ok(())
            }
            Err(fatal @ ExecuteError::Fatal(_)) => Err(fatal),
        }
    }

    /// How full the batch was and, where each of its sequences decoded one token, how close to the bound it came.
    fn measure_step(&self, metrics: &ServingMetrics, report: &StepReport, took: Duration) {
        if report.sequences == 0 {
            return;
        }
        metrics.observe_batch(report.sequences);
        if let Some(roofline) = self.roofline
            && report.tokens == report.sequences
        {
            metrics.observe_roofline(roofline.seconds(report.tokens), took);
        }
    }

    /// Hands events to clients and measures them.
    fn deliver(&mut self) {
        let now = Instant::now();
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            self.measure(&event, now);
            let request = event.request;
            let finished = matches!(event.kind, EventKind::Finished(_));
            let Some(client) = self.clients.get_mut(&request) else {
                continue;
            };
            // The channel has room for every event; it only fails when the client is gone.
            let _ = client.events.try_send(event);
            if finished {
                client.open -= 1;
                if client.open == 0 {
                    if let Some(metrics) = self.shared.metrics.serving() {
                        metrics.observe_longest_choice(client.longest);
                    }
                    self.clients.remove(&request);
                }
            }
        }
        self.events = events;
    }

    fn measure(&mut self, event: &Event, now: Instant) {
        let Some(metrics) = self.shared.metrics.serving() else {
            return;
        };
        let Some(client) = self.clients.get_mut(&event.request) else {
            return;
        };
        let choice = &mut client.choices[event.choice as usize];
        match &event.kind {
            EventKind::Restarted => *choice = Choice::default(),
            EventKind::Started { cached_tokens, .. } => {
                choice.started = Some(self.began);
                let queued = self.began.saturating_duration_since(client.arrived);
                metrics.observe_start(queued, client.prompt, *cached_tokens);
            }
            EventKind::Token(_) => {
                choice.generated += 1;
                match choice.last {
                    // Tokens of one step come together and count as one interval, as in vLLM.
                    Some(last) if last == now => {}
                    Some(last) => metrics.observe_token(now - last),
                    None => {
                        choice.first = Some(now);
                        let started = choice.started.unwrap_or(client.arrived);
                        metrics.observe_first_token(now - client.arrived, now - started);
                    }
                }
                choice.last = Some(now);
            }
            EventKind::Finished(reason) => {
                client.longest = client.longest.max(choice.generated);
                let since_arrival = now - client.arrived;
                metrics.observe_end(&SequenceEnd {
                    reason: *reason,
                    generated: choice.generated,
                    since_arrival,
                    since_start: choice.started.map(|started| now - started),
                    decoding: choice
                        .first
                        .zip(choice.last)
                        .map(|(first, last)| last - first),
                });
                self.mean_seconds = match self.mean_seconds {
                    0.0 => since_arrival.as_secs_f64(),
                    mean => mean * 0.9 + since_arrival.as_secs_f64() * 0.1,
                };
            }
        }
    }

    fn publish_load(&mut self) {
        let load = self.engine.load();
        if let Some(metrics) = self.shared.metrics.serving() {
            metrics.observe_load(&load, &self.counters);
        }
        self.counters = load.counters;
        self.shared.set_load(load);
        // When half of the queue should be gone: by the rate of tokens so far, and no longer than requests took so far.
        let rounds = load.waiting as f64 / self.slots as f64;
        let by_time = self.mean_seconds * rounds;
        let by_tokens = load.queued_tokens as f64 / 2.0 / self.tokens_per_second.max(1.0);
        let wait = match self.mean_seconds {
            0.0 => by_tokens,
            _ => by_tokens.min(by_time),
        };
        let wait = wait.clamp(1.0, 60.0);
        self.shared
            .retry_after_seconds
            .store(wait.ceil() as u64, Ordering::Relaxed);
    }

    /// Tells every client and every probe that this engine is done for.
    fn give_up(&mut self, failure: String) {
        self.shared.heartbeat.fail(failure.clone());
        if let Some(metrics) = self.shared.metrics.serving() {
            for client in self.clients.values() {
                for choice in
                    &client.choices[..client.open.min(client.choices.len() as u32) as usize]
                {
                    metrics.observe_end(&SequenceEnd {
                        reason: FinishReason::Error,
                        generated: choice.generated,
                        since_arrival: client.arrived.elapsed(),
                        since_start: choice.started.map(|started| started.elapsed()),
                        decoding: None,
                    });
                }
            }
        }
        // First why, then that: a client that finds its channel closed looks for the reason.
        self.shared.problem.send_replace(Some(failure));
        self.clients.clear();
        // The scheduler may be in any state after a panic: it is not used again.
        self.shared.set_load(engine_core::Load {
            draining: true,
            ..Default::default()
        });
    }
}
