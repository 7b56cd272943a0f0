//! What the answer must be: OpenAI's `response_format`, vLLM's `structured_outputs`, and calls that are forced.

use engine_text::{AnswerRule, CallRule, CallableFunction, ContentRule, GRAMMAR_BYTES_MAX};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::tools::{ToolChoice, Tools, check_schema, name_of};

/// Texts to choose from.
const CHOICES_MAX: usize = 1024;

/// The names that vLLM used before `structured_outputs`; ignoring them would answer without the wanted form.
const FORMER: [&str; 5] = [
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structural_tag",
];

/// A rule and the field that asked for it, for errors.
#[derive(Clone, Debug, PartialEq)]
pub struct Format {
    pub field: &'static str,
    pub rule: ContentRule,
}

impl Format {
    /// Reads `response_format` or `structured_outputs`, of which only one may be given.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn parse(fields: &Fields) -> Result<Option<Self>, ApiError> {
        for name in FORMER {
            if let Some(value) = fields.get(name) {
                let message = format!(
                    "{name} is {}, but this engine takes structured_outputs with json, regex, choice or grammar instead",
                    crate::fields::show(value)
                );
                return Err(ApiError::unsupported(name, message));
            }
        }
        match (response_format(fields)?, structured_outputs(fields)?) {
            (Some(_), Some(_)) => Err(ApiError::invalid(
                "structured_outputs",
                "structured_outputs and response_format are both given; leave one out",
            )),
            (Some(rule), None) => Ok(Some(Self {
                field: "response_format",
                rule,
            })),
            (None, rule) => Ok(rule.map(|rule| Self {
                field: "structured_outputs",
                rule,
            })),
        }
    }
}

/// What an answer must be altogether, and the field to name when that cannot be done.
pub fn answer_rule(format: Option<Format>, tools: &Tools) -> Option<(AnswerRule, &'static str)> {
    let is_strict = |tool: &Value| tool["function"]["strict"] == true;
    let functions = |chosen: &dyn Fn(&str) -> bool| {
        let tools = tools.declared.iter().filter(|tool| chosen(name_of(tool)));
        tools
            .map(|tool| CallableFunction {
                name: name_of(tool).to_owned(),
                schema: tool["function"]["parameters"].clone(),
                strict: is_strict(tool),
            })
            .collect()
    };
    let many = tools.parallel;
    let calls = match &tools.choice {
        ToolChoice::Required => Some(CallRule {
            functions: functions(&|_| true),
            many,
        }),
        ToolChoice::Named(name) => Some(CallRule {
            functions: functions(&|other| other == name),
            many: false,
        }),
        // Free to call or to answer, but an answer has the form that was asked for.
        ToolChoice::Auto if format.is_some() => Some(CallRule {
            functions: functions(&|_| true),
            many,
        }),
        ToolChoice::Auto | ToolChoice::None => None,
    };
    // Calls of strict functions are valid even where the model is free to make none.
    if format.is_none() && tools.choice == ToolChoice::Auto && tools.declared.iter().any(is_strict)
    {
        let mut functions: Vec<CallableFunction> = functions(&|_| true);
        for function in functions.iter_mut().filter(|function| !function.strict) {
            // Nothing was promised for these.
            function.schema = json!({"type": "object"});
        }
        return Some((
            AnswerRule::FreeWithCalls(CallRule { functions, many }),
            "tools",
        ));
    }
    let is_forced = matches!(tools.choice, ToolChoice::Required | ToolChoice::Named(_));
    match (format, calls) {
        (None, None) => None,
        (format, Some(calls)) if is_forced || format.is_none() => Some((
            AnswerRule::Whole {
                content: None,
                calls: Some(calls),
            },
            "tools",
        )),
        (Some(format), calls) => Some((
            AnswerRule::Whole {
                content: Some(format.rule),
                calls,
            },
            format.field,
        )),
        (None, Some(_)) => None,
    }
}

fn response_format(fields: &Fields) -> Result<Option<ContentRule>, ApiError> {
    let Some(format) = fields.get("response_format") else {
        return Ok(None);
    };
    let expected = "an object with type text, json_object or json_schema";
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(ContentRule::JsonObject)),
        Some("json_schema") => {
            let name = "response_format.json_schema";
            let wrapped = &format["json_schema"];
            if !wrapped.is_object() {
                return Err(wrong(name, wrapped, "an object with name and schema"));
            }
            if !wrapped["name"].is_string() {
                return Err(wrong(&format!("{name}.name"), &wrapped["name"], "a string"));
            }
            let schema = &wrapped["schema"];
            check_schema(schema, &format!("{name}.schema"))?;
            let strict = match &wrapped["strict"] {
                Value::Null => false,
                Value::Bool(strict) => *strict,
                other => return Err(wrong(&format!("{name}.strict"), other, "true or false")),
            };
            Ok(Some(ContentRule::JsonSchema {
                schema: schema.clone(),
                strict,
            }))
        }
        _ if format.is_object() => Err(wrong("response_format.type", &format["type"], expected)),
        _ => Err(wrong("response_format", format, expected)),
    }
}

