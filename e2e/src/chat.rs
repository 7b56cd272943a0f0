//! Asking a model over the OpenAI API, as a client that retries would.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What the model wrote before the answer.
    pub reasoning: String,
    /// Text after the reasoning.
    pub content: String,
    /// `stop`, `length`, …
    pub finish_reason: String,
}

impl Answer {
    /// The number inside `\boxed{…}`.
    pub fn boxed(&self) -> Option<&str> {
        let (_, rest) = self.content.split_once("\\boxed{")?;
        Some(rest.split_once('}')?.0)
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(120)))
        .timeout_connect(Some(Duration::from_secs(5)))
        .http_status_as_error(false)
        .build()
        .into()
}

/// One streamed chat completion with greedy decoding; no retry.
///
/// # Errors
/// When the request is refused, the stream breaks, or it ends without `[DONE]`.
pub fn ask(base_url: &str, model: &str, question: &str) -> Result<Answer> {
    let body = json!({
        "model": model, "stream": true, "temperature": 0, "max_tokens": 400,
        "messages": [{"role": "user", "content": question}],
    });
    let mut response = agent()
        .post(format!("{base_url}/chat/completions"))
        .header("content-type", "application/json")
        .send(body.to_string())
        .context("the request did not go through")?;
    if response.status() != 200 {
        let text = response.body_mut().read_to_string().unwrap_or_default();
        bail!("status {}: {text}", response.status());
    }
    let mut answer = Answer {
        reasoning: String::new(),
        content: String::new(),
        finish_reason: String::new(),
    };
    for line in BufReader::new(response.body_mut().as_reader()).lines() {
        let line = line.context("the stream broke")?;
        let Some(data) = line.strip_prefix("data: ") else {
            continue;
        };
        if data == "[DONE]" {
            return Ok(answer);
        }
        let event: Value = serde_json::from_str(data).context("an event is not JSON")?;
        if let Some(error) = event.get("error") {
            bail!("the stream reported {error}");
        }
        let choice = &event["choices"][0];
        answer.reasoning += choice["delta"]["reasoning_content"]
            .as_str()
            .unwrap_or_default();
        answer.content += choice["delta"]["content"].as_str().unwrap_or_default();
        if let Some(reason) = choice["finish_reason"].as_str() {
            answer.finish_reason = reason.into();
        }
    }
    bail!("the stream ended without [DONE] after {:?}", answer.content)
}

/// GET of a path on an engine: status and body.
///
/// # Errors
/// When nothing answers.
pub fn get(url: &str) -> Result<(u16, String)> {
    let mut response = agent().get(url).call()?;
    let text = response.body_mut().read_to_string()?;
    Ok((response.status().as_u16(), text))
}
