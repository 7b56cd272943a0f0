//! Chat templates: Jinja as `transformers` runs it.
//!
//! The environment trims blocks like `transformers` does, knows Python's string methods, `raise_exception` and a
//! bounded amount of work; a template cannot read files or run code.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;
use thiserror::Error as ThisError;

/// Instructions a template may run for one prompt; R1's template needs about 20 for a message.
const FUEL: u64 = 5_000_000;
/// Bytes of a prompt; a request has at most 8 MiB, and a template writes each message about once.
const PROMPT_BYTES_MAX: usize = 64 << 20;
const NAME: &str = "chat_template";
/// Room for the deepest nesting that minijinja's recursive parser lets through (150 expressions, each of several frames).
const STACK_BYTES: usize = 32 << 20;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// The human.
    User,
    /// The model.
    Assistant,
    /// The result of a call.
    Tool,
}

/// A call that the model made earlier in a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// Ties a result to it.
    pub id: String,
    /// The function.
    pub name: String,
    /// A JSON object as text.
    pub arguments: String,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: Role,
    /// What; nothing where the model only called tools.
    pub content: Option<String>,
    /// What the model called.
    pub tool_calls: Vec<ToolCall>,
    /// Which call this is the result of.
    pub tool_call_id: Option<String>,
}

impl ChatMessage {
    /// A turn that is only text.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: Some(content.into()),
            tool_calls: Vec::new(),
            tool_call_id: None,
        }
    }

    /// The turn as templates see it. Some templates write arguments with `tojson` and want an object there, others
    /// append them as text.
    fn to_json(&self, arguments_as_object: bool) -> serde_json::Value {
        let mut message = serde_json::json!({"role": self.role, "content": self.content});
        if !self.tool_calls.is_empty() {
            let calls = self.tool_calls.iter().map(|call| {
                let text = || serde_json::Value::String(call.arguments.clone());
                let arguments = match arguments_as_object {
                    true => serde_json::from_str(&call.arguments).unwrap_or_else(|_| text()),
                    false => text(),
                };
                serde_json::json!({"id": call.id, "type": "function",
                    "function": {"name": call.name, "arguments": arguments}})
            });
            message["tool_calls"] = calls.collect();
        }
        if let Some(id) = &self.tool_call_id {
            message["tool_call_id"] = id.clone().into();
        }
        message
    }
}

/// Why a conversation has no prompt.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum TemplateError {
    /// The model has no template.
    #[error(
        "the model has no chat template (no chat_template.jinja and none in tokenizer_config.json); \
         use /v1/completions with a prompt"
    )]
    Missing,
    /// The template itself is wrong, found at load.
    #[error("the model's chat template is not valid: {0}")]
    Invalid(String),
    /// The template called `raise_exception` or does not take these messages.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
}

/// A compiled template.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    knows_tools: bool,
    arguments_as_object: bool,
}

impl ChatTemplate {
    pub(crate) fn new(
        source: String,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| TemplateError::Invalid(describe(&error)))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_filter("tojson", to_json);
        let arguments_as_object = writes_arguments_as_json(&source);
        let knows_tools = with_deep_stack(|| {
            environment
                .add_template_owned(NAME, source)
                .map_err(|error| TemplateError::Invalid(describe(&error)))?;
            // This reads the source again.
            let read = environment.get_template(NAME);
            Ok(read.is_ok_and(|template| template.undeclared_variables(false).contains("tools")))
        })?;
        Ok(Self {
            knows_tools,
            arguments_as_object,
            environment,
            bos_token,
            eos_token,
        })
    }

    /// Whether the template describes tools itself.
    pub(crate) fn knows_tools(&self) -> bool {
        self.knows_tools
    }

    /// The source, for the formats that it shows.
    pub(crate) fn source(&self) -> String {
        self.environment
            .get_template(NAME)
            .map_or(String::new(), |template| template.source().to_owned())
    }

    pub(crate) fn render(
        &self,
        messages: &[ChatMessage],
        tools: &[serde_json::Value],
        add_generation_prompt: bool,
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, TemplateError> {
        let refused = |error: Error| TemplateError::Refused(describe(&error));
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let mut context = variables.clone();
        let mut set = |name: &str, value: serde_json::Value| context.insert(name.to_owned(), value);
        let messages = messages
            .iter()
            .map(|message| message.to_json(self.arguments_as_object));
        set("messages", messages.collect());
        if !tools.is_empty() {
            set("tools", tools.into());
        }
        set("add_generation_prompt", add_generation_prompt.into());
        for (name, token) in [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
        ] {
            set(name, token.clone().unwrap_or_default().into());
        }
        let mut prompt = Prompt::default();
        let rendered = template
            .render_captured_to(Value::from(Serde(&context)), &mut prompt)
            .map(drop);
        if prompt.is_full {
            let message = format!("the prompt would have more than {PROMPT_BYTES_MAX} bytes");
            return Err(TemplateError::Refused(message));
        }
        rendered.map_err(refused)?;
        String::from_utf8(prompt.bytes).map_err(|error| TemplateError::Refused(error.to_string()))
    }
}

/// Takes what a template writes, up to a limit: fuel counts instructions, not bytes.
#[derive(Default)]
struct Prompt {
    bytes: Vec<u8>,
    is_full: bool,
}

