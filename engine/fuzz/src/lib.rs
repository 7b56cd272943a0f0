//! Fuzz targets of everything the engine reads from outside, and a bounded runner for stable Rust.
//!
//! A target is a function of bytes that must neither panic nor run or allocate without bound, and that checks what holds
//! for every input: an error is an error, a stream may be cut anywhere, what a grammar allows it also takes. The same
//! functions run under libFuzzer (`libfuzzer/`, a workspace of its own because it needs a nightly compiler) and in
//! `cargo test`, where [`Runner`] replays the committed corpus and then mutates it from a seed that it prints.

mod mutate;
mod runner;
pub mod targets;

pub use mutate::{Mutator, Random};
pub use runner::{Failure, Meter, Outcome, Runner};

/// One thing that is fuzzed.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, which is also the folder of its corpus.
    pub name: &'static str,
    /// Panics where an invariant does not hold.
    pub run: fn(&[u8]),
    /// Pieces of text that mutations put in.
    pub dictionary: &'static [&'static str],
    /// Most bytes that one input may have allocated at a time.
    pub bytes_max: usize,
}

const MIB: usize = 1 << 20;

/// JSON's punctuation and the numbers that break arithmetic.
const JSON: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "\"",
    "null",
    "true",
    "-1",
    "0",
    "1e400",
    "4294967296",
    "9223372036854775808",
    "18446744073709551616",
    "\\ud800",
    "\\u0000",
];

const TAGS: &[&str] = &[
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<|python_tag|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "function",
    "\n```json\n",
    "\n```",
    "{\"name\": \"f\", \"arguments\": {",
    "{\"name\": \"f\", \"parameters\": {}}",
    "}",
    ";",
    "\\\"",
    "é",
    "\u{10FFFF}",
];

/// Every target.
pub const TARGETS: [Target; 9] = [
    Target {
        name: "safetensors_header",
        run: targets::safetensors_header,
        dictionary: &[
            "BF16",
            "F8_E4M3",
            "I4",
            "__metadata__",
            "data_offsets",
            "shape",
            "[0,",
            "18446744073709551615",
        ],
        bytes_max: 64 * MIB,
    },
    Target {
        name: "model_config",
        run: targets::model_config,
        dictionary: JSON,
        bytes_max: 64 * MIB,
    },
    Target {
        name: "tokenizer",
        run: targets::tokenizer,
        dictionary: JSON,
        bytes_max: 256 * MIB,
    },
    Target {
        name: "chat_request",
        run: targets::chat_request,
        dictionary: JSON,
        bytes_max: 256 * MIB,
    },
    Target {
        name: "other_requests",
        run: targets::other_requests,
        dictionary: JSON,
        bytes_max: 256 * MIB,
    },
    Target {
        name: "chat_template",
        run: targets::chat_template,
        dictionary: &[
            "{{",
            "}}",
            "{%",
            "%}",
            "{% for m in messages %}",
            "{% endfor %}",
            "{% if ",
            "{% endif %}",
            "{% set ns = namespace(a=1) %}",
            "{% macro f(x) %}",
            "{% endmacro %}",
            "{% include 'x' %}",
            "|tojson",
            "|trim",
            ".split('a')",
            "[::-1]",
            "[-1]",
            "range(99999999)",
            " * 99999",
            "raise_exception('x')",
            "9223372036854775807",
            " ~ ",
            " // 0",
            " % 0",
        ],
        bytes_max: 256 * MIB,
    },
    Target {
        name: "answer_parsers",
        run: targets::answer_parsers,
        dictionary: TAGS,
        bytes_max: 64 * MIB,
    },
    Target {
        name: "output_tokens",
        run: targets::output_tokens,
        dictionary: TAGS,
        bytes_max: 64 * MIB,
    },
    Target {
        name: "grammar",
        run: targets::grammar,
        dictionary: &[
            "{\"type\":",
            "\"object\"",
            "\"$ref\":\"#\"",
            "\"properties\":",
            "\"allOf\":[",
            "\"anyOf\":[",
            "\"pattern\":",
            "\"minItems\":",
            "\"maxLength\":1000000000",
            "\"multipleOf\":0",
            "(",
            ")",
            "[^",
            "{1,99999}",
            "{0,}",
            "|",
            "*",
            "+",
            "\\p{L}",
            "(?=",
            "start: ",
            "%ignore",
            "%json {",
            "\n",
            "start",
        ],
        bytes_max: 1024 * MIB,
    },
];
