"""The official OpenAI Python client, unchanged, against the real engine with the small model.

Needs the packages of requirements.txt and the release build of the engine (`$ENGINE`, else
target/release/engine); `make test` makes both.
"""

import json
import os
import pathlib
import socket
import subprocess
import tempfile
import time
import unittest
import urllib.error
import urllib.request
from typing import Annotated, Literal

import openai
import pydantic

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
ENGINE = pathlib.Path(os.environ.get("ENGINE", TARGET / "release/engine"))
MODEL = ROOT / "e2e/models/tiny-r1"


class Painting(pydantic.BaseModel):
    """What a forced form must be; bounded, since the model was never taught to write JSON."""

    colour: Literal["red", "blue"]
    size: Annotated[int, pydantic.Field(ge=0, le=99)]


PAINT = openai.pydantic_function_tool(Painting, name="paint", description="Paints.")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Engine:
    """An engine process that is ready; stopped by SIGTERM."""

    def __init__(self) -> None:
        self.port = free_port()
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [ENGINE, "serve", "--model", MODEL, "--served-model-name", "tiny-r1",
             "--host", "127.0.0.1", "--port", str(self.port)],
            stdout=self.log, stderr=self.log,
        )
        deadline = time.monotonic() + 60
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.log.seek(0)
                raise RuntimeError("the engine did not become ready: " + self.log.read().decode())
            time.sleep(0.05)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


