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
OURS, THEIRS, BOUND = "#1f6f8b", "#b0b7bd", "#d1495b"


def goal_of(row):
    """The ratio that is wanted, 0 when none is."""
    goal = row["goal"] or {}
    return goal.get("least", goal.get("most", 0)) if goal.get("of") == "ratio" else 0


def main():
    report = json.loads((FOLDER / "engine.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    held = [row for row in report["rows"] if row["ratio"] is not None]
    figure, axes = pyplot.subplots(1, 3, figsize=(11, max(3.4, 0.5 * len(held))), width_ratios=[1.2, 1, 1])

    axes[0].barh(range(len(held)), [row["ratio"] for row in held], color=OURS, height=0.55)
    for place, row in enumerate(held):
        axes[0].text(row["ratio"], place, f" {row['ratio']:.2f}", va="center")
        if goal_of(row):
            axes[0].plot([goal_of(row)] * 2, [place - 0.4, place + 0.4], color=BOUND, lw=2)
    axes[0].set_yticks(range(len(held)), [row["name"].replace(", ", ",\n") for row in held])
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, max(max(row["ratio"], goal_of(row)) for row in held) * 1.2)
    axes[0].set_title("of the reference (red: goal)", loc="left")

    by_batch = points(rows, r"decode of a batch of (\d+), bfloat16, context 256")
    axes[1].plot(*zip(*by_batch), "o-", color=OURS)
    label(axes[1], by_batch, "sequences at once", "decode in bfloat16, tokens/s, context 256")

    by_context = points(rows, r"decode of 1 sequence, bfloat16, context (\d+)")
    axes[2].plot(*zip(*by_context), "o-", color=OURS)
    label(axes[2], by_context, "tokens of context", "decode in bfloat16, tokens/s, one sequence")

    figure.suptitle(f"{report['machine']}, 245 M parameter DeepSeek-V3 shape", x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(FOLDER / "engine.svg", metadata={"Date": None})


def points(rows, pattern):
    found = [(int(match[1]), row["value"]) for name, row in rows.items() if (match := re.fullmatch(pattern, name))]
    return sorted(found)


def label(axis, points, x, title):
    axis.set_xscale("log", base=2)
    axis.set_xticks([point[0] for point in points], [str(point[0]) for point in points])
    axis.minorticks_off()
    axis.set_ylim(0, max(point[1] for point in points) * 1.15)
    for at, value in points:
        axis.text(at, value, f"{value:.0f}\n", ha="center", va="bottom", linespacing=0.4)
    axis.set_xlabel(x)
    axis.set_title(title, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
