//! Chat templates in the style of the served families' published ones, with the Jinja that those use.

#![allow(missing_docs, clippy::unwrap_used)]

mod bytes_tokenizer;

use bytes_tokenizer::files;
use engine_text::{ChatMessage, Role, Text};
use serde_json::{Map, Value, json};

/// As the R1 distills have it: the system prompt is collected first, and earlier reasoning is cut off.
const R1_DISTILL: &str = r"{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{% set ns = namespace(seen_system=false, system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' and not ns.seen_system %}
        {%- set ns.system = message['content'] %}{%- set ns.seen_system = true %}
    {%- endif %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message['content'] is not none %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<｜Assistant｜>' + content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}";

/// As Qwen3 has it: the last question is looked for from the end; reasoning before it is left out, and a flag of the
/// request turns thinking off.
const QWEN3: &str = r"{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}";

/// As Llama 3.1 has it: a head with dates, the system prompt taken out of the messages, every text trimmed.
const LLAMA3: &str = r#"{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- raise_exception("tools are for another test") }}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"#;

fn text(template: &str, bos: Value, eos: &str) -> Text {
    let mut files = files();
    files.tokenizer_config = Some(json!({"bos_token": bos, "eos_token": eos}).to_string());
    files.chat_template = Some(template.to_owned());
    Text::new(files).unwrap()
}

fn conversation() -> Vec<ChatMessage> {
    [
        (Role::System, " Be brief. "),
        (Role::User, "1+1?"),
        (Role::Assistant, "<think>\nadd\n</think>\n\n2"),
        (Role::User, "and 2+2?\n"),
    ]
    .into_iter()
    .map(|(role, content)| ChatMessage {
        role,
        content: content.to_owned(),
    })
    .collect()
}

fn variables(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

#[test]
fn the_distills_template_cuts_reasoning_and_opens_the_next() {
    let text = text(R1_DISTILL, json!({"content": "<s>"}), "</s>");
    assert_eq!(
        text.render(&conversation(), true, &Map::new()).unwrap(),
        "<s> Be brief. <｜User｜>1+1?<｜Assistant｜>\n\n2</s><｜User｜>and 2+2?\n<｜Assistant｜><think>\n"
    );
}

#[test]
fn qwens_template_leaves_old_reasoning_out_and_knows_its_flag() {
    let text = text(QWEN3, Value::Null, "<|im_end|>");
    let head = "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n\
        <|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nand 2+2?\n<|im_end|>\n<|im_start|>assistant\n";
    let render = |value| {
        text.render(&conversation(), true, &variables(value))
            .unwrap()
    };
    assert_eq!(render(json!({})), head);
    assert_eq!(render(json!({"enable_thinking": true})), head);
    let silent = render(json!({"enable_thinking": false}));
    assert_eq!(silent, format!("{head}<think>\n\n</think>\n\n"));
    // An answer after the last question keeps its reasoning.
    let continued = text
        .render(&conversation()[..3], false, &Map::new())
        .unwrap();
    assert!(
        continued.ends_with("assistant\n<think>\nadd\n</think>\n\n2<|im_end|>\n"),
        "{continued}"
    );
}

#[test]
fn llamas_template_takes_the_system_prompt_out_and_trims() {
    let text = text(LLAMA3, json!("<|begin_of_text|>"), "<|eot_id|>");
    let head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n";
    let user = |question: &str| {
        format!("<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>")
    };
    let open = "<|start_header_id|>assistant<|end_header_id|>\n\n";
    let answer = format!("{open}<think>\nadd\n</think>\n\n2<|eot_id|>");
    assert_eq!(
        text.render(&conversation(), true, &Map::new()).unwrap(),
        format!(
            "{head}Be brief.<|eot_id|>{}{answer}{}{open}",
            user("1+1?"),
            user("and 2+2?")
        )
    );
    assert_eq!(
        text.render(&conversation()[1..2], true, &Map::new())
            .unwrap(),
        format!("{head}<|eot_id|>{}{open}", user("1+1?"))
    );
}
