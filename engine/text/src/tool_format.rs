//! How families of models write tool calls, and how far a text that may be one has come.
//!
//! Everything here is a function of the text so far, read from its beginning, so it cannot depend on how the text was
//! cut. Formats: DeepSeek's chat templates (V3 and R1, V3.1), Qwen's and Hermes' `<tool_call>`, Llama 3's bare JSON.

use std::fmt;
use std::str::FromStr;

pub(crate) const CALLS_BEGIN: &str = "<｜tool▁calls▁begin｜>";
pub(crate) const CALLS_END: &str = "<｜tool▁calls▁end｜>";
pub(crate) const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
pub(crate) const CALL_END: &str = "<｜tool▁call▁end｜>";
/// The end of a call whose arguments stand in a fenced block.
const FENCED_CALL_END: &str = "\n```<｜tool▁call▁end｜>";
pub(crate) const SEPARATOR: &str = "<｜tool▁sep｜>";
pub(crate) const HERMES_BEGIN: &str = "<tool_call>";
pub(crate) const HERMES_END: &str = "</tool_call>";
/// Llama 3.1 puts it before a call; its tokenizer calls it special.
pub(crate) const PYTHON_TAG: &str = "<|python_tag|>";
/// Tags that must stay visible to the parser even where a tokenizer calls them special.
pub(crate) const TAGS: [&str; 8] = [
    CALLS_BEGIN,
    CALLS_END,
    CALL_BEGIN,
    CALL_END,
    SEPARATOR,
    HERMES_BEGIN,
    HERMES_END,
    PYTHON_TAG,
];
/// Longest name of a function; OpenAI's limit.
pub const TOOL_NAME_BYTES_MAX: usize = 64;

