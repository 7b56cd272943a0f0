#!/usr/bin/env python3
"""Draws docs/performance/engine.svg from docs/performance/engine.json.

    python3 -m venv .lab/plot && .lab/plot/bin/pip install matplotlib==3.10.7 && .lab/plot/bin/python engine/bench/plot.py
"""

import json
import pathlib
import re

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "engine", "svg.fonttype": "none", "font.size": 9})
from matplotlib import pyplot  # noqa: E402

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "performance"
OURS, BOUND = "#1f6f8b", "#d1495b"
FORMS = {"bfloat16": OURS, "int8": "#e08e45", "int4": "#6a994e"}


def goal_of(row):
    """The ratio that is wanted, 0 when none is."""
    goal = row["goal"] or {}
    return goal.get("least", goal.get("most", 0)) if goal.get("of") == "ratio" else 0


SHORTER = {
    "start of the process to its first token, against 1 s plus bytes over bandwidth": "start to first token, of 1 s + bytes/bandwidth",
    "prefill, products only, against the peak, ": "prefill, of the dot product peak, ",
    "decode of 1 sequence, weights read, against memory, ": "decode, of the read bandwidth, ",
    "prefill of 512 tokens, ": "prefill, ",
    "decode of 1 sequence, ": "decode, ",
    "against llama.cpp's": "to llama.cpp's",
    " of the time (forced)": "",
}


def short(name):
    for long, shorter in SHORTER.items():
        name = name.replace(long, shorter)
    return name


def main():
    report = json.loads((FOLDER / "engine.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    held = [row for row in report["rows"] if row["ratio"] is not None]
    figure = pyplot.figure(figsize=(11, max(4, 0.34 * len(held))), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.3, 1])
    bars = figure.add_subplot(grid[:, 0])

    bars.barh(range(len(held)), [row["ratio"] for row in held], color=OURS, height=0.6)
    for place, row in enumerate(held):
        end = max(row["ratio"], goal_of(row))
        bars.text(end, place, f"  {row['ratio']:.2f}", va="center")
        if goal_of(row):
            bars.plot([goal_of(row)] * 2, [place - 0.4, place + 0.4], color=BOUND, lw=2)
    bars.set_yticks(range(len(held)), [short(row["name"]) for row in held])
    bars.invert_yaxis()
    bars.set_xlim(0, max(max(row["ratio"], goal_of(row)) for row in held) * 1.15)
    bars.set_title("ratios (red: goal)", loc="left")
    bars.spines[["top", "right"]].set_visible(False)

    batches = figure.add_subplot(grid[0, 1])
    for form, color in FORMS.items():
        by_batch = points(rows, rf"decode of a batch of (\d+), {form}, context 256")
        batches.plot(*zip(*by_batch), "o-", color=color, label=form)
    batches.legend(frameon=False)
    label(batches, by_batch, "sequences at once", "decode, tokens/s, context 256")

    contexts = figure.add_subplot(grid[1, 1])
    by_context = points(rows, r"decode of 1 sequence, bfloat16, context (\d+)")
    contexts.plot(*zip(*by_context), "o-", color=OURS)
    for at, value in by_context:
        contexts.text(at, value, f" {value:.0f}", va="bottom")
    label(contexts, by_context, "tokens of context", "decode in bfloat16, tokens/s")

    figure.suptitle(f"{report['machine']}, 245 M parameter DeepSeek-V3 shape", x=0.01, ha="left")
    figure.savefig(FOLDER / "engine.svg", metadata={"Date": None})


def points(rows, pattern):
    found = [(int(match[1]), row["value"]) for name, row in rows.items() if (match := re.fullmatch(pattern, name))]
    return sorted(found)


def label(axis, points, x, title):
    axis.set_xscale("log", base=2)
    axis.set_xticks([point[0] for point in points], [str(point[0]) for point in points])
    axis.minorticks_off()
    axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
    axis.set_xlabel(x)
    axis.set_title(title, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
