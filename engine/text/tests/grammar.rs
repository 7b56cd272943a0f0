//! Masks over a vocabulary of bytes: whatever the model prefers, the answer has the form that was asked for.

#![allow(missing_docs, clippy::unwrap_used)]

mod bytes_tokenizer;

use bytes_tokenizer::{VOCABULARY, files, id};
use engine_text::{
    Allowed, AnswerRule, CallRule, CallableFunction, ContentRule, Grammar, GrammarError, Text,
    ToolCallParser, ToolFormat,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn text() -> Text {
    Text::new(files()).unwrap()
}

fn content(rule: ContentRule) -> AnswerRule {
    AnswerRule::Whole {
        content: Some(rule),
        calls: None,
    }
}

fn schema(schema: Value) -> AnswerRule {
    content(ContentRule::JsonSchema {
        schema,
        strict: true,
    })
}

fn function(name: &str, schema: &Value) -> CallableFunction {
    CallableFunction {
        name: name.to_owned(),
        schema: schema.clone(),
        strict: true,
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Takes the best allowed token of random logits until the answer ends; `wish` may prefer tokens.
fn generate(grammar: &Grammar, seed: u64, wish: impl Fn(usize) -> Option<u32>) -> Vec<u32> {
    let mut state = grammar.start();
    let mut output = Vec::new();
    let end = id("<｜end▁of▁sentence｜>");
    while output.len() < 2000 {
        let step = output.len() as u64;
        let mut row: Vec<f32> = (0..VOCABULARY as u64 + 3)
            .map(|token| (mix(seed ^ (step << 32) ^ token) % 1000) as f32)
            .collect();
        if let Some(token) = wish(output.len()) {
            row[token as usize] = 5000.0;
        }
        if state.restrict(&mut row).unwrap() == Allowed::Nothing {
            return output;
        }
        let best = (0..row.len())
            .max_by(|a, b| row[*a].total_cmp(&row[*b]))
            .unwrap() as u32;
        assert!(row[best as usize].is_finite());
        if best == end {
            return output;
        }
        state.take(best).unwrap();
        output.push(best);
    }
    panic!("the answer does not end: {}", text().decode(&output));
}

fn plain(rule: &AnswerRule, seed: u64) -> String {
    let text = text();
    let grammar = text.plain_grammar(rule).unwrap();
    text.decode(&generate(&grammar, seed, |_| None))
}

#[test]
fn choices_regular_expressions_and_grammars_hold() {
    for seed in 0..20 {
        let choice = plain(
            &content(ContentRule::Choice(vec!["yes".into(), "né \"in\"".into()])),
            seed,
        );
        assert!(choice == "yes" || choice == "né \"in\"", "{choice}");
        let regex = plain(
            &content(ContentRule::Regex("[ab]{3}/[0-9]{2}".into())),
            seed,
        );
        assert_eq!(regex.len(), 6);
        assert!(
            regex[..3].bytes().all(|b| b == b'a' || b == b'b') && regex[3..].starts_with('/'),
            "{regex}"
        );
        let sum = plain(
            &content(ContentRule::Lark(
                "start: N \"+\" N\nN: /[0-9]{1,3}/".into(),
            )),
            seed,
        );
        let (left, right) = sum.split_once('+').unwrap();
        assert!(
            left.parse::<u32>().is_ok() && right.parse::<u32>().is_ok(),
            "{sum}"
        );
    }
}

#[test]
fn the_grammar_waits_for_the_end_of_the_reasoning() {
    let text = text();
    let rule = content(ContentRule::Choice(vec!["yes".into()]));
    let grammar = text
        .chat_grammar("<｜Assistant｜><think>\n", &rule)
        .unwrap();
    // The end of the reasoning as its own token, then spelled out.
    let mut thought = text.encode("no no {", false).unwrap();
    thought.push(id("</think>"));
    let spelled: Vec<u32> = "hm </think>".bytes().map(u32::from).collect();
    for thought in [thought, spelled] {
        let output = generate(&grammar, 3, |step| thought.get(step).copied());
        assert_eq!(output[..thought.len()], thought);
        assert_eq!(
            text.decode(&output[thought.len()..])
                .trim_start_matches('\n'),
            "yes"
        );
    }
    // A prompt that leaves it open: with and without a thought.
    let grammar = text.chat_grammar("<｜Assistant｜>", &rule).unwrap();
    let opened = [id("<think>"), 104, id("</think>")];
    let output = generate(&grammar, 4, |step| opened.get(step).copied());
    assert_eq!(output[..3], opened);
    assert!(text.decode(&output).ends_with("yes"));
    let output = generate(&grammar, 4, |step| (step == 0).then_some(u32::from(b'y')));
    assert_eq!(text.decode(&output), "yes");
    // A prompt that says that thinking is over.
    let grammar = text.chat_grammar("<｜Assistant｜></think>", &rule).unwrap();
    let output = generate(&grammar, 4, |step| opened.get(step).copied());
    assert_eq!(text.decode(&output), "yes");
}

#[test]
fn forced_calls_are_read_by_the_parser_of_the_same_format() {
    let arguments = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"], "additionalProperties": false});
    let rule = |many| AnswerRule::Whole {
        content: None,
        calls: Some(CallRule {
            functions: vec![function("add", &arguments), function("sub", &arguments)],
            many,
        }),
    };
    for format in [
        ToolFormat::DeepseekV3,
        ToolFormat::DeepseekV31,
        ToolFormat::Hermes,
        ToolFormat::Llama3Json,
    ] {
        let mut text = text();
        text.set_tool_call_parser(ToolCallParser::Format(format));
        let mut most = 0;
        for seed in 0..12 {
            let many = seed % 2 == 1;
            let grammar = text.chat_grammar("</think>", &rule(many)).unwrap();
            let mut parser = text.chat_parser("</think>", vec![], engine_text::AllowedCalls::Many);
            let (mut said, mut calls) = (String::new(), Vec::<(String, String)>::new());
            let mut take = |delta: engine_text::Delta| {
                said.push_str(&delta.content);
                for call in delta.calls {
                    calls.extend(call.name.map(|name| (name, String::new())));
                    calls[call.index].1.push_str(&call.arguments);
                }
            };
            for token in generate(&grammar, seed, |_| None) {
                take(parser.push(token));
            }
            take(parser.finish());
            assert_eq!(said, "", "{format}");
            assert!(!calls.is_empty() && (many || calls.len() == 1), "{format}");
            most = most.max(calls.len());
            for (name, arguments) in calls {
                assert!(name == "add" || name == "sub");
                let arguments: Value = serde_json::from_str(&arguments).unwrap();
                assert!((0..=99).contains(&arguments["n"].as_i64().unwrap()));
            }
        }
        assert!(most > 1, "{format} never called twice");
    }
}

/// What an answer says and calls.
fn read(text: &Text, output: &[u32]) -> (String, Vec<(String, String)>) {
    let mut parser = text.chat_parser("</think>", vec![], engine_text::AllowedCalls::Many);
    let (mut said, mut calls) = (String::new(), Vec::<(String, String)>::new());
    let deltas = output.iter().map(|token| parser.push(*token));
    let mut deltas: Vec<engine_text::Delta> = deltas.collect();
    deltas.push(parser.finish());
    for delta in deltas {
        said.push_str(&delta.content);
        for call in delta.calls {
            calls.extend(call.name.map(|name| (name, String::new())));
            calls[call.index].1.push_str(&call.arguments);
        }
    }
    (said, calls)
}

/// The openings of two calls with arguments that no schema allows, as a model of each format would write them.
const WRONG_CALLS: [(ToolFormat, &str, &str); 5] = [
    (
        ToolFormat::DeepseekV3,
        "Look: <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>sub\n```json\n{\"m\": \"x\"}",
        "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>nobody\n```json\n[]",
    ),
    (
        ToolFormat::DeepseekV31,
        "Look: <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>sub<｜tool▁sep｜>{\"n\": -1}",
        "<｜tool▁call▁begin｜>nobody<｜tool▁sep｜>{}",
    ),
    (
        ToolFormat::Hermes,
        "Look: <tool_call>\n{\"name\": \"sub\", \"arguments\": {\"n\": 1000}}",
        "\n<tool_call>\n{\"arguments\": {}, \"name\": \"nobody\"}",
    ),
    (
        ToolFormat::Llama3Json,
        " {\"name\": \"sub\", \"parameters\": {\"n\": null}}",
        "; {\"type\": \"function\", \"name\": \"nobody\"}",
    ),
    (
        ToolFormat::Llama3Json,
        "Look: <|python_tag|>{\"name\": \"sub\", \"parameters\": 7}",
        "; {\"name\": \"nobody\"}",
    ),
];

#[test]
fn calls_of_a_free_answer_have_valid_arguments_in_every_format() {
    let arguments = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"], "additionalProperties": false});
    let rule = AnswerRule::FreeWithCalls(CallRule {
        functions: vec![function("add", &arguments), function("sub", &arguments)],
        many: true,
    });
    for (format, first, second) in WRONG_CALLS {
        let mut text = text();
        text.set_tool_call_parser(ToolCallParser::Format(format));
        let grammar = text.chat_grammar("</think>", &rule).unwrap();
        for seed in 0..3 {
            // The model wants both texts, byte by byte, and then to end; the grammar may make it write other ones.
            let end = id("<｜end▁of▁sentence｜>");
            let mut state = grammar.start();
            let mut output: Vec<u32> = Vec::new();
            let mut wishes = [first, second].into_iter();
            let mut wish: Vec<u8> = wishes.next().unwrap().bytes().rev().collect();
            let mut calls = 0;
            loop {
                let (_, found) = read(&text, &output);
                let complete = found
                    .iter()
                    .filter(|(_, arguments)| serde_json::from_str::<Value>(arguments).is_ok())
                    .count();
                let step = output.len() as u64;
                let mut row: Vec<f32> = (0..VOCABULARY as u64)
                    .map(|token| (mix(seed ^ (step << 32) ^ token) % 1000) as f32)
                    .collect();
                row[end as usize] = 2000.0;
                assert_eq!(state.restrict(&mut row).unwrap(), Allowed::Some);
                // The end is allowed between calls only.
                if complete > calls && row[end as usize].is_finite() {
                    calls = complete;
                    wish = wishes.next().unwrap_or_default().bytes().rev().collect();
                }
                if let Some(byte) = wish.last()
                    && row[*byte as usize].is_finite()
                {
                    row[*byte as usize] = 5000.0;
                }
                let best = (0..row.len())
                    .max_by(|a, b| row[*a].total_cmp(&row[*b]))
                    .unwrap() as u32;
                state.take(best).unwrap();
                if best == end {
                    break;
                }
                if wish.last() == Some(&(best as u8)) && best < 256 {
                    wish.pop();
                }
                output.push(best);
                assert!(output.len() < 1000, "{}", text.decode(&output));
            }
            let (said, calls) = read(&text, &output);
            let whole = text.decode(&output);
            assert!(!calls.is_empty(), "{format}: {whole}");
            assert!(
                said.trim() == "Look:" || said.trim().is_empty(),
                "{format}: {said:?} in {whole:?}"
            );
            for (name, arguments) in &calls {
                assert!(name == "add" || name == "sub", "{format}: {whole}");
                let arguments: Value = serde_json::from_str(arguments).unwrap();
                assert!(
                    (0..=99).contains(&arguments["n"].as_i64().unwrap()),
                    "{whole}"
                );
            }
        }
    }
}

#[test]
fn a_free_answer_without_a_call_is_left_alone() {
    let rule = AnswerRule::FreeWithCalls(CallRule {
        functions: vec![function("add", &json!({"type": "object"}))],
        many: true,
    });
    for (format, words) in [
        (
            ToolFormat::DeepseekV3,
            "<｜tool▁calls▁begin｜> is no call, {} neither",
        ),
        (ToolFormat::DeepseekV31, "{\"name\": \"add\"}"),
        (ToolFormat::Hermes, "a <tool_cal> and {\"name\": 1}"),
        (ToolFormat::Llama3Json, "Yes: {\"name\": \"add\"}"),
    ] {
        let mut text = text();
        text.set_tool_call_parser(ToolCallParser::Format(format));
        let mut thought = text.encode("hm <tool_call> {", false).unwrap();
        thought.push(id("</think>"));
        thought.extend(text.encode(words, false).unwrap());
        thought.push(id("<｜end▁of▁sentence｜>"));
        let mut state = text.chat_grammar("<think>\n", &rule).unwrap().start();
        for token in thought {
            let mut row = vec![0.0; VOCABULARY];
            state.restrict(&mut row).unwrap();
            assert!(row[token as usize].is_finite(), "{format}: {token}");
            state.take(token).unwrap();
        }
    }
}

#[test]
fn rules_that_cannot_be_enforced_are_refused_in_words() {
    let text = text();
    let message = |rule: AnswerRule| match text.plain_grammar(&rule) {
        Err(GrammarError::Invalid(message)) => message,
        other => panic!("{other:?}"),
    };
    assert!(message(content(ContentRule::Regex("(".into()))).contains("("));
    assert!(!message(content(ContentRule::Lark("start: nothing".into()))).is_empty());
    assert!(message(content(ContentRule::Regex("x".repeat(70_000)))).contains("70000 bytes"));
    let unsupported = json!({"type": "object", "if": {}, "then": {}});
    assert!(message(schema(unsupported.clone())).contains("if"));
    // Not strict: what cannot be enforced is left out.
    let lenient = content(ContentRule::JsonSchema {
        schema: unsupported,
        strict: false,
    });
    assert!(text.plain_grammar(&lenient).is_ok());
    // A regular expression whose states explode ends by fuel, not by patience.
    let bomb = content(ContentRule::Regex(
        "(a{1,900}b{1,900}){1,900}(c|d){900}".into(),
    ));
    if let Ok(grammar) = text.plain_grammar(&bomb) {
        let mut row = vec![0.0; VOCABULARY];
        let _ = grammar.start().restrict(&mut row);
    }
    let none = AnswerRule::Whole {
        content: None,
        calls: Some(CallRule {
            functions: vec![function("f", &json!({}))],
            many: false,
        }),
    };
    assert!(matches!(
        text.plain_grammar(&none),
        Err(GrammarError::Unsupported(_))
    ));
}

/// Small schemas whose values are bounded, so that every answer ends.
fn schemas() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!({"type": "boolean"})),
        Just(json!({"type": "null"})),
        (-50i64..50, 0i64..100).prop_map(
            |(low, span)| json!({"type": "integer", "minimum": low, "maximum": low + span})
        ),
        (0usize..4, 0usize..6).prop_map(
            |(low, span)| json!({"type": "string", "minLength": low, "maxLength": low + span})
        ),
        proptest::collection::btree_set("[a-zé\"]{0,5}", 1..4)
            .prop_map(|words| json!({"enum": words.into_iter().collect::<Vec<_>>()})),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        let object = proptest::collection::btree_map("[a-c]{1,2}", (inner.clone(), any::<bool>()), 0..4).prop_map(|fields| {
            let required: Vec<String> = fields.iter().filter(|(_, (_, r))| *r).map(|(name, _)| name.clone()).collect();
            let properties: serde_json::Map<String, Value> = fields.into_iter().map(|(name, (schema, _))| (name, schema)).collect();
            json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
        });
        let list = (inner.clone(), 0usize..3, 0usize..3)
            .prop_map(|(items, low, span)| json!({"type": "array", "items": items, "minItems": low, "maxItems": low + span}));
        let either = (inner.clone(), inner).prop_map(|(a, b)| json!({"anyOf": [a, b]}));
        prop_oneof![object, list, either]
    })
}

