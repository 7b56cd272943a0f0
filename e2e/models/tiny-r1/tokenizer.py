"""Makes the tokenizer files of tiny-r1: byte-level BPE with DeepSeek-V3's pre-tokenizer and special tokens, and R1's chat template.

Nothing is trained: the merges are spelled out. Each merge extends a token that starts with a space (or is a sign such as "≠"), so
the digits, and the letters inside a quoted word, stay one token each; that is what makes counting letters learnable.

usage: python tokenizer.py FOLDER
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import tasks

HEAD_TOKENS = (tasks.BOS, tasks.EOS, tasks.PAD)
"""Ids 0, 1, 2 as in DeepSeek-V3; resolve all others by string, never by number."""

TAIL_TOKENS: tuple[tuple[str, bool], ...] = (
    (tasks.THINK, False),
    (tasks.END_THINK, False),
    ("<｜fim▁hole｜>", False),
    ("<｜fim▁begin｜>", False),
    ("<｜fim▁end｜>", False),
    (tasks.USER, False),
    (tasks.ASSISTANT, False),
    ("<|EOT|>", True),
    ("<｜tool▁calls▁begin｜>", False),
    ("<｜tool▁calls▁end｜>", False),
    ("<｜tool▁call▁begin｜>", False),
    ("<｜tool▁call▁end｜>", False),
    ("<｜tool▁outputs▁begin｜>", False),
    ("<｜tool▁outputs▁end｜>", False),
    ("<｜tool▁output▁begin｜>", False),
    ("<｜tool▁output▁end｜>", False),
    ("<｜tool▁sep｜>", False),
)
"""Added tokens behind the vocabulary, and whether decoding may skip them as special."""

SPLIT_DIGITS = r"\p{N}{1,3}"
SPLIT_CJK = "[一-龥぀-ゟ゠-ヿ]+"
SPLIT_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)

PHRASE_WORDS = (
    "is many much the in are there of letter letters word does have how often times plus minus multiplied by from and sum product "
    "subtract compute appear what tell me please reason step your final answer within put can only add multiply small numbers count "
    "quoted tiny model up to not task know out range quotes double am helpful assistant"
).split()
SIGNS = ("≠", "×", '?"', ' "', '"?', " +", " -", " *", " =", " ?", " ×", "\\boxed", "'s", "\n\n")

_MODEL_LENGTH_MAX = 2048


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (the mapping GPT-2 introduced)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in kept}
    missing = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + place) for place, byte in enumerate(missing)}


def merges() -> list[tuple[str, str]]:
    """All merges, shortest first: a space with each letter, then every prefix of each phrase word, then the signs."""
    table = byte_characters()
    words = [f" {letter}" for letter in string.ascii_letters] + [f" {word}" for word in PHRASE_WORDS] + list(SIGNS)
    found: dict[tuple[str, str], None] = {}
    for word in words:
        symbols = [table[byte] for byte in word.encode()]
        for end in range(1, len(symbols)):
            found["".join(symbols[:end]), symbols[end]] = None
    return sorted(found, key=lambda pair: len(pair[0]))


def vocabulary() -> dict[str, int]:
    """Token to id, without the added tokens at the end."""
    table = byte_characters()
    tokens = [*HEAD_TOKENS, *sorted(table.values()), *("".join(pair) for pair in merges())]
    return {token: index for index, token in enumerate(tokens)}


def _added(index: int, content: str, special: bool) -> dict[str, object]:
    return {"id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": special}


def _split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def tokenizer_json() -> dict[str, object]:
    """The content of tokenizer.json."""
    vocab = vocabulary()
    added = [_added(index, token, True) for index, token in enumerate(HEAD_TOKENS)]
    added += [_added(len(vocab) + place, token, special) for place, (token, special) in enumerate(TAIL_TOKENS)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_split(SPLIT_DIGITS), _split(SPLIT_CJK), _split(SPLIT_WORDS), byte_level]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [f"{left} {right}" for left, right in merges()],
        },
    }


CHAT_TEMPLATE = (
    "{%- if not add_generation_prompt is defined %}{%- set add_generation_prompt = false %}{%- endif %}"
    "{%- set ns = namespace(system='', after_tool=false) %}"
    "{%- for message in messages if message['role'] == 'system' %}{%- set ns.system = message['content'] %}{%- endfor %}"
    "{{- bos_token + ns.system }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}"
    "{%- set ns.after_tool = false %}{{- '<｜User｜>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' and message['tool_calls'] is defined and message['tool_calls'] %}"
    "{{- '<｜Assistant｜>' + (message['content'] or '') + '<｜tool▁calls▁begin｜>' }}"
    "{%- for call in message['tool_calls'] %}"
    "{%- if not loop.first %}{{- '\\n' }}{%- endif %}"
    "{{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n'"
    " + call['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}"
    "{%- endfor %}"
    "{{- '<｜tool▁calls▁end｜>' + eos_token }}{%- set ns.after_tool = false %}"
    "{%- elif message['role'] == 'assistant' and message['content'] is not none %}"
    "{%- if ns.after_tool %}{{- '<｜tool▁outputs▁end｜>' + message['content'] + eos_token }}{%- set ns.after_tool = false %}"
    "{%- else %}{{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}{%- endif %}"
    "{%- elif message['role'] == 'tool' %}"
    "{%- if not ns.after_tool %}{{- '<｜tool▁outputs▁begin｜>' }}{%- else %}{{- '\\n' }}{%- endif %}"
    "{%- set ns.after_tool = true %}{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if ns.after_tool %}{{- '<｜tool▁outputs▁end｜>' }}"
    "{%- elif add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"
)
"""R1's behaviour in our words: system first, earlier turns without their thinking, `<think>` opened in the generation prompt."""


def tokenizer_config() -> dict[str, object]:
    """The content of tokenizer_config.json."""

    def token(content: str) -> dict[str, object]:
        return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": token(tasks.BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": token(tasks.EOS),
        "legacy": True,
        "model_max_length": _MODEL_LENGTH_MAX,
        "pad_token": token(tasks.EOS),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }


def write(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into the folder."""
    for name, content in (("tokenizer.json", tokenizer_json()), ("tokenizer_config.json", tokenizer_config())):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tokenizer.py FOLDER")
    write(Path(sys.argv[1]))
