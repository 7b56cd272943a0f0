//! The tools of a request and which of them the answer may call.

use engine_text::{AllowedCalls, TOOL_NAME_BYTES_MAX, is_tool_name};
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::{Fields, show, wrong};

/// Functions that a request may declare; OpenAI's limit.
const TOOLS_MAX: usize = 128;
/// Bytes of a schema.
pub const SCHEMA_BYTES_MAX: usize = 64 << 10;
/// Objects and lists inside each other in a schema.
pub const SCHEMA_DEPTH_MAX: usize = 32;

/// `tool_choice`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// No calls; the tools are not even shown to the model.
    #[default]
    None,
    /// The model decides.
    Auto,
    /// At least one call.
    Required,
    /// One call of this function.
    Named(String),
}

/// `tools`, `tool_choice` and `parallel_tool_calls`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tools {
    /// In OpenAI's shape, as a template takes them.
    pub declared: Vec<Value>,
    pub choice: ToolChoice,
    pub parallel: bool,
}

impl Tools {
    /// Checks the fields of a chat request.
    ///
    /// # Errors
    /// Names the first one that is wrong.
    pub fn parse(fields: &Fields) -> Result<Self, ApiError> {
        let declared = match fields.list("tools")? {
            None => Vec::new(),
            Some(list) if list.len() > TOOLS_MAX => {
                let message = format!(
                    "tools has {} entries, but at most {TOOLS_MAX} are taken",
                    list.len()
                );
                return Err(ApiError::invalid("tools", message));
            }
            Some(list) => list
                .iter()
                .enumerate()
                .map(|(index, tool)| declaration(tool, &format!("tools[{index}]")))
                .collect::<Result<Vec<_>, _>>()?,
        };
        let choice = choice(fields, &declared)?;
        let parallel = match fields.get("parallel_tool_calls") {
            None => true,
            Some(_) => fields.flag("parallel_tool_calls")?,
        };
        Ok(Self {
            declared,
            choice,
            parallel,
        })
    }

    /// The tools that the model is shown.
    pub fn shown(&self) -> &[Value] {
        match self.choice {
            ToolChoice::None => &[],
            _ => &self.declared,
        }
    }

    /// How many calls the answer may hold.
    pub fn allowed(&self) -> AllowedCalls {
        match (&self.choice, self.parallel) {
            (ToolChoice::None, _) => AllowedCalls::None,
            (ToolChoice::Named(_), _) | (_, false) => AllowedCalls::One,
            (_, true) => AllowedCalls::Many,
        }
    }
}

/// The name in a declaration that was checked.
pub fn name_of(tool: &Value) -> &str {
    tool["function"]["name"].as_str().unwrap_or_default()
}

/// One declaration, checked; what templates and grammars do not know is left out.
fn declaration(tool: &Value, at: &str) -> Result<Value, ApiError> {
    match &tool["type"] {
        Value::String(kind) if kind == "function" => {}
        Value::String(kind) => {
            let message = format!(
                "{at}.type is \"{kind}\", but this engine runs no tools itself; declare it as a function"
            );
            return Err(ApiError::unsupported(format!("{at}.type"), message));
        }
        other => return Err(wrong(&format!("{at}.type"), other, "\"function\"")),
    }
    let at = format!("{at}.function");
    let function = tool["function"]
        .as_object()
        .ok_or_else(|| wrong(&at, &tool["function"], "an object with name and parameters"))?;
    let field = |key: &str| function.get(key).filter(|value| !value.is_null());
    let name = function.get("name").unwrap_or(&Value::Null);
    if !name.as_str().is_some_and(is_tool_name) {
        let expected =
            format!("1 to {TOOL_NAME_BYTES_MAX} letters, digits, underscores, dashes or dots");
        return Err(wrong(&format!("{at}.name"), name, &expected));
    }
    let mut checked = Map::new();
    checked.insert("name".into(), name.clone());
    if let Some(description) = field("description") {
        if !description.is_string() {
            return Err(wrong(&format!("{at}.description"), description, "a string"));
        }
        checked.insert("description".into(), description.clone());
    }
    let parameters = match field("parameters") {
        None => json!({"type": "object", "properties": {}}),
        Some(parameters) => {
            check_schema(parameters, &format!("{at}.parameters"))?;
            parameters.clone()
        }
    };
    checked.insert("parameters".into(), parameters);
    if let Some(strict) = field("strict") {
        if !strict.is_boolean() {
            return Err(wrong(&format!("{at}.strict"), strict, "true or false"));
        }
        checked.insert("strict".into(), strict.clone());
    }
    Ok(json!({"type": "function", "function": checked}))
}

