//! Describes tools to a model whose template does not: R1's and V3.1's templates write calls and results, but leave
//! the declarations to the system message.

use serde_json::Value;

use crate::template::{ChatMessage, Role};
use crate::tool_format::ToolFormat;

/// The conversation with the tools in its first system message, which is added when there is none.
pub(crate) fn with_described_tools(
    messages: &[ChatMessage],
    tools: &[Value],
    format: ToolFormat,
) -> Vec<ChatMessage> {
    let description = describe(tools, format);
    let mut messages = messages.to_vec();
    match messages
        .iter_mut()
        .find(|message| message.role == Role::System)
    {
        Some(system) => {
            let before = system.content.take().unwrap_or_default();
            system.content = Some(format!("{before}\n\n{description}"));
        }
        None => messages.insert(0, ChatMessage::new(Role::System, description)),
    }
    messages
}

fn describe(tools: &[Value], format: ToolFormat) -> String {
    let mut text = String::from("## Tools\nYou can call these functions:\n");
    for tool in tools {
        let function = &tool["function"];
        let name = function["name"].as_str().unwrap_or_default();
        text.push_str(&format!("\n### {name}\n"));
        if let Some(description) = function["description"].as_str() {
            text.push_str(&format!("{description}\n"));
        }
        if !function["parameters"].is_null() {
            let schema = &function["parameters"];
            text.push_str(&format!("Arguments (JSON schema): {schema}\n"));
        }
    }
    let (before, _, after) = format.section();
    let (head, tail) = format.frame("NAME");
    text.push_str(&format!(
        "\nTo call one, write exactly this, with its name and with arguments that are valid under its schema:\n\
         {before}{head}ARGUMENTS{tail}{after}\n"
    ));
    text
}