/// A way to write tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `function<｜tool▁sep｜>NAME`, then the arguments in a fenced block.
    DeepseekV3,
    /// `NAME<｜tool▁sep｜>ARGUMENTS`.
    DeepseekV31,
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`.
    Hermes,
    /// The answer is `{"name": …, "parameters": …}`, several of them separated by semicolons.
    Llama3Json,
}

impl fmt::Display for ToolFormat {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::DeepseekV3 => "deepseek_v3",
            Self::DeepseekV31 => "deepseek_v31",
            Self::Hermes => "hermes",
            Self::Llama3Json => "llama3_json",
        })
    }
}

/// `--tool-call-parser`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ToolCallParser {
    /// By the model's template and special tokens.
    #[default]
    Auto,
    /// This format, whatever the model looks like.
    Format(ToolFormat),
    /// Tools are refused.
    None,
}

impl FromStr for ToolCallParser {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "auto" => Self::Auto,
            "none" => Self::None,
            "deepseek_v3" => Self::Format(ToolFormat::DeepseekV3),
            "deepseek_v31" => Self::Format(ToolFormat::DeepseekV31),
            "hermes" => Self::Format(ToolFormat::Hermes),
            "llama3_json" => Self::Format(ToolFormat::Llama3Json),
            other => {
                return Err(format!(
                    "\"{other}\" is not one of auto, deepseek_v3, deepseek_v31, hermes, llama3_json, none"
                ));
            }
        })
    }
}

/// How far the text that may open a call has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Header {
    /// More text decides.
    Incomplete,
    /// No call.
    Malformed,
    /// A call of this function; its arguments begin at this byte, with `{`.
    Call(String, usize),
    /// An object that begins at this byte and must be seen whole, because its keys come in another order.
    Whole(usize),
}

/// How far the text after the arguments has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closing {
    Incomplete,
    Malformed,
    Done,
}

impl ToolFormat {
    /// The format of a model by its template, then by its tokens.
    pub(crate) fn detect(template: Option<&str>, has_token: impl Fn(&str) -> bool) -> Option<Self> {
        let template = template.unwrap_or_default();
        if template.contains(CALL_BEGIN) || (template.is_empty() && has_token(CALL_BEGIN)) {
            // V3.1 dropped the fence around the arguments.
            let fenced = template.is_empty() || template.contains("```json");
            return Some(match fenced {
                true => Self::DeepseekV3,
                false => Self::DeepseekV31,
            });
        }
        if template.contains(HERMES_BEGIN) || has_token(HERMES_BEGIN) {
            return Some(Self::Hermes);
        }
        if has_token(PYTHON_TAG) {
            return Some(Self::Llama3Json);
        }
        if has_token(CALL_BEGIN) {
            return Some(Self::DeepseekV3);
        }
        None
    }

    /// Tags that open a call anywhere in the content.
    pub(crate) fn openings(self) -> &'static [&'static str] {
        match self {
            Self::DeepseekV3 | Self::DeepseekV31 => &[CALLS_BEGIN, CALL_BEGIN],
            Self::Hermes => &[HERMES_BEGIN],
            Self::Llama3Json => &[PYTHON_TAG],
        }
    }

    /// The tags after which a call must follow, the last ones of [`Self::openings`].
    pub(crate) fn call_openings(self) -> &'static [&'static str] {
        match self {
            Self::DeepseekV3 | Self::DeepseekV31 => &[CALL_BEGIN],
            Self::Hermes | Self::Llama3Json => self.openings(),
        }
    }

    /// What surrounds the arguments of one call of `name` after one of [`Self::call_openings`], or where a bare bracket
    /// opens a call, in its place: before, after.
    pub(crate) fn opened_frame(self, name: &str) -> (String, String) {
        let (head, tail) = self.frame(name);
        let opening = match self {
            Self::DeepseekV3 | Self::DeepseekV31 => CALL_BEGIN,
            Self::Hermes => HERMES_BEGIN,
            Self::Llama3Json => "",
        };
        let head = head.strip_prefix(opening).unwrap_or(&head).to_owned();
        (head, tail)
    }

    /// What may stand between two calls or after the last one, besides white space.
    pub(crate) fn separators(self) -> &'static [&'static str] {
        match self {
            Self::DeepseekV3 | Self::DeepseekV31 => &[CALLS_END],
            Self::Hermes => &[],
            Self::Llama3Json => &[";"],
        }
    }

    /// Tags by which arguments end that are no JSON, longer ones first.
    pub(crate) fn end_tags(self) -> &'static [&'static str] {
        match self {
            Self::DeepseekV3 => &[FENCED_CALL_END, CALL_END],
            Self::DeepseekV31 => &[CALL_END],
            Self::Hermes => &[HERMES_END],
            Self::Llama3Json => &[],
        }
    }

    /// Whether `{` alone opens a call.
    pub(crate) fn is_bare(self) -> bool {
        self == Self::Llama3Json
    }

    pub(crate) fn header(self, text: &str) -> Header {
        let mut cursor = Cursor::new(text);
        let read = match self {
            Self::DeepseekV3 => cursor.deepseek_v3(),
            Self::DeepseekV31 => cursor.deepseek_v31(),
            Self::Hermes => cursor.tagged_json(&[HERMES_BEGIN]),
            Self::Llama3Json => cursor.tagged_json(&[PYTHON_TAG, ""]),
        };
        match read {
            Ok(header) => header,
            Err(Stop::End) => Header::Incomplete,
            Err(Stop::Mismatch) => Header::Malformed,
        }
    }

    pub(crate) fn closing(self, text: &str) -> Closing {
        let mut cursor = Cursor::new(text);
        let read = match self {
            Self::DeepseekV3 => cursor.sequence(&["```", CALL_END]),
            Self::DeepseekV31 => cursor.sequence(&[CALL_END]),
            Self::Hermes => cursor.sequence(&["}", HERMES_END]),
            Self::Llama3Json => cursor.sequence(&["}"]),
        };
        match read {
            Ok(()) => Closing::Done,
            Err(Stop::End) => Closing::Incomplete,
            Err(Stop::Mismatch) => Closing::Malformed,
        }
    }

    /// What surrounds the arguments of one call of `name`: before, after.
    pub(crate) fn frame(self, name: &str) -> (String, String) {
        match self {
            Self::DeepseekV3 => (
                format!("{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n"),
                format!("\n```{CALL_END}"),
            ),
            Self::DeepseekV31 => (
                format!("{CALL_BEGIN}{name}{SEPARATOR}"),
                CALL_END.to_owned(),
            ),
            Self::Hermes => (
                format!("{HERMES_BEGIN}\n{{\"name\": \"{name}\", \"arguments\": "),
                format!("}}\n{HERMES_END}"),
            ),
            Self::Llama3Json => (
                format!("{{\"name\": \"{name}\", \"parameters\": "),
                "}".to_owned(),
            ),
        }
    }

    /// What surrounds all calls of an answer and what separates two: before, between, after.
    pub(crate) fn section(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::DeepseekV3 => (CALLS_BEGIN, "\n", CALLS_END),
            Self::DeepseekV31 => (CALLS_BEGIN, "", CALLS_END),
            Self::Hermes => ("", "\n", ""),
            Self::Llama3Json => ("", "; ", ""),
        }
    }
}

