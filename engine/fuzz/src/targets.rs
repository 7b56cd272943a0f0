//! What is fuzzed: each function takes any bytes and panics where an invariant does not hold.

use std::sync::OnceLock;

use engine_load::safetensors_header as read_header;
use engine_memory::{MemoryRequest, memory_plan};
use engine_server::{ServerOptions, offline};
use engine_spec::{Device, Dtype, KvCacheDtype, ModelConfig, Parallelism, Quantization};
use engine_text::{
    Allowed, AllowedCalls, AnswerRule, CallDelta, ChatMessage, ContentRule, OutputParser,
    ReasoningParser, Role, Text, TextFiles, ToolCall, ToolFormat, ToolParser,
};
use serde_json::{Map, Value, json};

use crate::Random;

const TOKENIZER: &[u8] = include_bytes!("../../../e2e/models/tiny-r1/tokenizer.json");
const TOKENIZER_CONFIG: &str = include_str!("../../../e2e/models/tiny-r1/tokenizer_config.json");
/// Tokens that a grammar is asked for.
const STEPS: usize = 24;
/// Rows of logits of that model.
const VOCABULARY: usize = 544;

fn files() -> TextFiles {
    TextFiles {
        tokenizer: TOKENIZER.to_vec(),
        tokenizer_config: Some(TOKENIZER_CONFIG.to_owned()),
        chat_template: None,
        generation_config: None,
    }
}

/// The text side of the quick start's model: a real tokenizer and a template that knows calls.
fn text() -> &'static Text {
    static TEXT: OnceLock<Text> = OnceLock::new();
    TEXT.get_or_init(|| Text::new(files()).unwrap_or_else(|error| panic!("{error}")))
}

/// An error must say something, and something that fits on a screen.
fn check_error(error: impl std::fmt::Display) {
    let message = error.to_string();
    assert!(!message.is_empty(), "an error without a message");
    let shown: String = message.chars().take(200).collect();
    assert!(
        message.len() < 16 << 10,
        "an error of {} bytes: {shown}",
        message.len()
    );
}

/// The header of a weights file: what is accepted describes exactly the bytes that are there.
pub fn safetensors_header(data: &[u8]) {
    let header = match read_header("fuzzed.safetensors", data) {
        Ok(header) => header,
        Err(error) => return check_error(error),
    };
    let mut spans: Vec<(usize, usize)> = header.values().map(|t| (t.begin, t.end)).collect();
    spans.sort_unstable();
    let length = u64::from_le_bytes(data[..8].try_into().unwrap_or_default()) as usize;
    let mut at = 8 + length;
    for (begin, end) in spans {
        assert_eq!(begin, at, "tensors follow each other");
        at = end;
    }
    assert_eq!(at, data.len(), "the last tensor ends with the file");
    for tensor in header.values() {
        if let Some(dtype) = tensor.float_type() {
            let elements: usize = tensor.shape.iter().product();
            assert_eq!(elements * dtype.bytes(), tensor.end - tensor.begin);
        }
    }
}

/// A `config.json`, and the memory plan of what it describes.
pub fn model_config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let config = match ModelConfig::from_hf_json(text) {
        Ok(config) => config,
        Err(error) => return check_error(error),
    };
    let active = config.active_parameters();
    assert!(active <= config.parameters(), "{active} active parameters");
    let request = MemoryRequest {
        dtype: Dtype::Auto,
        quantization: Quantization::None,
        kv_cache: KvCacheDtype::Auto,
        draft_tokens: 0,
        parallelism: Parallelism::default(),
        device: Device::Cpu,
        max_model_len: None,
        max_num_seqs: 16,
        block_size: 16,
        max_num_batched_tokens: 512,
        capacity_bytes: None,
    };
    for (device, capacity_bytes, quantization, draft_tokens) in [
        (Device::Cpu, None, Quantization::None, 0),
        (Device::Cpu, Some(1 << 30), Quantization::Int4, 2),
        (Device::Nvidia, Some(80 << 30), Quantization::None, 0),
    ] {
        let request = MemoryRequest {
            device,
            capacity_bytes,
            quantization,
            draft_tokens,
            ..request
        };
        match memory_plan(&config, &request) {
            Ok(plan) => check_error(plan),
            Err(misfit) => check_error(misfit),
        }
    }
}