/// A schema is an object within limits of size and depth; what it says is checked where it is used.
///
/// # Errors
/// Names what is too large.
pub fn check_schema(schema: &Value, name: &str) -> Result<(), ApiError> {
    if !schema.is_object() {
        return Err(wrong(name, schema, "an object, a JSON schema"));
    }
    let bytes = schema.to_string().len();
    if bytes > SCHEMA_BYTES_MAX {
        let message = format!(
            "{name} has {bytes} bytes, but at most {SCHEMA_BYTES_MAX} are taken; shorten it"
        );
        return Err(ApiError::invalid(name, message));
    }
    if depth(schema) > SCHEMA_DEPTH_MAX {
        let message = format!(
            "{name} is deeper than {SCHEMA_DEPTH_MAX} objects and lists; flatten it, for example with $defs"
        );
        return Err(ApiError::invalid(name, message));
    }
    Ok(())
}

/// Bounded by the JSON parser's own limit of 128.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

fn choice(fields: &Fields, declared: &[Value]) -> Result<ToolChoice, ApiError> {
    let expected = "none, auto, required or {\"type\": \"function\", \"function\": {\"name\": …}}";
    let choice = match fields.get("tool_choice") {
        None if declared.is_empty() => ToolChoice::None,
        None => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" if declared.is_empty() => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => return Err(wrong("tool_choice", &word.clone().into(), expected)),
        },
        Some(value) if value["type"] == "function" => {
            let name = value["function"]["name"].as_str().ok_or_else(|| {
                wrong(
                    "tool_choice.function.name",
                    &value["function"]["name"],
                    "a string",
                )
            })?;
            if !declared.iter().any(|tool| name_of(tool) == name) {
                let names: Vec<&str> = declared.iter().map(name_of).collect();
                let message = format!(
                    "tool_choice.function.name is {}, but tools declares {}",
                    show(&name.into()),
                    if names.is_empty() {
                        "nothing".to_owned()
                    } else {
                        names.join(", ")
                    }
                );
                return Err(ApiError::invalid("tool_choice", message));
            }
            ToolChoice::Named(name.to_owned())
        }
        Some(value) => return Err(wrong("tool_choice", value, expected)),
    };
    if choice == ToolChoice::Required && declared.is_empty() {
        let message = "tool_choice is \"required\", but tools declares nothing; declare a function";
        return Err(ApiError::invalid("tool_choice", message));
    }
    Ok(choice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &Value) -> Result<Tools, ApiError> {
        Tools::parse(&Fields::parse(body.to_string().as_bytes()).unwrap())
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name}})
    }

    #[test]
    fn the_choice_follows_the_tools_unless_it_is_said() {
        let choice = |body: Value| parse(&body).unwrap().choice;
        assert_eq!(choice(json!({})), ToolChoice::None);
        assert_eq!(
            choice(json!({"tools": [], "tool_choice": "auto"})),
            ToolChoice::None
        );
        assert_eq!(choice(json!({"tools": [tool("f")]})), ToolChoice::Auto);
        assert_eq!(
            choice(json!({"tools": [tool("f")], "tool_choice": tool("f")})),
            ToolChoice::Named("f".into())
        );
        let none = parse(&json!({"tools": [tool("f")], "tool_choice": "none"})).unwrap();
        assert!(none.shown().is_empty());
        let one = parse(&json!({"tools": [tool("f")], "parallel_tool_calls": false})).unwrap();
        assert_eq!(one.allowed(), AllowedCalls::One);
        assert_eq!(one.declared[0]["function"]["parameters"]["type"], "object");
    }

    #[test]
    fn what_is_wrong_with_a_tool_is_named() {
        let mut deep = json!({});
        for _ in 0..40 {
            deep = json!({"properties": deep});
        }
        let with = |key: &str, value: Value| {
            let mut tool = tool("f");
            tool["function"][key] = value;
            json!({"tools": [tool]})
        };
        for (body, param, part) in [
            (json!({"tools": "f"}), "tools", "must be a list"),
            (
                json!({"tools": vec![tool("f"); 129]}),
                "tools",
                "at most 128",
            ),
            (
                json!({"tools": [{"type": "web_search"}]}),
                "tools[0].type",
                "declare it as a function",
            ),
            (
                json!({"tools": [{"type": "function"}]}),
                "tools[0].function",
                "an object",
            ),
            (
                json!({"tools": [tool("a b")]}),
                "tools[0].function.name",
                "\"a b\"",
            ),
            (
                with("parameters", json!([])),
                "tools[0].function.parameters",
                "a JSON schema",
            ),
            (
                with("parameters", deep),
                "tools[0].function.parameters",
                "deeper than 32",
            ),
            (
                with("parameters", json!({"description": "x".repeat(70_000)})),
                "tools[0].function.parameters",
                "at most 65536",
            ),
            (
                json!({"tool_choice": "required"}),
                "tool_choice",
                "declares nothing",
            ),
            (
                json!({"tool_choice": "maybe"}),
                "tool_choice",
                "must be none, auto",
            ),
            (
                json!({"tools": [tool("f"), tool("h")], "tool_choice": tool("g")}),
                "tool_choice",
                "declares f, h",
            ),
        ] {
            let error = parse(&body).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{}", error.message);
            assert!(error.message.contains(part), "{}", error.message);
        }
    }
}