class OpenAIPython(unittest.TestCase):
    """One engine for all tests."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.engine = Engine()
        cls.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{cls.engine.port}/v1", api_key="unused", max_retries=0
        )

    @classmethod
    def tearDownClass(cls) -> None:
        cls.client.close()
        code = cls.engine.stop()
        cls.engine.log.close()
        assert code == 0, f"the engine ended with {code} after SIGTERM"

    def ask(self, question: str, **more):
        return self.client.chat.completions.create(
            model="tiny-r1", temperature=0,
            messages=[{"role": "user", "content": question}], **more,
        )

    def test_a_whole_answer(self) -> None:
        answer = self.ask("What is 123 + 456?")
        self.assertIn("\\boxed{579}", answer.choices[0].message.content)
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertEqual(
            answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens
        )
        self.assertGreater(answer.usage.completion_tokens, 10)

    def test_a_stream_is_the_whole_answer_in_pieces(self) -> None:
        whole = self.ask("What is 36 * 7?").choices[0].message
        content, reasoning, usage = "", "", None
        stream = self.ask("What is 36 * 7?", stream=True, stream_options={"include_usage": True})
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                content += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        self.assertEqual(content, whole.content)
        self.assertEqual(reasoning, whole.reasoning_content)
        self.assertGreater(usage.completion_tokens, 10)

    def test_a_seed_repeats_an_answer(self) -> None:
        answers = {
            self.client.chat.completions.create(
                model="tiny-r1", temperature=1.0, seed=7, max_tokens=40,
                messages=[{"role": "user", "content": "Tell me a story."}],
            ).choices[0].message.content
            for _ in range(3)
        }
        self.assertEqual(len(answers), 1)

    def test_completions_and_stop(self) -> None:
        answer = self.client.completions.create(
            model="tiny-r1", prompt="What is 1 + 1?", max_tokens=5, temperature=0
        )
        self.assertLessEqual(answer.usage.completion_tokens, 5)
        stopped = self.ask("What is 123 + 456?", stop=["5"])
        self.assertNotIn("5", stopped.choices[0].message.content or "")

    def test_models(self) -> None:
        self.assertEqual([model.id for model in self.client.models.list()], ["tiny-r1"])
        self.assertEqual(self.client.models.retrieve("tiny-r1").id, "tiny-r1")

    def test_mistakes_become_the_client_s_own_exceptions(self) -> None:
        with self.assertRaises(openai.NotFoundError) as missing:
            self.client.chat.completions.create(
                model="gpt-9", messages=[{"role": "user", "content": "hi"}]
            )
        self.assertIn("tiny-r1", str(missing.exception))
        with self.assertRaises(openai.BadRequestError) as hot:
            self.client.chat.completions.create(
                model="tiny-r1", temperature=9, messages=[{"role": "user", "content": "hi"}]
            )
        self.assertEqual(hot.exception.param, "temperature")
        with self.assertRaises(openai.BadRequestError) as long:
            self.ask("What is 1 + 1? " * 2000)
        self.assertEqual(long.exception.code, "context_length_exceeded")

    def test_an_answer_is_parsed_into_the_form_that_was_asked_for(self) -> None:
        answer = self.client.chat.completions.parse(
            model="tiny-r1", temperature=0, response_format=Painting,
            messages=[{"role": "user", "content": "What is 1 + 1?"}],
        )
        self.assertIsInstance(answer.choices[0].message.parsed, Painting)
        self.assertTrue(answer.choices[0].message.reasoning_content)
        for seed in range(5):
            chosen = self.ask(
                "What is 2 + 2?", seed=seed,
                extra_body={"structured_outputs": {"choice": ["four", "five"]}, "temperature": 1},
            )
            self.assertIn(chosen.choices[0].message.content, ["four", "five"])
        with self.assertRaises(openai.BadRequestError) as wrong:
            self.ask("hi", extra_body={"structured_outputs": {"regex": "("}})
        self.assertEqual(wrong.exception.param, "structured_outputs")

    def test_a_forced_call_is_streamed_like_it_is_returned(self) -> None:
        request = dict(
            model="tiny-r1", temperature=0, tools=[PAINT], parallel_tool_calls=False,
            tool_choice={"type": "function", "function": {"name": "paint"}},
            messages=[{"role": "user", "content": "What is 1 + 1?"}],
        )
        whole = self.client.chat.completions.parse(**request)
        call = whole.choices[0].message.tool_calls[0]
        self.assertEqual(whole.choices[0].finish_reason, "tool_calls")
        self.assertIsInstance(call.function.parsed_arguments, Painting)
        with self.client.chat.completions.stream(**request) as stream:
            for _ in stream:
                pass
            streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
        self.assertEqual(streamed.function.arguments, call.function.arguments)
        # The call and its result go back; the model only has to answer something.
        after = self.client.chat.completions.create(
            model="tiny-r1", temperature=0, max_tokens=5, extra_body={"ignore_eos": True},
            messages=[
                {"role": "user", "content": "Paint."},
                {"role": "assistant", "content": None, "tool_calls": [call.model_dump(exclude={"function": {"parsed_arguments"}})]},
                {"role": "tool", "tool_call_id": call.id, "content": "done"},
            ],
        )
        self.assertEqual(after.usage.completion_tokens, 5)

    def test_log_probabilities(self) -> None:
        answer = self.ask("What is 1 + 1?", logprobs=True, top_logprobs=3, max_tokens=6)
        entries = answer.choices[0].logprobs.content
        self.assertEqual(len(entries), 6)
        for entry in entries:
            self.assertLessEqual(entry.logprob, 0)
            self.assertEqual(entry.top_logprobs[0].token, entry.token)

    def test_responses_whole_and_streamed(self) -> None:
        request = dict(model="tiny-r1", temperature=0, input="What is 123 + 456?")
        whole = self.client.responses.create(**request)
        self.assertIn("\\boxed{579}", whole.output_text)
        self.assertEqual([item.type for item in whole.output], ["reasoning", "message"])
        with self.client.responses.stream(**request) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        self.assertEqual(final.output_text, whole.output_text)
        self.assertEqual((kinds[0], kinds[-1]), ("response.created", "response.completed"))
        with self.assertRaises(openai.BadRequestError) as stored:
            self.client.responses.create(previous_response_id="resp_1", **request)
        self.assertEqual(stored.exception.param, "previous_response_id")

    def test_what_is_not_served_is_refused_with_a_way_out(self) -> None:
        with self.assertRaises(openai.NotFoundError) as refused:
            self.client.embeddings.create(model="tiny-r1", input="x")
        self.assertIn("embedding model", str(refused.exception))

    def test_a_client_that_leaves_frees_its_place(self) -> None:
        stream = self.client.chat.completions.create(
            model="tiny-r1", stream=True, temperature=0, max_tokens=1500,
            messages=[{"role": "user", "content": "What is 999 + 999?"}],
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
        deadline = time.monotonic() + 5
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertEqual(self.running(), 0)

    def running(self) -> int:
        url = f"http://127.0.0.1:{self.engine.port}/load"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["running"]


if __name__ == "__main__":
    unittest.main()