/// A `tokenizer.json`: what loads also encodes and decodes.
pub fn tokenizer(data: &[u8]) {
    let files = TextFiles {
        tokenizer: data.to_vec(),
        ..TextFiles::default()
    };
    let text = match Text::new(files) {
        Ok(text) => text,
        Err(error) => return check_error(error),
    };
    match text.encode("a <think>1 + 1 = é</think>\n", true) {
        Ok(tokens) => {
            text.decode(&tokens);
            let mut parser = text.plain_parser(vec!["=".into()]);
            for token in &tokens {
                parser.push(*token);
                text.token_bytes(*token);
            }
            parser.finish();
        }
        Err(error) => check_error(error),
    }
    text.decode(&[0, 1, u32::MAX]);
}

/// A chat request from its bytes to its prompt, as the server does it.
pub fn chat_request(data: &[u8]) {
    match offline::chat_prompt(data, &ServerOptions::new("m"), text()) {
        Ok(tokens) => assert!(
            tokens <= data.len() * 8 + 4096,
            "a prompt of {tokens} tokens"
        ),
        Err(error) => check_error(error),
    }
}

/// The bodies of the other routes.
pub fn other_requests(data: &[u8]) {
    for route in offline::ROUTES {
        if let Err(error) = offline::check_body(route, data, &ServerOptions::new("m"), text()) {
            check_error(error);
        }
    }
}

/// A chat template over a conversation that has everything.
pub fn chat_template(data: &[u8]) {
    let files = TextFiles {
        chat_template: Some(String::from_utf8_lossy(data).into_owned()),
        ..files()
    };
    let text = match Text::new(files) {
        Ok(text) => text,
        Err(error) => return check_error(error),
    };
    let mut called = ChatMessage::new(Role::Assistant, "<think>hm</think>");
    called.tool_calls.push(ToolCall {
        id: "c1".into(),
        name: "f".into(),
        arguments: "{\"a\": [1, 2.5, null]}".into(),
    });
    let mut result = ChatMessage::new(Role::Tool, "3");
    result.tool_call_id = Some("c1".into());
    let messages = [
        ChatMessage::new(Role::System, "be short"),
        ChatMessage::new(Role::User, " a\nb "),
        called,
        result,
    ];
    let tools =
        [json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}})];
    let mut variables = Map::new();
    variables.insert("enable_thinking".into(), Value::Bool(false));
    match text.render(&messages, &tools, true, &variables) {
        Ok(prompt) => {
            text.chat_parser(&prompt, Vec::new(), AllowedCalls::Many);
        }
        Err(error) => check_error(error),
    }
}

const FORMATS: [ToolFormat; 4] = [
    ToolFormat::DeepseekV3,
    ToolFormat::DeepseekV31,
    ToolFormat::Hermes,
    ToolFormat::Llama3Json,
];

