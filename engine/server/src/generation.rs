//! One HTTP request on its way through the engine: submitted, followed token by token, ended.
//!
//! Invariant: dropping a [`Generation`] closes its channel, which is how the engine learns that the client is gone.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::TrySendError;
use std::time::{Duration, Instant};

use engine_core::{
    Constraint, Event, EventKind, FinishReason, Logprobs, Rejection, Request, RequestId, TokenId,
};
use engine_text::{Delta, OutputParser};
use tokio::sync::{mpsc, oneshot, watch};

use crate::error::ApiError;
use crate::request::Asked;
use crate::resume::{FIELD, Resume, fingerprint};
use crate::state::{Model, Shared};
use crate::worker::{Command, RESTART_SLACK};

/// A prompt in tokens and the parser of its answer.
#[derive(Debug)]
pub struct Prepared {
    pub tokens: Vec<TokenId>,
    pub parser: OutputParser,
    /// What the answer must be.
    pub constraint: Option<Constraint>,
}

/// News about one choice.
#[derive(Debug, Default)]
pub struct Update {
    pub choice: usize,
    /// All that came before of this choice is void.
    pub restarted: bool,
    pub delta: Delta,
    pub logprobs: Vec<(TokenId, Logprobs)>,
    /// OpenAI's word for how it ended.
    pub finish: Option<&'static str>,
}

/// Tokens of a request so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: usize,
    pub cached: usize,
    pub completion: usize,
    /// Of those, tokens of reasoning.
    pub reasoning: usize,
}

#[derive(Debug)]
struct Choice {
    parser: OutputParser,
    /// The parser before the first token that the engine generates.
    fresh: OutputParser,
    /// Of those tokens, tokens of reasoning.
    reasoning: usize,
    /// Prompt tokens that were cached, counted for the first choice of a prompt.
    cached: usize,
    done: bool,
    /// Output so far.
    tokens: Vec<TokenId>,
    logprobs: Vec<(TokenId, Logprobs)>,
}

/// Counts a response that is not finished.
#[derive(Debug)]
struct InFlight(Arc<Shared>);

