//! What an answer must be, compiled to a mask over the vocabulary by llguidance.
//!
//! Invariant: compiling is bounded by bytes, depth and llguidance's own fuel, never by a clock, and the mask of a step
//! is a pure function of the output so far. Surprise: a model that reasons first is left alone until its `</think>`;
//! a token that would close the reasoning and carry on in the same breath is not allowed, since the grammar must begin
//! at a token's border. The grammar of calls that an answer may make, but need not, waits in the same way for the
//! opening of each call: see [`crate::call_watch`].

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use thiserror::Error;

use crate::bytes::TokenBytes;
use crate::call_watch::{CallWatch, Opening, Place};
use crate::reasoning::{REASONING_END, REASONING_START};
use crate::stop::overlap;
use crate::tool_format::ToolFormat;

/// Bytes of a regular expression, a grammar or all choices.
pub const GRAMMAR_BYTES_MAX: usize = 64 << 10;
/// Characters of an error of llguidance that are passed on.
const ERROR_CHARACTERS_MAX: usize = 400;
/// White space that JSON may have in one place; without a limit a confused model writes nothing else.
const JSON_BLANKS: &str = r"[\x20\x0A\x0D\x09]{1,16}";
/// Regex nodes built while compiling; about 50 thousand a millisecond.
const COMPILE_FUEL: u64 = 2_000_000;
/// Regex nodes and parser items built for the mask of one step.
const STEP_FUEL: u64 = 200_000;
const STEP_ITEMS: usize = 50_000;
/// States of the lexer, up to 2 kB each.
const LEXER_STATES: usize = 50_000;
/// Symbols in productions.
const GRAMMAR_SYMBOLS: usize = 200_000;

/// What the content of an answer must be.
#[derive(Clone, Debug, PartialEq)]
pub enum ContentRule {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under this schema. Without `strict`, what llguidance cannot enforce is left out.
    JsonSchema {
        /// The schema.
        schema: Value,
        /// Refuse what cannot be enforced.
        strict: bool,
    },
    /// Text that this regular expression matches whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text of this grammar, in llguidance's form of Lark.
    Lark(String),
}

/// A function that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct CallableFunction {
    /// Its name.
    pub name: String,
    /// Schema of its arguments.
    pub schema: Value,
    /// Refuse what cannot be enforced.
    pub strict: bool,
}

/// Calls that an answer must consist of.
#[derive(Clone, Debug, PartialEq)]
pub struct CallRule {
    /// Which ones.
    pub functions: Vec<CallableFunction>,
    /// More than one may be called.
    pub many: bool,
}

/// What an answer must be: content, calls, or either; or anything in which calls are what they must be.
#[derive(Clone, Debug, PartialEq)]
pub enum AnswerRule {
    /// The whole answer is one of these.
    Whole {
        /// The content.
        content: Option<ContentRule>,
        /// The calls.
        calls: Option<CallRule>,
    },
    /// Free, but each call that the model begins is one of these.
    FreeWithCalls(CallRule),
}

/// Why an answer cannot be restricted, or not any more.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GrammarError {
    /// The rule is wrong or too large.
    #[error("{0}")]
    Invalid(String),
    /// The rule needs what the model does not have.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The output left the grammar or a limit was reached while it was made.
    #[error("the grammar cannot go on: {0}")]
    Broken(String),
}

/// Where an answer stands in its reasoning when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thought {
    /// The model does not reason, or the prompt says that it is done.
    None,
    /// The model may open its reasoning first.
    Possible,
    /// The prompt ends inside it.
    Open,
}

/// What a mask says about the next token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Everything, except tokens whose logit is negative infinity now.
    Some,
    /// Nothing: the answer is complete.
    Nothing,
}

/// Compiles rules for one vocabulary; built when it is first needed.
pub(crate) struct Grammars {
    bytes: Arc<TokenBytes>,
    eos_tokens: Vec<u32>,
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    pub(crate) fn new(bytes: Arc<TokenBytes>, eos_tokens: Vec<u32>) -> Self {
        Self {
            bytes,
            eos_tokens,
            factory: OnceLock::new(),
        }
    }

    fn factory(&self) -> Result<&ParserFactory, GrammarError> {
        let built = self.factory.get_or_init(|| self.build());
        built.as_ref().map_err(Clone::clone)
    }