/// Whether a function may have this name.
pub fn is_tool_name(name: &str) -> bool {
    (1..=TOOL_NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_name_byte)
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.')
}

/// An object read whole as a call: name and arguments.
pub(crate) fn read_call(object: &str) -> Option<(String, String)> {
    let value: serde_json::Value = serde_json::from_str(object).ok()?;
    let name = value
        .get("name")?
        .as_str()
        .filter(|name| is_tool_name(name))?;
    let arguments = value.get("arguments").or_else(|| value.get("parameters"));
    let arguments = match arguments {
        None | Some(serde_json::Value::Null) => "{}".to_owned(),
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(arguments @ serde_json::Value::Object(_)) => arguments.to_string(),
        Some(_) => return None,
    };
    Some((name.to_owned(), arguments))
}

enum Stop {
    /// The text ended where more could follow.
    End,
    /// The text is something else.
    Mismatch,
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn blanks(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    fn literal(&mut self, literal: &str) -> Result<(), Stop> {
        let rest = self.rest();
        if rest.starts_with(literal) {
            self.at += literal.len();
            Ok(())
        } else if literal.starts_with(rest) {
            Err(Stop::End)
        } else {
            Err(Stop::Mismatch)
        }
    }

    /// Literals with any white space before each.
    fn sequence(&mut self, literals: &[&str]) -> Result<(), Stop> {
        for literal in literals {
            self.blanks();
            self.literal(literal)?;
        }
        Ok(())
    }

    /// The name up to `end`, which is passed over.
    fn name_until(&mut self, end: &str) -> Result<String, Stop> {
        let rest = self.rest();
        let length = rest
            .bytes()
            .position(|byte| !is_name_byte(byte))
            .unwrap_or(rest.len());
        let name = rest[..length].to_owned();
        if length > TOOL_NAME_BYTES_MAX {
            return Err(Stop::Mismatch);
        }
        if length == rest.len() {
            return Err(Stop::End);
        }
        self.at += length;
        self.literal(end)?;
        match name.is_empty() {
            true => Err(Stop::Mismatch),
            false => Ok(name),
        }
    }

    fn deepseek_opening(&mut self) -> Result<(), Stop> {
        match self.literal(CALLS_BEGIN) {
            Ok(()) => self.blanks(),
            Err(Stop::End) => return Err(Stop::End),
            Err(Stop::Mismatch) => {}
        }
        self.literal(CALL_BEGIN)
    }

    fn arguments(&mut self, name: String) -> Result<Header, Stop> {
        self.blanks();
        let at = self.at;
        self.literal("{")?;
        Ok(Header::Call(name, at))
    }

    fn deepseek_v3(&mut self) -> Result<Header, Stop> {
        self.deepseek_opening()?;
        self.name_until(SEPARATOR)?; // The type of the tool; always `function` so far.
        let name = self.name_until("\n")?;
        self.sequence(&["```json"])?;
        self.arguments(name)
    }

    fn deepseek_v31(&mut self) -> Result<Header, Stop> {
        self.deepseek_opening()?;
        let name = self.name_until(SEPARATOR)?;
        self.arguments(name)
    }

    fn json_string(&mut self) -> Result<String, Stop> {
        self.literal("\"")?;
        let start = self.at - 1;
        let mut escaped = false;
        for (offset, byte) in self.rest().bytes().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    self.at += offset + 1;
                    return serde_json::from_str(&self.text[start..self.at])
                        .map_err(|_| Stop::Mismatch);
                }
                _ => {}
            }
        }
        Err(Stop::End)
    }

    /// `{"name": NAME, "arguments": {` streams; other orders of the keys are read whole.
    fn tagged_json(&mut self, tags: &[&str]) -> Result<Header, Stop> {
        let mut opened = Err(Stop::Mismatch);
        for tag in tags {
            opened = self.literal(tag);
            if !matches!(opened, Err(Stop::Mismatch)) {
                break;
            }
        }
        opened?;
        self.blanks();
        let object = self.at;
        self.sequence(&["{"])?;
        self.blanks();
        if self.json_string()? != "name" {
            return Ok(Header::Whole(object));
        }
        self.sequence(&[":"])?;
        self.blanks();
        let name = self.json_string()?;
        if !is_tool_name(&name) {
            return Err(Stop::Mismatch);
        }
        self.blanks();
        match self.literal(",") {
            Ok(()) => {}
            Err(Stop::End) => return Err(Stop::End),
            Err(Stop::Mismatch) => return Ok(Header::Whole(object)),
        }
        self.blanks();
        let key = self.json_string()?;
        self.sequence(&[":"])?;
        self.blanks();
        if self.rest().is_empty() {
            return Err(Stop::End);
        }
        let streams =
            matches!(key.as_str(), "arguments" | "parameters") && self.rest().starts_with('{');
        Ok(match streams {
            true => Header::Call(name, self.at),
            false => Header::Whole(object),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_decided_as_soon_as_they_can_be() {
        use ToolFormat::{DeepseekV3, DeepseekV31, Hermes, Llama3Json};
        let call = |name: &str, at| Header::Call(name.to_owned(), at);
        let v3 = format!("{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}f\n```json\n{{");
        let v31 = format!("{CALL_BEGIN}f{SEPARATOR}{{");
        for (format, text, expected) in [
            (DeepseekV3, v3.as_str(), call("f", v3.len() - 1)),
            (DeepseekV31, v31.as_str(), call("f", v31.len() - 1)),
            (
                Hermes,
                "<tool_call>\n{\"name\": \"f\", \"arguments\": {",
                call("f", 39),
            ),
            (
                Llama3Json,
                "{\"name\": \"f\", \"parameters\": {",
                call("f", 28),
            ),
            (Hermes, "<tool_call>{\"arguments\"", Header::Whole(11)),
            (Hermes, "<tool_call>{\"name\": \"f\"}", Header::Whole(11)),
            (Hermes, "<tool_call>{\"name\": \"a b\"", Header::Malformed),
            (Hermes, "<tool_call>no", Header::Malformed),
            (Llama3Json, "{1", Header::Malformed),
        ] {
            assert_eq!(format.header(text), expected, "{text}");
            if let Header::Call(..) = expected {
                for (cut, _) in text.char_indices().skip(1) {
                    assert_eq!(
                        format.header(&text[..cut]),
                        Header::Incomplete,
                        "{}",
                        &text[..cut]
                    );
                }
            }
        }
    }

    #[test]
    fn the_template_tells_the_format() {
        let none = |_: &str| false;
        let detect = |template: &str| ToolFormat::detect(Some(template), none);
        assert_eq!(
            detect("<｜tool▁call▁begin｜> ```json"),
            Some(ToolFormat::DeepseekV3)
        );
        assert_eq!(
            detect("<｜tool▁call▁begin｜>"),
            Some(ToolFormat::DeepseekV31)
        );
        assert_eq!(detect("<tool_call>"), Some(ToolFormat::Hermes));
        assert_eq!(detect("plain"), None);
        assert_eq!(
            ToolFormat::detect(Some("plain"), |token| token == PYTHON_TAG),
            Some(ToolFormat::Llama3Json)
        );
        assert_eq!(
            "hermes".parse(),
            Ok(ToolCallParser::Format(ToolFormat::Hermes))
        );
        assert!(
            "x".parse::<ToolCallParser>()
                .unwrap_err()
                .contains("one of auto")
        );
    }

    #[test]
    fn a_whole_object_is_read_in_any_order_of_keys() {
        let read = |text: &str| read_call(text);
        let pair = |n: &str, a: &str| Some((n.to_owned(), a.to_owned()));
        assert_eq!(
            read(r#"{"arguments":{"a":1},"name":"f"}"#),
            pair("f", r#"{"a":1}"#)
        );
        assert_eq!(read(r#"{"name":"f","arguments":"{}"}"#), pair("f", "{}"));
        assert_eq!(read(r#"{"name":"f"}"#), pair("f", "{}"));
        assert_eq!(read(r#"{"name":"f","arguments":7}"#), None);
        assert_eq!(read(r#"{"name":7}"#), None);
    }
}
