// The official OpenAI JavaScript client, unchanged, against the real engine with the small model.
//
// Needs the package of package.json in $OPENAI_JS (.lab/js without it) and the release build of the engine ($ENGINE,
// else target/release/engine); `make test` makes both.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { createRequire } from "node:module";
import { createServer } from "node:net";
import path from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), "../../..");
const packages = path.resolve(process.env.OPENAI_JS ?? path.join(root, ".lab/js"));
const { OpenAI } = createRequire(path.join(packages, "package.json"))("openai");
const target = process.env.CARGO_TARGET_DIR ?? path.join(root, "target");
const binary = process.env.ENGINE ?? path.join(target, "release/engine");
const model = "tiny-r1";

async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  await once(server, "close");
  return port;
}

let engine;
let client;
let log = "";

before(async () => {
  const port = await freePort();
  const args = ["serve", "--model", path.join(root, "e2e/models/tiny-r1"), "--served-model-name", model,
    "--host", "127.0.0.1", "--port", String(port)];
  engine = spawn(binary, args, { stdio: ["ignore", "ignore", "pipe"] });
  engine.stderr.on("data", (piece) => { log += piece; });
  const deadline = Date.now() + 60_000;
  for (;;) {
    const ready = await fetch(`http://127.0.0.1:${port}/readyz`).then((answer) => answer.ok, () => false);
    if (ready) break;
    assert.ok(engine.exitCode === null && Date.now() < deadline, `the engine did not become ready: ${log}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  client = new OpenAI({ baseURL: `http://127.0.0.1:${port}/v1`, apiKey: "unused", maxRetries: 0 });
});

after(async () => {
  engine.kill("SIGTERM");
  const [code] = engine.exitCode === null ? await once(engine, "exit") : [engine.exitCode];
  assert.equal(code, 0, log);
});

const ask = (content, more = {}) => ({ model, temperature: 0, messages: [{ role: "user", content }], ...more });

const tools = [{
  type: "function",
  function: {
    name: "paint",
    description: "Paints.",
    parameters: {
      type: "object",
      properties: { colour: { enum: ["red", "blue"] } },
      required: ["colour"],
      additionalProperties: false,
    },
  },
}];

test("a whole answer", async () => {
  const answer = await client.chat.completions.create(ask("What is 123 + 456?"));
  assert.match(answer.choices[0].message.content, /\\boxed\{579\}/);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.ok(answer.usage.completion_tokens_details.reasoning_tokens > 0);
});

test("a stream is the whole answer in pieces", async () => {
  const whole = await client.chat.completions.create(ask("What is 36 * 7?"));
  const stream = client.chat.completions.stream(ask("What is 36 * 7?"));
  let pieces = 0;
  for await (const chunk of stream) pieces += chunk.choices.length;
  const final = await stream.finalChatCompletion();
  assert.ok(pieces > 5);
  assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
});

test("a forced call is streamed like it is returned", async () => {
  const request = ask("What is 1 + 1?", { tools, tool_choice: "required", parallel_tool_calls: false, seed: 1 });
  const whole = await client.chat.completions.create(request);
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  assert.equal(call.function.name, "paint");
  assert.ok(["red", "blue"].includes(JSON.parse(call.function.arguments).colour));
  const final = await client.chat.completions.stream(request).finalChatCompletion();
  const [streamed] = final.choices[0].message.tool_calls;
  assert.equal(streamed.function.name, call.function.name);
  assert.equal(streamed.function.arguments, call.function.arguments);
});

test("an answer has the form that was asked for", async () => {
  const schema = tools[0].function.parameters;
  const format = { type: "json_schema", json_schema: { name: "paint", schema, strict: true } };
  const answer = await client.chat.completions.create(ask("What is 1 + 1?", { response_format: format }));
  assert.ok(["red", "blue"].includes(JSON.parse(answer.choices[0].message.content).colour));
});

test("a response and its events say the same", async () => {
  const whole = await client.responses.create({ model, temperature: 0, input: "What is 123 + 456?" });
  assert.match(whole.output_text, /\\boxed\{579\}/);
  const stream = await client.responses.create({ model, temperature: 0, input: "What is 123 + 456?", stream: true });
  let text = "";
  let last;
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") text += event.delta;
    last = event.type;
  }
  assert.equal(text, whole.output_text);
  assert.equal(last, "response.completed");
});

test("mistakes become the client's own errors", async () => {
  await assert.rejects(client.chat.completions.create({ ...ask("hi"), model: "gpt-9" }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create(ask("hi", { temperature: 9 })), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    assert.ok(error.requestID);
    return true;
  });
  await assert.rejects(client.embeddings.create({ model, input: "x" }), OpenAI.NotFoundError);
});