    fn build(&self) -> Result<ParserFactory, GrammarError> {
        let count = self.bytes.len();
        let eos: Vec<u32> = self
            .eos_tokens
            .iter()
            .copied()
            .filter(|token| (*token as usize) < count)
            .collect();
        let Some(first) = eos.first() else {
            return Err(GrammarError::Unsupported(
                "this model has no token that ends an answer, so its answers cannot be restricted",
            ));
        };
        let words: Vec<Vec<u8>> = (0..count as u32)
            .map(|token| match self.bytes.get(token) {
                // Tokens without bytes are special: the trie keeps them apart from all text.
                [] => format!("\u{0}<special_{token}>").into_bytes(),
                bytes => bytes.to_vec(),
            })
            .map(|mut word| {
                if word[0] == 0 && word.len() > 1 {
                    word[0] = TokTrie::SPECIAL_TOKEN_MARKER;
                }
                word
            })
            .collect();
        let trie = TokTrie::from(&TokRxInfo::new(count as u32, *first), &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie.with_eos_tokens(&eos)));
        let mut factory = ParserFactory::new_simple(&env).map_err(broken)?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.initial_lexer_fuel = COMPILE_FUEL;
        limits.step_lexer_fuel = STEP_FUEL;
        limits.step_max_items = STEP_ITEMS;
        limits.max_lexer_states = LEXER_STATES;
        limits.max_grammar_size = GRAMMAR_SYMBOLS;
        limits.precompute_large_lexemes = false;
        limits.verbose_errors = false;
        Ok(factory)
    }

    /// Compiles a rule for answers in this format of calls.
    pub(crate) fn compile(
        &self,
        rule: &AnswerRule,
        format: Option<ToolFormat>,
        thought: Thought,
    ) -> Result<Grammar, GrammarError> {
        let (grammar, watch) = match rule {
            AnswerRule::Whole { content, calls } => (
                write(content.as_ref(), calls.as_ref(), format, thought)?,
                None,
            ),
            AnswerRule::FreeWithCalls(calls) => {
                let format = format.ok_or(UNKNOWN_FORMAT)?;
                let watch = CallWatch::new(format, &self.bytes);
                (write_one_call(calls, format), Some(watch))
            }
        };
        let parser = self.factory()?.create_parser(grammar);
        let matcher = Matcher::new(parser);
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError::Invalid(first_line(&error)));
        }
        Ok(Grammar {
            matcher: Mutex::new(matcher),
            bytes: self.bytes.clone(),
            thought,
            watch,
        })
    }
}

const UNKNOWN_FORMAT: GrammarError =
    GrammarError::Unsupported("how this model writes calls is not known");