/// Runs `task` on a stack that no template overflows.
fn with_deep_stack<T: Send>(
    task: impl FnOnce() -> Result<T, TemplateError> + Send,
) -> Result<T, TemplateError> {
    let invalid = |problem: String| TemplateError::Invalid(problem);
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, task)
            .map_err(|error| invalid(format!("no thread to read it on: {error}")))?
            .join()
            .unwrap_or_else(|_| Err(invalid("the template library panicked on it".to_owned())))
    })
}

impl std::io::Write for Prompt {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > PROMPT_BYTES_MAX {
            self.is_full = true;
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Whether a template passes `arguments` through `tojson` or goes over their items.
fn writes_arguments_as_json(source: &str) -> bool {
    let compact: String = source.split_whitespace().collect();
    compact.split("arguments").skip(1).any(|rest| {
        let rest = rest.trim_start_matches(['\'', '"', ']']);
        rest.starts_with("|tojson") || rest.starts_with("|items")
    })
}

/// Python's `json.dumps`, which templates were written against: no HTML escapes, blanks after separators.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let _indent: Option<Value> = options.get("indent")?;
    let json = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut text = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, PythonFormatter);
    json.serialize(&mut serializer)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    Ok(Value::from_safe_string(text))
}

struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

fn describe(error: &Error) -> String {
    let what = error
        .detail()
        .map_or_else(|| error.to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: Role, content: &str) -> ChatMessage {
        ChatMessage::new(role, content)
    }

    fn render(source: &str, messages: &[ChatMessage]) -> Result<String, TemplateError> {
        ChatTemplate::new(source.to_owned(), Some("<s>".into()), Some("</s>".into()))?.render(
            messages,
            &[],
            true,
            &serde_json::Map::new(),
        )
    }

    #[test]
    fn calls_and_tools_are_written_as_the_template_wants_them() {
        let mut called = ChatMessage::new(Role::Assistant, "");
        called.content = None;
        called.tool_calls.push(ToolCall {
            id: "c1".into(),
            name: "f".into(),
            arguments: r#"{"z": 1, "a": 2}"#.into(),
        });
        let mut result = ChatMessage::new(Role::Tool, "3");
        result.tool_call_id = Some("c1".into());
        let body = "{% for m in messages %}{{ m.role }}:{% if m.tool_calls %}{{ m.content is none }} {{ ARGS }}\
            {% else %}{{ m.content }} {{ m.tool_call_id }}{% endif %};{% endfor %}";
        for (arguments, shown) in [
            (
                "m.tool_calls[0]['function']['arguments'] | tojson",
                r#"{"z": 1, "a": 2}"#,
            ),
            (
                "m.tool_calls[0].function.arguments + '!'",
                r#"{"z": 1, "a": 2}!"#,
            ),
        ] {
            let source = body.replace("ARGS", arguments);
            let rendered = render(&source, &[called.clone(), result.clone()]).unwrap();
            assert_eq!(rendered, format!("assistant:True {shown};tool:3 c1;"));
        }
        let tools = [serde_json::json!({"type": "function", "function": {"name": "f"}})];
        let template = ChatTemplate::new(
            "{% for t in tools %}{{ t.function.name }}{% endfor %}".into(),
            None,
            None,
        )
        .unwrap();
        assert!(template.knows_tools());
        assert_eq!(
            template
                .render(&[], &tools, true, &serde_json::Map::new())
                .unwrap(),
            "f"
        );
    }

    #[test]
    fn python_methods_and_namespaces_work() {
        let source = "{% set ns = namespace(system='') %}{{ bos_token }}\
            {% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] + eos_token }}\
            {% else %}[{{ m.content | trim }}]{% endif %}{% endfor %}\
            {% if add_generation_prompt %}<think>\n{% endif %}";
        let messages = [
            message(Role::User, " hi "),
            message(Role::Assistant, "hm</think>ho"),
        ];
        assert_eq!(render(source, &messages).unwrap(), "<s>[hi]ho</s><think>\n");
    }

    #[test]
    fn a_refusal_carries_the_templates_own_words() {
        let source = "{{ raise_exception('roles must alternate') }}";
        let error = render(source, &[message(Role::User, "x")]).unwrap_err();
        assert!(
            error.to_string().contains("roles must alternate"),
            "{error}"
        );
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let source =
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}";
        assert!(matches!(
            render(source, &[]),
            Err(TemplateError::Refused(_))
        ));
    }

    #[test]
    fn a_prompt_without_end_is_stopped() {
        let source = "{% for a in range(9000) %}{{ messages[0].content }}{% endfor %}";
        let long = message(Role::User, &"x".repeat(8 << 10));
        let error = render(source, std::slice::from_ref(&long)).unwrap_err();
        assert!(
            error.to_string().contains("more than 67108864 bytes"),
            "{error}"
        );
        let short = message(Role::User, "x");
        assert_eq!(render(source, &[short]).unwrap().len(), 9000);
    }

    #[test]
    fn a_broken_template_is_found_at_load() {
        let error = ChatTemplate::new("{% if %}".into(), None, None).unwrap_err();
        assert!(matches!(error, TemplateError::Invalid(_)));
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        let source = "{{ messages | tojson }}";
        let rendered = render(source, &[message(Role::User, "<é>")]).unwrap();
        assert_eq!(rendered, r#"[{"role": "user", "content": "<é>"}]"#);
    }
}
