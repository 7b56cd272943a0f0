use super::*;
use crate::tool_format::{
    CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, HERMES_BEGIN, HERMES_END, PYTHON_TAG, SEPARATOR,
};
use proptest::prelude::*;

const FORMATS: [ToolFormat; 4] = [
    ToolFormat::DeepseekV3,
    ToolFormat::DeepseekV31,
    ToolFormat::Hermes,
    ToolFormat::Llama3Json,
];

type Calls = Vec<(String, String)>;

fn run_with(mut parser: ToolParser, chunks: &[&str]) -> (String, Calls) {
    let (mut content, mut calls) = (String::new(), Calls::new());
    let mut take = |deltas: Vec<CallDelta>| {
        for delta in deltas {
            if let Some(name) = delta.name {
                assert_eq!(delta.index, calls.len(), "names come once and in order");
                calls.push((name, String::new()));
            }
            calls[delta.index].1.push_str(&delta.arguments);
        }
    };
    for chunk in chunks {
        let mut deltas = Vec::new();
        parser.push(chunk, &mut content, &mut deltas);
        take(deltas);
    }
    let mut deltas = Vec::new();
    parser.finish(&mut content, &mut deltas);
    take(deltas);
    assert_eq!(parser.calls(), calls.len());
    (content, calls)
}

fn run(format: ToolFormat, text: &str) -> (String, Calls) {
    run_with(ToolParser::new(format, true), &[text])
}

/// An answer with these calls as the family writes it.
fn answer(format: ToolFormat, calls: &[(&str, &str)]) -> String {
    let (before, between, after) = format.section();
    let calls: Vec<String> = calls
        .iter()
        .map(|(name, arguments)| {
            let (head, tail) = format.frame(name);
            format!("{head}{arguments}{tail}")
        })
        .collect();
    format!("{before}{}{after}", calls.join(between))
}

fn owned(calls: &[(&str, &str)]) -> Calls {
    calls
        .iter()
        .map(|(n, a)| ((*n).to_owned(), (*a).to_owned()))
        .collect()
}

#[test]
fn calls_of_each_family_are_read() {
    let calls = [
        (
            "weather",
            r#"{"city": "Tromsø", "days": [1, 2], "note": "}\"<"}"#,
        ),
        ("now", "{}"),
    ];
    for format in FORMATS {
        assert_eq!(
            run(format, &answer(format, &calls)),
            (String::new(), owned(&calls)),
            "{format}"
        );
        if !format.is_bare() {
            let text = format!("Let me look.\n{}", answer(format, &calls));
            assert_eq!(
                run(format, &text),
                ("Let me look.\n".to_owned(), owned(&calls))
            );
        }
    }
}

#[test]
fn what_is_no_call_is_content() {
    use ToolFormat::{DeepseekV3, DeepseekV31, Hermes, Llama3Json};
    for (format, text) in [
        (Hermes, "<tool_call> none".to_owned()),
        (
            Hermes,
            "<tool_call>{\"name\": \"f\", \"arguments\"".to_owned(),
        ),
        (
            Hermes,
            "<tool_call>{\"arguments\": {}, \"name\": \"two words\"}\n</tool_call>".to_owned(),
        ),
        (Hermes, "a < b and <tool".to_owned()),
        (Hermes, format!("<tool_call>{}", " ".repeat(2000))),
        (DeepseekV3, format!("{CALLS_BEGIN}{CALLS_END}")),
        (
            DeepseekV3,
            format!("{CALL_BEGIN}function{SEPARATOR}f\n{{}}{CALL_END}"),
        ),
        (
            DeepseekV31,
            format!("{CALL_BEGIN}{SEPARATOR}{{}}{CALL_END}"),
        ),
        (Llama3Json, "  {\"answer\": 42}".to_owned()),
        (Llama3Json, "plain".to_owned()),
        (Llama3Json, format!("{PYTHON_TAG}print(1)")),
    ] {
        assert_eq!(run(format, &text), (text.clone(), Calls::new()), "{format}");
    }
}

#[test]
fn a_second_opening_inside_a_malformed_call_is_a_call() {
    let good = answer(ToolFormat::Hermes, &[("f", "{}")]);
    let text = format!("<tool_call>oops {good}");
    assert_eq!(
        run(ToolFormat::Hermes, &text),
        ("<tool_call>oops ".to_owned(), owned(&[("f", "{}")]))
    );
}

#[test]
fn keys_in_another_order_and_a_missing_end_are_understood() {
    let text = "<tool_call>{\"arguments\": {\"a\": 1}, \"name\": \"f\"}\n</tool_call>";
    assert_eq!(
        run(ToolFormat::Hermes, text).1,
        owned(&[("f", "{\"a\":1}")])
    );
    let text = "<tool_call>{\"name\": \"f\"}";
    assert_eq!(
        run(ToolFormat::Hermes, text),
        (String::new(), owned(&[("f", "{}")]))
    );
    let text = "{\"name\": \"f\", \"parameters\": {\"a\": 1}";
    assert_eq!(
        run(ToolFormat::Llama3Json, text).1,
        owned(&[("f", "{\"a\": 1}")])
    );
}