/// One line is enough for a client, and the rest shows how the grammar was put together; a line may repeat the whole
/// expression.
fn first_line(error: &str) -> String {
    let line = error.lines().next().unwrap_or_default();
    match line.char_indices().nth(ERROR_CHARACTERS_MAX) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

fn broken(error: impl fmt::Display) -> GrammarError {
    GrammarError::Broken(first_line(&error.to_string()))
}

/// A rule as llguidance's grammars: the first one is the answer, the second one its content.
fn write(
    content: Option<&ContentRule>,
    calls: Option<&CallRule>,
    format: Option<ToolFormat>,
    thought: Thought,
) -> Result<TopLevelGrammar, GrammarError> {
    let mut alternatives = Vec::new();
    let mut rules = String::new();
    let mut grammars = Vec::new();
    if let Some(calls) = calls {
        let format = format.ok_or(UNKNOWN_FORMAT)?;
        alternatives.push("calls");
        write_calls(calls, format, &mut rules);
    }
    if let Some(content) = content {
        alternatives.push("@content");
        grammars.push(GrammarWithLexer {
            name: Some("content".to_owned()),
            ..content_grammar(content)?
        });
    }
    // R1 was trained to leave an empty line after its reasoning.
    let lead = match thought {
        Thought::None => "",
        Thought::Possible | Thought::Open => "LEAD? ",
    };
    let answer = format!(
        "start: {lead}answer\nanswer: {}\nLEAD: /\\n{{1,2}}/\n{rules}",
        alternatives.join(" | ")
    );
    grammars.insert(0, GrammarWithLexer::from_lark(answer));
    Ok(TopLevelGrammar {
        grammars,
        max_tokens: None,
    })
}

fn content_grammar(content: &ContentRule) -> Result<GrammarWithLexer, GrammarError> {
    let limit = |what: &str, bytes: usize| {
        if (1..=GRAMMAR_BYTES_MAX).contains(&bytes) {
            return Ok(());
        }
        Err(GrammarError::Invalid(format!(
            "{what} of {bytes} bytes; 1 to {GRAMMAR_BYTES_MAX} are taken"
        )))
    };
    Ok(match content {
        ContentRule::JsonObject => {
            GrammarWithLexer::from_json_schema(bounded(&json!({"type": "object"}), true))
        }
        ContentRule::JsonSchema { schema, strict } => {
            limit("a schema", schema.to_string().len())?;
            GrammarWithLexer::from_json_schema(bounded(schema, *strict))
        }
        ContentRule::Regex(regex) => {
            limit("a regular expression", regex.len())?;
            GrammarWithLexer::from_regex(regex)
        }
        ContentRule::Choice(choices) => {
            limit("choices", choices.iter().map(String::len).sum())?;
            let quoted: Vec<String> = choices.iter().map(|choice| quote(choice)).collect();
            GrammarWithLexer::from_lark(format!("start: {}", quoted.join(" | ")))
        }
        ContentRule::Lark(grammar) => {
            limit("a grammar", grammar.len())?;
            GrammarWithLexer::from_lark(grammar.clone())
        }
    })
}

/// The schema with our options for llguidance in place of any of the client's.
fn bounded(schema: &Value, strict: bool) -> Value {
    let mut schema = schema.clone();
    if let Some(object) = schema.as_object_mut() {
        let options = json!({"whitespace_pattern": JSON_BLANKS, "lenient": !strict});
        object.insert("x-guidance".to_owned(), options);
    }
    schema
}

fn quote(text: &str) -> String {
    Value::from(text).to_string()
}

/// A literal of a grammar's rule, or nothing.
fn literal(text: &str) -> String {
    match text {
        "" => String::new(),
        text => format!("{} ", quote(text)),
    }
}

fn write_calls(calls: &CallRule, format: ToolFormat, rules: &mut String) {
    let (before, between, after) = format.section();
    let more = match calls.many {
        true => format!("({}call)* ", literal(between)),
        false => String::new(),
    };
    rules.push_str(&format!(
        "calls: {}call {more}{}\n",
        literal(before),
        literal(after)
    ));
    write_call(calls, |name| format.frame(name), rules);
}

/// The rest of one call, from where [`CallWatch`] sees it begin.
fn write_one_call(calls: &CallRule, format: ToolFormat) -> TopLevelGrammar {
    let mut rules = match format.is_bare() {
        true => format!("start: BLANKS? call\nBLANKS: /{JSON_BLANKS}/\n"),
        false => "start: call\n".to_owned(),
    };
    write_call(calls, |name| format.opened_frame(name), &mut rules);
    TopLevelGrammar {
        grammars: vec![GrammarWithLexer::from_lark(rules)],
        max_tokens: None,
    }
}

/// The rule `call`, one of the functions.
fn write_call(calls: &CallRule, frame: impl Fn(&str) -> (String, String), rules: &mut String) {
    let names: Vec<String> = (0..calls.functions.len())
        .map(|index| format!("call_{index}"))
        .collect();
    rules.push_str(&format!("call: {}", names.join(" | ")));
    for (index, function) in calls.functions.iter().enumerate() {
        let (head, tail) = frame(&function.name);
        rules.push_str(&format!(
            "\ncall_{index}: {}%json {} {}",
            literal(&head),
            bounded(&function.schema, function.strict),
            literal(&tail)
        ));
    }
    rules.push('\n');
}

/// A compiled rule; shared by the choices of a request.
pub struct Grammar {
    /// Behind a lock only because llguidance's type is not shareable; cloned once for each choice.
    matcher: Mutex<Matcher>,
    bytes: Arc<TokenBytes>,
    thought: Thought,
    /// Where the grammar waits for each call.
    watch: Option<CallWatch>,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Grammar")
            .field("thought", &self.thought)
            .finish_non_exhaustive()
    }
}

