//! A model's text side: its tokenizer, template and special tokens, read from the files beside its weights.

use std::sync::Arc;

use serde::Deserialize;
use thiserror::Error;
use tokenizers::Tokenizer;

use crate::bytes::TokenBytes;
use crate::generation::GenerationDefaults;
use crate::grammar::{AnswerRule, Grammar, GrammarError, Grammars, Thought};
use crate::output::OutputParser;
use crate::reasoning::{REASONING_END, REASONING_START, ReasoningParser};
use crate::stop::StopStrings;
use crate::template::{ChatMessage, ChatTemplate, TemplateError};
use crate::tool_format::{ToolCallParser, ToolFormat};
use crate::tool_parser::ToolParser;
use crate::tool_prompt::with_described_tools;

/// Contents of the files that belong to a model's text side.
#[derive(Clone, Debug, Default)]
pub struct TextFiles {
    /// `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<String>,
    /// `chat_template.jinja`; wins over the template in `tokenizer_config.json`.
    pub chat_template: Option<String>,
    /// `generation_config.json`.
    pub generation_config: Option<String>,
}

/// Why a model's text side cannot be used.
#[derive(Debug, Error)]
pub enum TextError {
    /// `tokenizer.json` is not a tokenizer.
    #[error("tokenizer.json cannot be read: {0}")]
    Tokenizer(String),
    /// Not byte-level: output could not be taken apart token by token.
    #[error(
        "tokenizer.json has the decoder {found}, but only ByteLevel is served (DeepSeek, Qwen and Llama 3 have it)"
    )]
    Decoder {
        /// Type of the decoder in the file.
        found: String,
    },
    /// Another file is not what it should be.
    #[error("{file} cannot be read: {message}")]
    File {
        /// Which file.
        file: &'static str,
        /// What is wrong.
        message: String,
    },
    /// The chat template does not compile.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    add_bos_token: Option<bool>,
    #[serde(default)]
    bos_token: Option<TokenText>,
    #[serde(default)]
    eos_token: Option<TokenText>,
    #[serde(default)]
    chat_template: Option<Templates>,
}

/// Written as a string or as an object with flags.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenText {
    Plain(String),
    Added { content: String },
}

impl TokenText {
    fn into_string(self) -> String {
        match self {
            Self::Plain(text) | Self::Added { content: text } => text,
        }
    }
}

/// One template, or several with names of which `default` is meant.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// Tokenizer, template and special tokens of one model.
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    bytes: Arc<TokenBytes>,
    template: Option<ChatTemplate>,
    prepended: Option<u32>,
    eos_tokens: Vec<u32>,
    reasons: bool,
    tool_format: Option<ToolFormat>,
    grammars: Grammars,
    defaults: GenerationDefaults,
}

/// How many tools an answer may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowedCalls {
    /// None: what looks like a call is content.
    None,
    /// One; its end ends the answer.
    One,
    /// Any number.
    Many,
}