/// JSON Schema, as far as [`schemas`] uses it.
fn is_valid(value: &Value, schema: &Value) -> bool {
    let within = |count: usize, least: &str, most: &str| {
        count as u64 >= schema[least].as_u64().unwrap()
            && count as u64 <= schema[most].as_u64().unwrap()
    };
    if let Some(options) = schema["anyOf"].as_array() {
        return options.iter().any(|option| is_valid(value, option));
    }
    if let Some(options) = schema["enum"].as_array() {
        return options.contains(value);
    }
    match (schema["type"].as_str().unwrap(), value) {
        ("boolean", Value::Bool(_)) | ("null", Value::Null) => true,
        // A number without a fraction is an integer, `-0` too.
        ("integer", Value::Number(number)) => number.as_f64().is_some_and(|n| {
            n.fract() == 0.0
                && n >= schema["minimum"].as_f64().unwrap()
                && n <= schema["maximum"].as_f64().unwrap()
        }),
        ("string", Value::String(text)) => within(text.chars().count(), "minLength", "maxLength"),
        ("array", Value::Array(items)) => {
            within(items.len(), "minItems", "maxItems")
                && items.iter().all(|item| is_valid(item, &schema["items"]))
        }
        ("object", Value::Object(fields)) => {
            let required = schema["required"].as_array().unwrap();
            required
                .iter()
                .all(|name| fields.contains_key(name.as_str().unwrap()))
                && fields.iter().all(|(name, field)| {
                    schema["properties"]
                        .get(name)
                        .is_some_and(|schema| is_valid(field, schema))
                })
        }
        _ => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn answers_are_valid_under_any_schema(schema_value in schemas(), seed in any::<u64>()) {
        let answer = plain(&schema(schema_value.clone()), seed);
        let value: Value = serde_json::from_str(&answer).map_err(|error| TestCaseError::fail(format!("{error}: {answer}")))?;
        prop_assert!(is_valid(&value, &schema_value), "{answer} under {schema_value}");
    }
}
