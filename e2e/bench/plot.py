#!/usr/bin/env python3
"""Draws docs/performance/rivals.svg from docs/performance/rivals.json.

    python3 -m venv .lab/plot && .lab/plot/bin/pip install matplotlib==3.10.7 && .lab/plot/bin/python e2e/bench/plot.py
"""

import json
import pathlib
import re
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "rivals", "svg.fonttype": "none", "font.size": 9})
from matplotlib import pyplot  # noqa: E402

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "performance"
OURS, LIMIT, OTHERS = "#1f6f8b", "#d1495b", "#9aa5b1"
ROW = re.compile(r"S1: 1 object x (\d+) one-GPU replicas, (.+), ours beside (.+)")
PANELS = {
    "pods created per second": "pods created per second",
    "memory": "memory of the controller, MB",
    "processor time per pod": "its processor time per pod, ms",
}


def figures(report):
    """For each panel who and how much, ours first; and how many replicas there were."""
    found, replicas = {}, None
    for row in report["rows"]:
        if not (match := ROW.fullmatch(row["name"])):
            continue
        replicas, what, who = match.groups()
        panel = found.setdefault(what, {"cachalot": row["value"]})
        panel[who.removeprefix("a ")] = row["reference"]
    return found, replicas


def draw(axis, values, title):
    axis.barh(range(len(values)), values.values(), color=[color_of(who) for who in values], height=0.6)
    for place, value in enumerate(values.values()):
        axis.text(value, place, f" {value:.3g}", va="center")
    axis.set_yticks(range(len(values)), values)
    axis.invert_yaxis()
    axis.set_xlim(0, max(values.values()) * 1.15)
    axis.set_title(title, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def color_of(who):
    return {"cachalot": OURS, "bare client": LIMIT}.get(who, OTHERS)


def main():
    report = json.loads((FOLDER / "rivals.json").read_text())
    found, replicas = figures(report)
    if not found:
        sys.exit("rivals.json has no rows of other projects: measure with make bench-fleet FLAGS=\"--parts rivals --out docs/performance/rivals.json --rival …\"")
    counts = [len(found[what]) for what in PANELS if what in found]
    shape = {"height_ratios": counts}
    figure, axes = pyplot.subplots(len(counts), figsize=(9, 0.6 + sum(0.35 * count + 0.45 for count in counts)), layout="constrained", gridspec_kw=shape, squeeze=False)
    for axis, what in zip(axes[:, 0], (what for what in PANELS if what in found)):
        draw(axis, found[what], PANELS[what])
    figure.suptitle(f"{replicas} one-GPU replicas of one object; {report['machine']}", x=0.01, ha="left")
    figure.savefig(FOLDER / "rivals.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