fn structured_outputs(fields: &Fields) -> Result<Option<ContentRule>, ApiError> {
    let name = "structured_outputs";
    let Some(object) = fields.object(name)? else {
        return Ok(None);
    };
    let mut given = object.iter().filter(|(_, value)| !value.is_null());
    let Some((kind, value)) = given.next() else {
        return Ok(None);
    };
    if let Some((second, _)) = given.next() {
        let message = format!(
            "{name} has {kind} and {second}, but must have one of json, regex, choice, grammar"
        );
        return Err(ApiError::invalid(name, message));
    }
    let at = format!("{name}.{kind}");
    let text = || {
        let text = value
            .as_str()
            .ok_or_else(|| wrong(&at, value, "a string"))?;
        match (1..=GRAMMAR_BYTES_MAX).contains(&text.len()) {
            true => Ok(text.to_owned()),
            false => {
                let message = format!(
                    "{at} has {} bytes, but must have 1 to {GRAMMAR_BYTES_MAX}",
                    text.len()
                );
                Err(ApiError::invalid(at.clone(), message))
            }
        }
    };
    match kind.as_str() {
        "json" => {
            // vLLM's clients send an object or its text.
            let schema = match value {
                Value::String(text) => {
                    serde_json::from_str(text).map_err(|_| wrong(&at, value, "a JSON schema"))?
                }
                other => other.clone(),
            };
            check_schema(&schema, &at)?;
            Ok(Some(ContentRule::JsonSchema {
                schema,
                strict: true,
            }))
        }
        "json_object" => match value {
            Value::Bool(true) => Ok(Some(ContentRule::JsonObject)),
            Value::Bool(false) => Ok(None),
            other => Err(wrong(&at, other, "true or false")),
        },
        "regex" => Ok(Some(ContentRule::Regex(text()?))),
        "grammar" => Ok(Some(ContentRule::Lark(text()?))),
        "choice" => {
            let expected = format!("a list of 1 to {CHOICES_MAX} strings that are not empty");
            let choices: Option<Vec<String>> = value.as_array().and_then(|list| {
                list.iter()
                    .map(|item| {
                        item.as_str()
                            .filter(|text| !text.is_empty())
                            .map(str::to_owned)
                    })
                    .collect()
            });
            choices
                .filter(|choices| (1..=CHOICES_MAX).contains(&choices.len()))
                .map(|choices| Some(ContentRule::Choice(choices)))
                .ok_or_else(|| wrong(&at, value, &expected))
        }
        _ => {
            let message = format!("{at} is set, but {name} takes json, regex, choice or grammar");
            Err(ApiError::unsupported(at, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: Value) -> Result<Option<Format>, ApiError> {
        Format::parse(&Fields::parse(body.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn each_form_is_read() {
        let rule = |body: Value| parse(body).unwrap().map(|format| format.rule);
        let schema = json!({"type": "object"});
        let strict = |strict| {
            Some(ContentRule::JsonSchema {
                schema: json!({"type": "object"}),
                strict,
            })
        };
        assert_eq!(rule(json!({})), None);
        assert_eq!(rule(json!({"response_format": {"type": "text"}})), None);
        assert_eq!(
            rule(json!({"response_format": {"type": "json_object"}})),
            Some(ContentRule::JsonObject)
        );
        let named = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}});
        assert_eq!(rule(json!({"response_format": named})), strict(true));
        assert_eq!(
            rule(json!({"structured_outputs": {"json": schema}})),
            strict(true)
        );
        assert_eq!(
            rule(json!({"structured_outputs": {"json": schema.to_string(), "regex": null}})),
            strict(true)
        );
        assert_eq!(
            rule(json!({"structured_outputs": {"choice": ["a"]}})),
            Some(ContentRule::Choice(vec!["a".into()]))
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let long = "x".repeat(GRAMMAR_BYTES_MAX + 1);
        for (body, param) in [
            (json!({"response_format": "json"}), "response_format"),
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format.type",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format.json_schema",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
                "response_format.json_schema.name",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": 7}}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}),
                "structured_outputs",
            ),
            (
                json!({"structured_outputs": {"regex": long}}),
                "structured_outputs.regex",
            ),
            (
                json!({"structured_outputs": {"choice": []}}),
                "structured_outputs.choice",
            ),
            (
                json!({"structured_outputs": {"magic": 1}}),
                "structured_outputs.magic",
            ),
            (json!({"guided_json": {}}), "guided_json"),
            (
                json!({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}),
                "structured_outputs",
            ),
        ] {
            assert_eq!(
                parse(body.clone()).unwrap_err().param.as_deref(),
                Some(param),
                "{body}"
            );
        }
    }
}