/// Text cut into pieces by a seed, at borders of characters.
fn cut(text: &str, seed: u64) -> Vec<&str> {
    let mut random = Random::new(seed);
    let mut pieces = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let most = 1 + random.below(24);
        let at = rest
            .char_indices()
            .nth(most)
            .map_or(rest.len(), |(at, _)| at);
        let (piece, after) = rest.split_at(at);
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// The first byte chooses format, thinking and parallel calls, the second one the cut.
pub fn answer_parsers(data: &[u8]) {
    let [choice, seed, rest @ ..] = data else {
        return;
    };
    let answer = String::from_utf8_lossy(rest);
    let format = FORMATS[usize::from(choice & 3)];
    let parallel = choice & 4 != 0;
    let inside = choice & 8 != 0;
    let run = |pieces: &[&str]| {
        let mut reasoning_parser = ReasoningParser::new(inside);
        let mut tools = ToolParser::new(format, parallel);
        let (mut reasoning, mut content, mut said) = (String::new(), String::new(), String::new());
        let mut calls: Vec<(String, String)> = Vec::new();
        let mut deltas: Vec<CallDelta> = Vec::new();
        for piece in pieces {
            reasoning_parser.push(piece, &mut reasoning, &mut said);
            tools.push(&std::mem::take(&mut said), &mut content, &mut deltas);
        }
        reasoning_parser.finish(&mut reasoning, &mut said);
        tools.push(&said, &mut content, &mut deltas);
        tools.finish(&mut content, &mut deltas);
        for delta in deltas {
            if let Some(name) = delta.name {
                assert_eq!(delta.index, calls.len(), "a call has one name, in order");
                calls.push((name, String::new()));
            }
            calls[delta.index].1.push_str(&delta.arguments);
        }
        assert_eq!(tools.calls(), calls.len());
        assert!(parallel || calls.len() <= 1, "a second call");
        (reasoning, content, calls)
    };
    let whole = run(&[&answer]);
    assert_eq!(
        run(&cut(&answer, u64::from(*seed))),
        whole,
        "a cut changes the answer"
    );
    if whole.2.is_empty() {
        assert!(
            whole.0.len() + whole.1.len() <= answer.len(),
            "text out of nothing"
        );
    }
}

/// Any tokens through detokeniser, stop strings and parsers; text must come out as whole characters.
pub fn output_tokens(data: &[u8]) {
    let [choice, rest @ ..] = data else {
        return;
    };
    let stops = match choice & 3 {
        0 => Vec::new(),
        1 => vec!["</".to_owned()],
        2 => vec!["é".to_owned(), "ab".to_owned()],
        _ => vec!["}".to_owned(), "}}".to_owned()],
    };
    let calls =
        [AllowedCalls::None, AllowedCalls::One, AllowedCalls::Many][usize::from(choice >> 2) % 3];
    let prompt = if choice & 64 != 0 { "<think>" } else { "" };
    let mut parser: OutputParser = text().chat_parser(prompt, stops.clone(), calls);
    let mut content = String::new();
    let tokens = text().encode(&String::from_utf8_lossy(rest), false);
    // Pairs of bytes as ids where the text is not what is meant: special and unknown ones too.
    let tokens = match choice & 128 {
        0 => tokens.unwrap_or_default(),
        _ => rest
            .chunks(2)
            .map(|pair| pair.iter().fold(0, |id, b| id << 8 | u32::from(*b)))
            .collect(),
    };
    for token in tokens {
        let delta = parser.push(token);
        content.push_str(&delta.content);
        if delta.stopped {
            break;
        }
    }
    content.push_str(&parser.finish().content);
    if prompt.is_empty() && calls == AllowedCalls::None {
        for stop in &stops {
            assert!(
                !content.contains(stop.as_str()),
                "{stop:?} is in the content"
            );
        }
    }
}

/// The first byte chooses the kind of rule, the second one which allowed token is taken.
pub fn grammar(data: &[u8]) {
    let [kind, seed, rest @ ..] = data else {
        return;
    };
    let source = String::from_utf8_lossy(rest).into_owned();
    let content = match kind % 5 {
        0 | 1 => match serde_json::from_slice(rest) {
            Ok(schema) => ContentRule::JsonSchema {
                schema,
                strict: kind % 5 == 1,
            },
            Err(_) => return,
        },
        2 => ContentRule::Regex(source),
        3 => ContentRule::Lark(source),
        _ => ContentRule::Choice(source.split('\n').map(str::to_owned).collect()),
    };
    let rule = AnswerRule::Whole {
        content: Some(content),
        calls: None,
    };
    let grammar = match text().plain_grammar(&rule) {
        Ok(grammar) => grammar,
        Err(error) => return check_error(error),
    };
    let mut state = grammar.start();
    let mut random = Random::new(u64::from(*seed));
    let mut row = vec![0.0f32; VOCABULARY];
    for _ in 0..STEPS {
        row.fill(0.0);
        match state.restrict(&mut row) {
            Ok(Allowed::Nothing) => return,
            Ok(Allowed::Some) => {}
            Err(error) => return check_error(error),
        }
        let allowed: Vec<usize> = (0..row.len()).filter(|at| row[*at] == 0.0).collect();
        if allowed.is_empty() {
            return;
        }
        let token = allowed[random.below(allowed.len())] as u32;
        if text().eos_tokens().contains(&token) {
            return;
        }
        if let Err(error) = state.take(token) {
            // Only a limit may come between a mask and its token.
            return check_error(error);
        }
    }
}