#[test]
fn arguments_that_are_no_json_stay_with_their_call() {
    let text = format!("{CALL_BEGIN}f{SEPARATOR}{{\"a\": é}}{CALL_END} more");
    assert_eq!(
        run(ToolFormat::DeepseekV31, &text),
        (" more".to_owned(), owned(&[("f", "{\"a\": é}")]))
    );
    let (head, tail) = ToolFormat::DeepseekV3.frame("f");
    let text = format!("{head}{{'a': 1}}\n\n{tail} more");
    assert_eq!(
        run(ToolFormat::DeepseekV3, &text),
        (" more".to_owned(), owned(&[("f", "{'a': 1}\n\n")]))
    );
    // Cut off by max_tokens.
    let text = format!("{CALL_BEGIN}f{SEPARATOR}{{\"a\": \"b");
    assert_eq!(
        run(ToolFormat::DeepseekV31, &text).1,
        owned(&[("f", "{\"a\": \"b")])
    );
}

#[test]
fn without_parallel_calls_the_first_one_ends_the_answer() {
    let text = answer(ToolFormat::Hermes, &[("f", "{}"), ("g", "{}")]);
    let mut parser = ToolParser::new(ToolFormat::Hermes, false);
    let (mut content, mut calls) = (String::new(), Vec::new());
    assert!(parser.push(&text, &mut content, &mut calls));
    parser.finish(&mut content, &mut calls);
    assert_eq!((content.as_str(), calls.len()), ("", 1));
}

#[test]
fn a_call_without_its_end_tag_still_is_the_last_one_that_is_allowed() {
    let text = "<tool_call>{\"name\": \"f\"}<tool_call>{\"name\": \"g\"}";
    let one = ToolParser::new(ToolFormat::Hermes, false);
    assert_eq!(
        run_with(one, &[text]),
        (String::new(), owned(&[("f", "{}")]))
    );
    let both = owned(&[("f", "{}"), ("g", "{}")]);
    assert_eq!(run(ToolFormat::Hermes, text), (String::new(), both));
    for format in [ToolFormat::Hermes, ToolFormat::Llama3Json] {
        let (head, _) = format.frame("f");
        let text = format!("{head}{{\"a\": 1}}}} and so on");
        let found = run(format, &text);
        assert_eq!(
            found,
            (" and so on".to_owned(), owned(&[("f", "{\"a\": 1}")])),
            "{format}"
        );
    }
}

#[test]
fn without_tools_everything_is_content() {
    let text = answer(ToolFormat::Hermes, &[("f", "{}")]);
    assert_eq!(
        run_with(ToolParser::off(), &[&text]),
        (text.clone(), Calls::new())
    );
}

fn pieces() -> impl Strategy<Value = Vec<&'static str>> {
    proptest::collection::vec(
        prop_oneof![
            Just(CALLS_BEGIN),
            Just(CALLS_END),
            Just(CALL_BEGIN),
            Just(CALL_END),
            Just(SEPARATOR),
            Just(HERMES_BEGIN),
            Just(HERMES_END),
            Just(PYTHON_TAG),
            Just("function"),
            Just("f"),
            Just("\n```json\n"),
            Just("\n```"),
            Just("{\"name\": \"f\", \"arguments\": "),
            Just("{\"name\": \"f\", \"parameters\": "),
            Just("{\"arguments\": {\"a\": [1]}, \"name\": \"g\"}"),
            Just("{\"a\": \"é}\\\"\"}"),
            Just("{}"),
            Just("{"),
            Just("}"),
            Just("\""),
            Just("\n"),
            Just(" "),
            Just(";"),
            Just("<"),
            Just("é"),
            Just("<tool"),
            Just("<｜tool▁call"),
        ],
        0..16,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_cut_gives_the_same_calls_and_content(
        parts in pieces(),
        format in 0usize..4,
        parallel in any::<bool>(),
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..8),
    ) {
        let text = parts.concat();
        let parser = ToolParser::new(FORMATS[format], parallel);
        let boundaries: Vec<usize> = text.char_indices().map(|c| c.0).chain([text.len()]).collect();
        let mut points: Vec<usize> = cuts.iter().map(|cut| boundaries[cut.index(boundaries.len())]).collect();
        points.extend([0, text.len()]);
        points.sort_unstable();
        let chunks: Vec<&str> = points.windows(2).map(|w| &text[w[0]..w[1]]).collect();
        prop_assert_eq!(run_with(parser.clone(), &chunks), run_with(parser, &[&text]));
    }

    #[test]
    fn what_holds_no_call_comes_out_unchanged(parts in pieces(), format in 0usize..4) {
        let text = parts.concat();
        let (content, calls) = run(FORMATS[format], &text);
        if calls.is_empty() {
            prop_assert_eq!(content, text);
        } else {
            // Names and arguments are in the text, and content only loses what surrounds a call.
            for (name, _) in &calls {
                prop_assert!(text.contains(name.as_str()));
            }
            prop_assert!(content.len() < text.len());
        }
    }
}