impl InFlight {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.in_flight.fetch_add(1, Ordering::AcqRel);
        Self(shared.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A request that the engine has admitted.
#[derive(Debug)]
pub struct Generation {
    shared: Arc<Shared>,
    events: mpsc::Receiver<Event>,
    problem: watch::Receiver<Option<String>>,
    requests: Vec<RequestId>,
    per_request: usize,
    choices: Vec<Choice>,
    open: usize,
    usage: Usage,
    timeout: Option<Duration>,
    seed: u64,
    /// Of the only request; none when the answer could not be continued elsewhere.
    fingerprint: Option<String>,
    /// The engine had to end; said after all that came before.
    aborted: Option<ApiError>,
    /// What was sent cannot be taken back.
    is_streamed: bool,
    /// Output that the client has already, tokens.
    resumed: usize,
    /// Which weights the answer is of; none before it began.
    weights_version: Option<u64>,
    /// The last field: the response counts as unfinished until the channel is closed.
    _in_flight: InFlight,
}

impl Generation {
    /// Submits one engine request for each prompt. `prompt_field` is what the client calls its prompt.
    ///
    /// # Errors
    /// The engine takes none now, or not this one.
    pub async fn begin(
        shared: &Arc<Shared>,
        model: &Model,
        prompts: Vec<Prepared>,
        asked: &Asked,
        prompt_field: &str,
    ) -> Result<Self, ApiError> {
        let in_flight = InFlight::new(shared);
        let arrived = Instant::now();
        let per_request = asked.choices as usize;
        let mut plans = Vec::with_capacity(prompts.len());
        for prepared in prompts {
            let room = model
                .limits
                .max_model_len
                .saturating_sub(prepared.tokens.len())
                .max(1);
            plans.push((prepared, asked.max_tokens.unwrap_or(room)));
        }
        // Started, restarted, each token, finished; what the engine refuses as too long needs no room.
        let capacity: usize = plans
            .iter()
            .map(|(_, max_tokens)| (max_tokens.min(&model.limits.max_model_len) + 3) * per_request)
            .sum();
        let capacity = capacity + RESTART_SLACK;
        let is_single = plans.len() == 1 && per_request == 1;
        let (sender, events) = mpsc::channel(capacity);
        let mut generation = Self {
            shared: shared.clone(),
            events,
            problem: shared.problem.subscribe(),
            requests: Vec::new(),
            per_request,
            choices: Vec::new(),
            open: 0,
            usage: Usage::default(),
            timeout: asked.timeout,
            seed: asked.parameters.seed,
            fingerprint: None,
            aborted: None,
            is_streamed: asked.stream,
            resumed: 0,
            weights_version: None,
            _in_flight: in_flight,
        };
        for (prepared, max_tokens) in plans {
            let Prepared {
                tokens,
                mut parser,
                constraint,
            } = prepared;
            if is_single {
                let fingerprint =
                    fingerprint(&shared.options.model_name, &tokens, &asked.parameters);
                generation.fingerprint = Some(fingerprint);
            }
            let resumed = generation.resumed(asked, max_tokens)?;
            for token in &resumed {
                // The client has this text already.
                parser.push(token.0);
                generation.usage.reasoning += usize::from(parser.is_reasoning());
            }
            generation.usage.completion += resumed.len();
            generation.resumed = resumed.len();
            let mut request = generation.request(model, tokens, max_tokens, asked);
            request.constraint = constraint;
            request.resumed.clone_from(&resumed);
            generation.usage.prompt += request.prompt.len();
            generation.requests.push(request.id);
            generation
                .submit(request, arrived, &sender, prompt_field)
                .await?;
            for _ in 0..per_request {
                generation.choices.push(Choice {
                    parser: parser.clone(),
                    fresh: parser.clone(),
                    reasoning: 0,
                    cached: 0,
                    done: false,
                    tokens: resumed.clone(),
                    logprobs: Vec::new(),
                });
            }
        }
        generation.open = generation.choices.len();
        Ok(generation)
    }

    /// Output that a request brings along, once it is clear that it is its own.
    fn resumed(&self, asked: &Asked, max_tokens: usize) -> Result<Vec<TokenId>, ApiError> {
        let Some(resume) = &asked.resume else {
            return Ok(Vec::new());
        };
        let Some(fingerprint) = &self.fingerprint else {
            let message = format!("{FIELD} is given, but there are several prompts; send one");
            return Err(ApiError::invalid(FIELD, message));
        };
        resume.check(fingerprint, max_tokens)?;
        Ok(resume.tokens.clone())
    }

    /// The error of a request that the engine could not finish, with what it takes to go on elsewhere.
    fn abort(&self, index: usize) -> ApiError {
        let message = "this replica had to end before the answer did; send the request again";
        let mut error = ApiError::unavailable("aborted", message, 1);
        if let Some(request) = &self.fingerprint {
            let resume = Resume {
                seed: self.seed,
                tokens: self.choices[index].tokens.clone(),
                request: request.clone(),
            };
            error.message += &format!(", with {FIELD} to go on where it stopped");
            error.resume = Some(Box::new(resume.to_json()));
        }
        error
    }

    fn request(
        &self,
        model: &Model,
        prompt: Vec<TokenId>,
        max_tokens: usize,
        asked: &Asked,
    ) -> Request {
        let mut stop_tokens = asked.stop_tokens.clone();
        stop_tokens.extend(model.text.eos_tokens().iter().copied().map(TokenId));
        Request {
            id: RequestId(self.shared.next_id()),
            prompt,
            choices: asked.choices,
            max_tokens,
            parameters: asked.parameters.clone(),
            stop_tokens,
            cache_salt: asked.cache_salt.clone(),
            constraint: None,
            priority: asked.priority,
            tenant: asked.tenant.clone(),
            resumed: Vec::new(),
        }
    }

    async fn submit(
        &mut self,
        request: Request,
        arrived: Instant,
        events: &mpsc::Sender<Event>,
        prompt_field: &str,
    ) -> Result<(), ApiError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Submit {
            request: Box::new(request),
            deadline: self.timeout.map(|timeout| arrived + timeout),
            arrived,
            events: events.clone(),
            reply,
        };
        let retry = self.shared.retry_after_seconds.load(Ordering::Relaxed);
        self.shared
            .commands
            .try_send(command)
            .map_err(|error| match error {
                TrySendError::Full(_) => {
                    let limit = crate::worker::COMMANDS_MAX;
                    let full = Rejection::QueueFull {
                        waiting: limit,
                        limit,
                    };
                    ApiError::rejected(&full, prompt_field, retry)
                }
                TrySendError::Disconnected(_) => gone(None),
            })?;
        let answer = tokio::select! {
            answer = answer => answer.map_err(|_| gone(None))?,
            problem = problem(&mut self.problem) => return Err(gone(Some(problem))),
        };
        answer.map_err(|rejection| ApiError::rejected(&rejection, prompt_field, retry))
    }

    /// The next news; none after the last choice has ended. Safe to cancel.
    ///
    /// # Errors
    /// The backend failed, or the drain ran out of time.
    pub async fn next(&mut self) -> Option<Result<Update, ApiError>> {
        if let Some(error) = self.aborted.take() {
            return Some(Err(error));
        }
        while self.open > 0 {
            let event = tokio::select! {
                biased;
                event = self.events.recv() => event,
                problem = problem(&mut self.problem) => return Some(Err(gone(Some(problem)))),
            };
            let Some(event) = event else {
                let problem = self.problem.borrow().clone();
                return Some(Err(gone(problem)));
            };
            match self.take(event) {
                Ok(None) => {}
                Ok(Some(update)) => return Some(Ok(update)),
                Err(error) => return Some(Err(error)),
            }
        }
        None
    }

    /// The answer has a form that cannot go on elsewhere.
    pub fn forbid_resuming(&mut self) {
        self.fingerprint = None;
    }

    /// Tokens so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Names the engine and the weights of the answer; none before it began.
    pub fn fingerprint(&self) -> Option<String> {
        self.weights_version
            .map(|version| format!("cachalot-{}-w{version}", self.shared.options.version))
    }

    /// Choices of the request.
    pub fn choices(&self) -> usize {
        self.choices.len()
    }

    fn take(&mut self, event: Event) -> Result<Option<Update>, ApiError> {
        let Some(base) = self.requests.iter().position(|id| *id == event.request) else {
            return Ok(None);
        };
        let index = base * self.per_request + event.choice as usize;
        let choice = &mut self.choices[index];
        if choice.done {
            return Ok(None);
        }
        match event.kind {
            EventKind::Started {
                cached_tokens,
                weights_version,
            } => {
                self.weights_version = Some(weights_version);
                // The choices of a request share their prompt: count it once.
                if event.choice == 0 {
                    choice.cached = cached_tokens;
                    self.usage.cached += cached_tokens;
                }
                Ok(None)
            }
            EventKind::Restarted => self.restart(index).map(Some),
            EventKind::Token(sampled) => {
                self.usage.completion += 1;
                choice.tokens.push(sampled.token);
                if let Some(logprobs) = sampled.logprobs {
                    choice.logprobs.push((sampled.token, logprobs));
                }
                let delta = choice.parser.push(sampled.token.0);
                let reasoning = usize::from(choice.parser.is_reasoning());
                choice.reasoning += reasoning;
                self.usage.reasoning += reasoning;
                if delta.stopped {
                    choice.done = true;
                    self.open -= 1;
                    // Without room for the command the engine finds out when this request is dropped.
                    let _ = self.shared.commands.try_send(Command::Stop {
                        request: event.request,
                        choice: event.choice,
                    });
                    let finish = stop_reason(&choice.parser);
                    return Ok(Some(self.update(index, delta, Some(finish))));
                }
                if delta.is_empty() {
                    return Ok(None);
                }
                Ok(Some(self.update(index, delta, None)))
            }
            EventKind::Finished(reason) => {
                let delta = choice.parser.finish();
                let finish = match reason {
                    FinishReason::Stop => stop_reason(&choice.parser),
                    FinishReason::Length => "length",
                    FinishReason::Abort => {
                        let error = self.abort(index);
                        if self.choices[index].logprobs.is_empty() {
                            return Err(error);
                        }
                        // Those of text that is held back would be lost: nobody computes them again.
                        self.aborted = Some(error);
                        return Ok(Some(self.update(index, Delta::default(), None)));
                    }
                    FinishReason::Deadline => {
                        let seconds = self.timeout.unwrap_or_default().as_secs_f64();
                        return Err(ApiError::deadline_exceeded(seconds));
                    }
                    FinishReason::Replaced => return Err(ApiError::weights_replaced()),
                    FinishReason::Error => {
                        let message =
                            "the engine failed while it worked on this request; send it again";
                        return Err(ApiError::engine_failed(message));
                    }
                };
                choice.done = true;
                self.open -= 1;
                Ok(Some(self.update(index, delta, Some(finish))))
            }
        }
    }

    /// The weights were replaced: the choice begins again, unless the client has seen some of it.
    fn restart(&mut self, index: usize) -> Result<Update, ApiError> {
        let choice = &mut self.choices[index];
        let generated = choice.tokens.len() - self.resumed;
        if self.is_streamed && generated > 0 {
            return Err(ApiError::weights_replaced());
        }
        choice.tokens.truncate(self.resumed);
        choice.logprobs.clear();
        choice.parser = choice.fresh.clone();
        self.usage.completion -= generated;
        self.usage.reasoning -= std::mem::take(&mut choice.reasoning);
        self.usage.cached -= std::mem::take(&mut choice.cached);
        Ok(Update {
            choice: index,
            restarted: true,
            ..Update::default()
        })
    }

    fn update(&mut self, index: usize, delta: Delta, finish: Option<&'static str>) -> Update {
        Update {
            choice: index,
            restarted: false,
            delta,
            logprobs: std::mem::take(&mut self.choices[index].logprobs),
            finish,
        }
    }
}

/// OpenAI's word for an answer that ended by itself.
fn stop_reason(parser: &OutputParser) -> &'static str {
    match parser.has_calls() {
        true => "tool_calls",
        false => "stop",
    }
}

fn gone(problem: Option<String>) -> ApiError {
    let why = problem.unwrap_or_else(|| "the engine has ended".to_owned());
    ApiError::engine_failed(format!("{why}; send the request again"))
}

/// Waits until something is wrong with the engine's thread.
async fn problem(watch: &mut watch::Receiver<Option<String>>) -> String {
    let found = watch
        .wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|p| p.clone());
    match found {
        Some(problem) => problem,
        // The sender lives as long as the server.
        None => std::future::pending().await,
    }
}