impl Text {
    /// Reads the files of a model.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn new(files: TextFiles) -> Result<Self, TextError> {
        let tokenizer = read_tokenizer(&files.tokenizer)?;
        check_decoder(&files.tokenizer)?;
        let config: TokenizerConfig =
            parse("tokenizer_config.json", files.tokenizer_config.as_deref())?;
        let defaults: GenerationDefaults =
            parse("generation_config.json", files.generation_config.as_deref())?;
        let bos = config.bos_token.map(TokenText::into_string);
        let eos = config.eos_token.map(TokenText::into_string);
        let id = |token: &Option<String>| token.as_deref().and_then(|t| tokenizer.token_to_id(t));
        let prepended = id(&bos).filter(|_| config.add_bos_token == Some(true));
        let mut eos_tokens = defaults.eos_tokens();
        eos_tokens.extend(id(&eos));
        eos_tokens.sort_unstable();
        eos_tokens.dedup();
        let in_config = config.chat_template.and_then(|templates| match templates {
            Templates::One(template) => Some(template),
            Templates::Named(named) => named
                .into_iter()
                .find(|template| template.name == "default")
                .map(|template| template.template),
        });
        let template = files
            .chat_template
            .or(in_config)
            .map(|source| ChatTemplate::new(source, bos, eos))
            .transpose()?;
        let source = template.as_ref().map(ChatTemplate::source);
        let tool_format = ToolFormat::detect(source.as_deref(), |token| {
            tokenizer.token_to_id(token).is_some()
        });
        let bytes = Arc::new(TokenBytes::new(&tokenizer)?);
        Ok(Self {
            tool_format,
            grammars: Grammars::new(bytes.clone(), eos_tokens.clone()),
            bytes,
            reasons: [REASONING_START, REASONING_END]
                .iter()
                .all(|tag| tokenizer.token_to_id(tag).is_some()),
            tokenizer,
            template,
            prepended,
            eos_tokens,
            defaults,
        })
    }

    /// Sets how calls of tools are written; found out from the files without this.
    pub fn set_tool_call_parser(&mut self, parser: ToolCallParser) {
        match parser {
            ToolCallParser::Auto => {}
            ToolCallParser::Format(format) => self.tool_format = Some(format),
            ToolCallParser::None => self.tool_format = None,
        }
    }

    /// How the model writes calls of tools; none when it is not known to call any.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.tool_format
    }

    /// The prompt of a conversation. `tools` have OpenAI's shape; a template that does not know tools gets them
    /// described in the system message.
    ///
    /// # Errors
    /// There is no template, or it refuses the messages.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        tools: &[serde_json::Value],
        add_generation_prompt: bool,
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, TemplateError> {
        let template = self.template.as_ref().ok_or(TemplateError::Missing)?;
        if let Some(format) = self.tool_format
            && !tools.is_empty()
            && !template.knows_tools()
        {
            let messages = with_described_tools(messages, tools, format);
            return template.render(&messages, &[], add_generation_prompt, variables);
        }
        template.render(messages, tools, add_generation_prompt, variables)
    }

    /// Whether conversations can be rendered.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Tokens of a text. `add_special` puts the beginning-of-sequence token first where the model wants one; a rendered
    /// template has it already.
    ///
    /// # Errors
    /// The tokenizer refuses the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self
            .tokenizer
            .encode_fast(text, add_special)
            .map_err(|error| TextError::Tokenizer(error.to_string()))?;
        let mut ids = encoding.get_ids().to_vec();
        if let Some(bos) = self.prepended.filter(|_| add_special)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Text of tokens, special ones left out.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|token| self.bytes.get(*token))
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Bytes of one token, for log-probabilities. Special tokens show their text here.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        let bytes = self.bytes.get(token);
        if bytes.is_empty() {
            return self
                .tokenizer
                .id_to_token(token)
                .unwrap_or_default()
                .into_bytes();
        }
        bytes.to_vec()
    }

    /// Tokens that end an answer.
    pub fn eos_tokens(&self) -> &[u32] {
        &self.eos_tokens
    }

    /// How the model's makers want it sampled.
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }

    /// Compiles what the answer to a conversation with this prompt must be.
    ///
    /// # Errors
    /// The rule is wrong, too large, or needs what the model does not have.
    pub fn chat_grammar(&self, prompt: &str, rule: &AnswerRule) -> Result<Grammar, GrammarError> {
        let prompt = prompt.trim_end();
        let thought = if !self.reasons || prompt.ends_with(REASONING_END) {
            Thought::None
        } else if prompt.ends_with(REASONING_START) {
            Thought::Open
        } else {
            Thought::Possible
        };
        self.grammars.compile(rule, self.tool_format, thought)
    }

    /// Compiles what the continuation of a plain prompt must be.
    ///
    /// # Errors
    /// See [`Self::chat_grammar`].
    pub fn plain_grammar(&self, rule: &AnswerRule) -> Result<Grammar, GrammarError> {
        self.grammars.compile(rule, self.tool_format, Thought::None)
    }

    /// A parser for the answer to a conversation with this prompt.
    pub fn chat_parser(
        &self,
        prompt: &str,
        stops: Vec<String>,
        calls: AllowedCalls,
    ) -> OutputParser {
        let reasoning = if self.reasons {
            ReasoningParser::new(prompt.trim_end().ends_with(REASONING_START))
        } else {
            ReasoningParser::off()
        };
        let tools = match (self.tool_format, calls) {
            (None, _) | (_, AllowedCalls::None) => ToolParser::off(),
            (Some(format), calls) => ToolParser::new(format, calls == AllowedCalls::Many),
        };
        OutputParser::new(
            self.bytes.clone(),
            StopStrings::new(stops),
            reasoning,
            tools,
        )
    }

    /// A parser that shows an answer as it is.
    pub fn plain_parser(&self, stops: Vec<String>) -> OutputParser {
        let stops = StopStrings::new(stops);
        OutputParser::new(
            self.bytes.clone(),
            stops,
            ReasoningParser::off(),
            ToolParser::off(),
        )
    }
}

fn parse<T: Default + for<'a> Deserialize<'a>>(
    file: &'static str,
    content: Option<&str>,
) -> Result<T, TextError> {
    content.map_or_else(
        || Ok(T::default()),
        |content| {
            serde_json::from_str(content).map_err(|error| TextError::File {
                file,
                message: error.to_string(),
            })
        },
    )
}

/// The library panics on some files that are JSON but no tokenizer; here that is an error like any other.
fn read_tokenizer(bytes: &[u8]) -> Result<Tokenizer, TextError> {
    match std::panic::catch_unwind(|| Tokenizer::from_bytes(bytes)) {
        Ok(read) => read.map_err(|error| TextError::Tokenizer(error.to_string())),
        Err(_) => Err(TextError::Tokenizer("it is no tokenizer".to_owned())),
    }
}

/// Only a byte-level decoder may be undone token by token.
fn check_decoder(tokenizer: &[u8]) -> Result<(), TextError> {
    let json: serde_json::Value = serde_json::from_slice(tokenizer)
        .map_err(|error| TextError::Tokenizer(error.to_string()))?;
    let decoder = &json["decoder"];
    let name = |decoder: &serde_json::Value| decoder["type"].as_str().unwrap_or("none").to_owned();
    let found = match decoder["decoders"].as_array() {
        Some(decoders) => decoders.iter().map(name).collect::<Vec<_>>().join(", "),
        None => name(decoder),
    };
    if found == "ByteLevel" {
        Ok(())
    } else {
        Err(TextError::Decoder { found })
    }
}