impl Grammar {
    /// The state before the first token of an answer.
    pub fn start(&self) -> GrammarState {
        let matcher = self.matcher.lock().unwrap_or_else(PoisonError::into_inner);
        GrammarState {
            calls: self.watch.clone().map(|watch| Calls {
                watch,
                fresh: matcher.deep_clone(),
            }),
            matcher: matcher.deep_clone(),
            bytes: self.bytes.clone(),
            phase: match self.thought {
                Thought::None => Phase::Answer,
                Thought::Possible => Phase::Undecided,
                Thought::Open => Phase::Reasoning,
            },
            seen: 0,
            tail: Vec::new(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No token so far: `<think>` may open the reasoning, or the answer begins.
    Undecided,
    Reasoning,
    Answer,
}

/// What it takes to follow the calls of a free answer.
struct Calls {
    watch: CallWatch,
    /// The grammar before the first token of a call.
    fresh: Matcher,
}

/// How far one answer is in its grammar.
pub struct GrammarState {
    matcher: Matcher,
    calls: Option<Calls>,
    bytes: Arc<TokenBytes>,
    phase: Phase,
    seen: usize,
    /// The last bytes of the reasoning, in which its end may have begun.
    tail: Vec<u8>,
}

impl fmt::Debug for GrammarState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("GrammarState")
            .field("phase", &self.phase)
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}

impl GrammarState {
    /// Tokens of output taken so far.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Sets the logits of tokens that may not follow what was taken to negative infinity.
    ///
    /// # Errors
    /// A limit was reached.
    pub fn restrict(&mut self, row: &mut [f32]) -> Result<Allowed, GrammarError> {
        match self.phase {
            Phase::Reasoning => {
                self.forbid_running_on(row);
                Ok(Allowed::Some)
            }
            Phase::Answer | Phase::Undecided if self.calls.is_some() => self.restrict_free(row),
            Phase::Answer if self.matcher.is_stopped() => match self.matcher.get_error() {
                Some(error) => Err(broken(error)),
                None => Ok(Allowed::Nothing),
            },
            Phase::Answer => {
                self.mask(row, None)?;
                Ok(Allowed::Some)
            }
            Phase::Undecided => {
                let opening = (0..self.bytes.len() as u32)
                    .find(|token| self.bytes.get(*token) == REASONING_START.as_bytes());
                self.mask(row, opening)?;
                Ok(Allowed::Some)
            }
        }
    }

    /// Takes the next token of output.
    ///
    /// # Errors
    /// The output left the grammar.
    pub fn take(&mut self, token: u32) -> Result<(), GrammarError> {
        self.seen += 1;
        let bytes = self.bytes.get(token);
        if self.phase == Phase::Undecided {
            self.phase = match bytes == REASONING_START.as_bytes() {
                true => Phase::Reasoning,
                false => Phase::Answer,
            };
            if self.phase == Phase::Reasoning {
                return Ok(());
            }
        }
        if self.phase == Phase::Answer {
            return match self.calls.is_some() {
                true => self.take_free(token),
                false => self.matcher.consume_token(token).map_err(broken),
            };
        }
        self.tail.extend_from_slice(bytes);
        if self.tail.ends_with(REASONING_END.as_bytes()) {
            self.phase = Phase::Answer;
            self.tail.clear();
        }
        let keep = self.tail.len().saturating_sub(REASONING_END.len());
        self.tail.drain(..keep);
        Ok(())
    }

    /// Restricts the calls of a free answer and nothing else.
    fn restrict_free(&mut self, row: &mut [f32]) -> Result<Allowed, GrammarError> {
        let Some(Calls { watch, .. }) = &self.calls else {
            return Ok(Allowed::Some);
        };
        match watch.place {
            Place::Call => self.mask(row, None)?,
            Place::Text => watch.forbid_running_on(&self.bytes, row),
            Place::Start | Place::Between => {
                watch.forbid_running_on(&self.bytes, row);
                let mask = self.matcher.compute_mask().map_err(broken)?;
                for (index, logit) in row.iter_mut().enumerate() {
                    let is_forbidden = match watch.opening(self.bytes.get(index as u32)) {
                        Opening::Blank | Opening::Text => false,
                        Opening::Call => index >= mask.len() || !mask.is_allowed(index as u32),
                        Opening::Never => true,
                    };
                    if is_forbidden {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
        Ok(Allowed::Some)
    }

    fn take_free(&mut self, token: u32) -> Result<(), GrammarError> {
        let Some(Calls { watch, fresh }) = &mut self.calls else {
            return Ok(());
        };
        let bytes = self.bytes.get(token);
        if matches!(watch.place, Place::Start | Place::Between) {
            match watch.opening(bytes) {
                Opening::Blank => return Ok(()),
                Opening::Call | Opening::Never => watch.place = Place::Call,
                Opening::Text => watch.place = Place::Text,
            }
        }
        if watch.place == Place::Text {
            watch.read(bytes);
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(broken)?;
        // Calls end with a literal, so there is nothing that could still follow.
        if self.matcher.is_accepting().map_err(broken)? {
            watch.end_call();
            self.matcher = fresh.deep_clone();
        }
        Ok(())
    }

    fn mask(&mut self, row: &mut [f32], also: Option<u32>) -> Result<(), GrammarError> {
        let mask = self.matcher.compute_mask().map_err(broken)?;
        for (index, logit) in row.iter_mut().enumerate() {
            let allowed = index < mask.len() && mask.is_allowed(index as u32);
            if !allowed && also != Some(index as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Forbids tokens that end the reasoning in their middle. Only looked for where the end has begun, because no
    /// vocabulary has a token that holds all of `</think>` and more.
    fn forbid_running_on(&self, row: &mut [f32]) {
        let tail = String::from_utf8_lossy(&self.tail);
        let begun = overlap(&tail, REASONING_END);
        if begun == 0 {
            return;
        }
        let rest = &REASONING_END.as_bytes()[begun..];
        for (index, logit) in row.iter_mut().enumerate() {
            let bytes = self.bytes.get(index as u32);
            if bytes.len() > rest.len() && bytes.starts_with(rest) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}
