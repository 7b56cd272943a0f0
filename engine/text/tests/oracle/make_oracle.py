#!/usr/bin/env python3
"""What vLLM's parsers make of answers: the second opinion on ours.

    python make_oracle.py VLLM_DIR        # -> vllm.json

VLLM_DIR is the unpacked wheel of vLLM 0.20.2 (`pip download --no-deps vllm==0.20.2`, then unzip): its parsers are plain Python
and need `regex`, `partial_json_parser` and nothing else of vLLM, whose other modules are replaced by empty stand-ins. No
GPU, no torch.
"""

import importlib.abc
import importlib.machinery
import json
import logging
import pathlib
import sys
import types

HERE = pathlib.Path(__file__).parent
CB, CE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
B, E, S = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


class Fields:
    """Stands in for any class of vLLM or OpenAI: keeps what it is made with."""

    def __init__(self, *arguments, **fields):
        self.__dict__.update(fields)

    def __class_getitem__(cls, _):
        return cls


class StandIn(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "init_logger":
            return logging.getLogger
        if name == "VLLM_TOOL_PARSE_REGEX_TIMEOUT_SECONDS":
            return 5
        if name[:1].islower():
            return lambda *arguments, **fields: None
        made = type(name, (Fields,), {})
        setattr(self, name, made)
        return made


class Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """vLLM's parsers are real, everything else of vLLM, OpenAI and transformers is a stand-in."""

    def __init__(self, root):
        self.root = root

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ("vllm", "openai", "transformers"):
            return None
        if name.startswith(("vllm.tool_parsers", "vllm.reasoning")):
            file = self.root / (name.replace(".", "/") + ".py")
            if file.exists():
                return importlib.machinery.FileFinder(str(file.parent), (importlib.machinery.SourceFileLoader, [".py"])).find_spec(name)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


class Tokenizer:
    """Knows every tag as one token, by number."""

    tags = [CB, CE, B, E, S, "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>"]

    def get_vocab(self):
        return {tag: number for number, tag in enumerate(self.tags)}

    def encode(self, text, **_):
        return [ord(character) for character in text]


ARGUMENTS = {
    "empty": "{}",
    "flat": '{"city": "Tromsø", "days": 3}',
    "nested": '{"a": {"b": [1, 2.5, null, true]}, "c": "x"}',
    "brackets": '{"code": "if (a) { b[0] = \\"}\\"; }"}',
    "escapes": '{"text": "line\\nnext\\ttab \\\\ \\u00e9 \\ud83d\\ude00"}',
    "tags": '{"html": "<b>1 < 2</b>", "sep": ";"}',
    "lines": '{\n  "a": 1,\n  "b": [\n    2\n  ]\n}',
    "long": '{"text": "' + "a word, " * 60 + '"}',
    "numbers": '{"n": -0.5, "big": 12345678901234567890, "e": 1e-3}',
}
NAMES = ["f", "get_weather", "a-b_C9"]


def v3(name, arguments):
    return f"{B}function{S}{name}\n```json\n{arguments}\n```{E}"


def v31(name, arguments):
    return f"{B}{name}{S}{arguments}{E}"


def hermes(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def llama(name, arguments):
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def common(call, before="", between="", after=""):
    """Cases that every format has."""
    for label, arguments in ARGUMENTS.items():
        yield f"one {label}", before + call("f", arguments) + after
    for name in NAMES[1:]:
        yield f"name {name}", before + call(name, "{}") + after
    yield "two", before + call("f", '{"a": 1}') + between + call("g", '{"b": "x"}') + after
    yield "three", before + between.join(call(name, ARGUMENTS["flat"]) for name in NAMES) + after
    yield "same twice", before + between.join([call("f", "{}")] * 2) + after
    yield "plain text", "The answer is 12."
    yield "plain text with lines", "One.\n\nTwo: 1 < 2 & 3 > 2.\n"
    yield "empty", ""
    yield "json that is no call", 'As JSON: [1, {"a": 2}]'
    yield "code", "```python\nprint('x')\n```"


def cases():
    for format, call in {"deepseek_v3": v3, "deepseek_v31": v31}.items():
        between = "\n" if call is v3 else ""
        yield from ((format, *case) for case in common(call, CB, between, CE))
        yield format, "text before", "Let me look.\n\n" + CB + call("f", "{}") + CE
        yield format, "blank before", " " + CB + call("f", "{}") + CE
        yield format, "no end of calls", CB + call("f", '{"a": 1}')
        yield format, "text after", CB + call("f", "{}") + CE + "Done."
        yield format, "no begin of calls", call("f", "{}")
        yield format, "begin alone", "x" + CB
        yield format, "no call inside", CB + CE
        yield format, "not json", CB + call("f", "{'a': 1}") + CE
        yield format, "unfinished", CB + call("f", '{"a": 1}').removesuffix(E)
        yield format, "missing name", CB + call("", "{}") + CE
    yield "deepseek_v3", "json fence in the text", "```json\n{}\n```"
    yield "deepseek_v3", "extra line breaks", f"{CB}{B}function{S}f\n```json\n\n{{\"a\": 1}}\n\n```{E}{CE}"
    yield "deepseek_v31", "line breaks between", CB + v31("f", "{}") + "\n" + v31("g", "{}") + CE
    yield from (("hermes", *case) for case in common(hermes, between="\n"))
    yield "hermes", "text before", "Let me look.\n" + hermes("f", "{}")
    yield "hermes", "text after", hermes("f", "{}") + "\nDone."
    yield "hermes", "text between", hermes("f", "{}") + " and " + hermes("g", "{}")
    yield "hermes", "one line", '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>'
    yield "hermes", "keys swapped", '<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>'
    yield "hermes", "no end tag", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n'
    yield "hermes", "no end tag, no line", '<tool_call>{"name": "f", "arguments": {}}'
    yield "hermes", "extra key", '<tool_call>\n{"name": "f", "id": 7, "arguments": {"a": 1}}\n</tool_call>'
    yield "hermes", "not json", "<tool_call>\nf(1)\n</tool_call>"
    yield "hermes", "no name", '<tool_call>\n{"arguments": {}}\n</tool_call>'
    yield "hermes", "no arguments", '<tool_call>\n{"name": "f"}\n</tool_call>'
    yield "hermes", "unfinished", '<tool_call>\n{"name": "f", "arguments": {"a":'
    yield "hermes", "begin of a tag", "a <tool_ca"
    yield "hermes", "arguments as text", '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_call>'
    yield from (("llama3_json", *case) for case in common(llama, between="; "))
    yield "llama3_json", "python tag", "<|python_tag|>" + llama("f", '{"a": 1}')
    yield "llama3_json", "arguments for parameters", '{"name": "f", "arguments": {"a": 1}}'
    yield "llama3_json", "keys swapped", '{"parameters": {"a": 1}, "name": "f"}'
    yield "llama3_json", "type first", '{"type": "function", "name": "f", "parameters": {"a": 1}}'
    yield "llama3_json", "no blank between", llama("f", "{}") + ";" + llama("g", "{}")
    yield "llama3_json", "blank around", "\n " + llama("f", "{}") + " \n"
    yield "llama3_json", "text before", "Sure: " + llama("f", "{}")
    yield "llama3_json", "text after", llama("f", "{}") + " done"
    yield "llama3_json", "another object", '{"answer": 42}'
    yield "llama3_json", "no parameters", '{"name": "f"}'
    yield "llama3_json", "unfinished", '{"name": "f", "parameters": {"a":'
    yield "llama3_json", "not json", "{name: f}"


REASONING = {
    "usual": "First 1.\nThen 2.</think>\n\nThe answer is 3.",
    "own tag": "<think>First 1.</think>The answer is 3.",
    "own tag and lines": "<think>\nFirst 1.\n</think>\n\nThe answer is 3.",
    "empty": "</think>The answer.",
    "empty with tag": "<think></think>The answer.",
    "no answer": "Only thoughts.</think>",
    "never ends": "Thoughts without end",
    "never ends, own tag": "<think>Thoughts without end",
    "tag in the answer": "a</think>The tag </think> ends it.",
    "tag opens again": "a</think>b<think>c",
    "lines inside": "a\n\n\nb</think>c",
    "markup": "x < y, <b>bold</b> and </thin k></think>z",
    "unicode": "é😀</think>ü",
    "half a tag at the end": "a</thi",
    "call after it": "I call.</think>\n\n" + CB + v31("f", "{}") + CE,
    "call after it, hermes": "I call.</think>\n" + hermes("f", "{}"),
    "blanks around": " a </think> b ",
}
FORMATS = {
    "deepseek_v3": ("deepseekv3_tool_parser", "DeepSeekV3ToolParser"),
    "deepseek_v31": ("deepseekv31_tool_parser", "DeepSeekV31ToolParser"),
    "hermes": ("hermes_tool_parser", "Hermes2ProToolParser"),
    "llama3_json": ("llama_tool_parser", "Llama3JsonToolParser"),
}


def main(root):
    sys.meta_path.insert(0, Importer(root))
    logging.disable()
    calls = []
    for format, name, text in cases():
        module, parser = FORMATS[format]
        module = importlib.import_module(f"vllm.tool_parsers.{module}")
        found = getattr(module, parser)(Tokenizer()).extract_tool_calls(text, Fields(tools=None))
        made = [[call.function.name, call.function.arguments] for call in found.tool_calls]
        calls.append({"format": format, "name": name, "text": text, "content": found.content or "", "calls": made})
    parser = importlib.import_module("vllm.reasoning.deepseek_r1_reasoning_parser").DeepSeekR1ReasoningParser(Tokenizer())
    reasoning = []
    for name, text in REASONING.items():
        thought, content = parser.extract_reasoning(text, Fields())
        reasoning.append({"name": name, "text": text, "reasoning": thought or "", "content": content or ""})
    text = json.dumps({"calls": calls, "reasoning": reasoning}, ensure_ascii=False, indent=1) + "\n"
    (HERE / "vllm.json").write_text(text)
    print(len(calls), "answers with calls or none,", len(reasoning), "with reasoning")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
