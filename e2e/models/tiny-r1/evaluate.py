"""Greedy exam of the exported folder with transformers; writes evaluation.json.

A question of the four known forms is right when the number in the last \\boxed{…} is the true result; one of the form "other" is right
when the answer is one of the honest sentences and holds no boxed number. All problems are held out from training.

usage: python evaluate.py --model FOLDER [--count 250] [--out evaluation.json]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tasks
from tasks import Example, Form

BATCH = 64
NEW_TOKENS_MAX = 160
SAMPLED = "sampled, temperature 0.6, top_p 0.95"
"""The one suite that is not greedy."""

Maker = Callable[[random.Random], Example]


def canonical(form: Form) -> Maker:
    """The wording of the documentation, such as `What is 12 + 34?`."""

    def make(rng: random.Random) -> Example:
        example = tasks.generate(form, rng, "held_out", plain=True)
        if form is Form.COUNT:
            word = example.key.removeprefix("count:")
            letter = rng.choice(word if rng.random() < 0.75 else tasks.LETTERS)
            return tasks.count_example(word, letter, f'How many {letter} in "{word}"?')
        sign = {Form.SUM: "+", Form.DIFFERENCE: "-", Form.PRODUCT: "*"}[form]
        _, a, b = example.key.split(":")
        return replace(example, question=f"What is {a} {sign} {b}?")

    return make


def phrased(form: Form) -> Maker:
    """Any phrasing, sometimes with a system prompt, an earlier turn or R1's usual request to reason."""
    return lambda rng: tasks.generate(form, rng, "held_out")


def large(form: Form) -> Maker:
    """Three-digit operands only."""

    def make(rng: random.Random) -> Example:
        while True:
            example = canonical(form)(rng)
            if min(map(int, example.key.split(":")[1:])) >= 100:
                return example

    return make


def english_words() -> list[Example]:
    """Every real word with each of its letters and one that is absent."""
    examples = []
    for word in tasks.ENGLISH_WORDS:
        absent = next(letter for letter in "zqxj" if letter not in word)
        examples += [tasks.count_example(word, letter, f'How many {letter} in "{word}"?') for letter in [*dict.fromkeys(word), absent]]
    return examples


def suites(count: int) -> dict[str, list[Example]]:
    """All suites by name."""
    made: dict[str, list[Example]] = {}
    known = [form for form in Form if form is not Form.OTHER]
    makers: dict[str, Maker] = {form.value: canonical(form) for form in known}
    makers |= {f"{form.value}, any phrasing": phrased(form) for form in known}
    makers |= {f"{form.value}, three digits": large(form) for form in (Form.SUM, Form.DIFFERENCE)}
    makers |= {"anything else is declined": phrased(Form.OTHER)}
    for name, make in makers.items():
        rng = random.Random(f"evaluation:{name}")
        made[name] = [make(rng) for _ in range(count)]
    rng = random.Random("evaluation:context")
    systems = [replace(make(rng), system="You are a helpful assistant.") for make in map(canonical, known) for _ in range(count // 4)]
    turns = [replace(make(rng), history=((earlier.question, "\n\n" + earlier.answer),))
             for make in map(canonical, known) for earlier in [canonical(rng.choice(known))(rng) for _ in range(count // 4)]]
    mixed = [make(rng) for make in map(canonical, known) for _ in range(count // 4)]
    return made | {"with a system prompt": systems, "as a second turn": turns, "English words": english_words(), SAMPLED: mixed}


def is_right(example: Example, text: str) -> bool:
    """Whether the model's text answers the example."""
    if example.result is None:
        sentences = (tasks.SENTENCE_OTHER, tasks.SENTENCE_RANGE, tasks.SENTENCE_QUOTE)
        return any(sentence in text for sentence in sentences) and tasks.result_of(text) is None
    return tasks.END_THINK in text and tasks.result_of(text.partition(tasks.END_THINK)[2]) == example.result


class Model:
    """The exported folder in transformers, on the CPU, computing in float32 with the bfloat16 weights."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(threads)
        torch.manual_seed(1)
        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def prompt(self, example: Example) -> str:
        """The prompt through the folder's own chat template."""
        messages = [{"role": "system", "content": example.system}] if example.system else []
        for asked, said in example.history:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        messages.append({"role": "user", "content": example.question})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def answer(self, examples: list[Example], sampled: bool = False) -> list[str]:
        """Completions up to the end of the sentence: greedy, or sampled as generation_config.json says."""
        batch = self.tokenizer([self.prompt(example) for example in examples], add_special_tokens=False, padding=True, return_tensors="pt")
        with self.torch.no_grad():
            choice = {} if sampled else {"do_sample": False, "temperature": None, "top_p": None}
            ids = self.model.generate(**batch, **choice, max_new_tokens=NEW_TOKENS_MAX, pad_token_id=2)
        texts = self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=False)
        return [text.partition(tasks.EOS)[0] for text in texts]


def examine(model: Model, examples: list[Example], sampled: bool) -> tuple[int, list[dict[str, str]]]:
    """How many are right, and up to five wrong ones."""
    right, wrong = 0, []
    ordered = sorted(examples, key=lambda example: len(example.prompt()) + len(example.completion()))
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        for example, text in zip(part, model.answer(part, sampled)):
            if is_right(example, text):
                right += 1
            elif len(wrong) < 5:
                wrong.append({"question": example.question, "expected": example.answer, "said": text})
    return right, wrong


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=250, help="questions of each suite")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    model, rows, began = Model(args.model, args.threads), [], time.monotonic()
    for name, examples in suites(args.count).items():
        right, wrong = examine(model, examples, sampled=name == SAMPLED)
        rows.append({"name": name, "right": right, "of": len(examples), "share": round(right / len(examples), 4), "wrong": wrong})
        print(f"{name:38} {right:4} of {len(examples):4}  {right / len(examples):.1%}", flush=True)
    for question in ("What is 12 + 34?", 'How many r in "strawberry"?', "What is 7 - 250?", "Hello!"):
        print(question, "->", model.answer([Example(Form.OTHER, "", question, "", "", None)])[0])
    report = {"command": f"evaluate.py --count {args.count}", "decoding": "greedy, transformers, bfloat16 weights in float32", "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
