#!/usr/bin/env python3
"""Draws docs/performance/fleet.svg and rivals.svg from fleet.json and rivals.json: medians, and least to most as a line.

    python3 -m venv .lab/plot && .lab/plot/bin/pip install matplotlib==3.10.7 && .lab/plot/bin/python e2e/bench/plot.py
"""

import json
import pathlib
import re
import sys
import textwrap

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "bench-fleet", "svg.fonttype": "none", "font.size": 9})
from matplotlib import lines, pyplot, ticker  # noqa: E402

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "performance"
OURS, LIMIT, OTHERS = "#1f6f8b", "#d1495b", "#9aa5b1"
BESIDE = re.compile(r"(S\d: .+), ours beside (.+)")
ABSENT = {  # whose figure there is
    "ours": re.compile(r"(S\d: .+), ours; (.+): not in every run within (\d+) s"),
    "theirs": re.compile(r"(S\d: .+), (.+); ours: not in every run within (\d+) s"),
    "nobody's": re.compile(r"(S\d: .+), ours and (.+): not in every run within (\d+) s"),
}
UNITS = {
    "pods/s": "pods created per second",
    "s": "seconds",
    "MB": "memory of the operator, MB",
    "ms": "milliseconds",
    "%": "share of a core, %",
    "writes": "API writes per pod",
}
# From here on numbers of one panel are too far apart for an axis that begins at 0.
APART = 30


class Figure:
    """A median, and between which numbers its runs were."""

    def __init__(self, value, spread):
        self.value, self.spread = value, spread

    def most(self):
        return self.spread["most"] if self.spread else self.value

    def least(self):
        return self.spread["least"] if self.spread else self.value

    def words(self, unit):
        runs = f" ({self.least():.3g} to {self.most():.3g})" if self.spread else ""
        return f"{self.value:.3g}{runs} {unit}"


def ours_of(row):
    return Figure(row["value"], row.get("spread"))


def theirs_of(row):
    return Figure(row["reference"], row.get("reference_spread"))


def read(name):
    path = FOLDER / name
    return json.loads(path.read_text()) if path.is_file() else {"rows": [], "machine": ""}


def spread(axis, place, figure):
    if figure.spread:
        axis.plot([figure.least(), figure.most()], [place, place], color="black", lw=1.2, marker="|", ms=6)


def is_contest(row):
    return BESIDE.fullmatch(row["name"]) or any(form.fullmatch(row["name"]) for form in ABSENT.values())


def contests(report):
    """For each title its unit, and who reached how much; a text in place of a figure for who did not get there."""
    found = {}

    def put(row, title, who, ours, theirs):
        all_of = found.setdefault(title, (row["unit"], {}))[1]
        all_of["cachalot"] = ours
        all_of[who.removeprefix("a ")] = theirs

    for row in report["rows"]:
        if match := BESIDE.fullmatch(row["name"]):
            put(row, *match.groups(), ours_of(row), theirs_of(row))
        for whose, form in ABSENT.items():
            if match := form.fullmatch(row["name"]):
                title, who, seconds = match.groups()
                none = f"not in every run within {seconds} s"
                figure = ours_of(row)
                put(row, title, who, figure if whose == "ours" else none, figure if whose == "theirs" else none)
    return found


def contest(axis, title, unit, all_of):
    figures = [value for value in all_of.values() if isinstance(value, Figure)]
    widest = max((figure.most() for figure in figures), default=1)
    for place, (who, value) in enumerate(all_of.items()):
        if isinstance(value, str):
            axis.text(0, place, f" {value}", va="center", style="italic")
            continue
        color = {"cachalot": OURS, "bare client": LIMIT}.get(who, OTHERS)
        axis.barh(place, value.value, color=color, height=0.6)
        spread(axis, place, value)
        axis.text(value.most(), place, f"  {value.words(unit)}", va="center")
    axis.set_yticks(range(len(all_of)), ["\n".join(textwrap.wrap(who, 34)) for who in all_of])
    axis.set_ylim(len(all_of) - 0.5, -0.5)
    axis.set_xlim(0, widest * 1.6)
    axis.set_title("\n".join(textwrap.wrap(title, 80)), loc="left", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def goal_of(row):
    """Which number the row should reach, in its unit."""
    goal = row["goal"]
    limit = goal.get("least", goal.get("most")) if goal else None
    if limit is None:
        return None
    return limit * row["reference"] if goal["of"] == "ratio" else limit


def fleet(axis, unit, rows):
    shown = []
    for place, row in enumerate(rows):
        figure, goal = ours_of(row), goal_of(row)
        shown += [figure.least(), figure.most()]
        spread(axis, place, figure)
        axis.plot([figure.value], [place], "o", color=OURS, ms=7)
        words = figure.words(unit)
        if row["reference"] is not None:
            reference = theirs_of(row)
            shown += [reference.least(), reference.most()]
            spread(axis, place + 0.25, reference)
            axis.plot([reference.value], [place + 0.25], "D", color=OTHERS, ms=5)
            words += f", reference {reference.words(unit)}"
        if goal is not None:
            shown.append(goal)
            axis.plot([goal] * 2, [place - 0.35, place + 0.35], color=LIMIT, lw=2)
        axis.text(1.01, place, words, va="center", transform=axis.get_yaxis_transform())
    axis.set_yticks(range(len(rows)), ["\n".join(textwrap.wrap(row["name"], 58)) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    above = [number for number in shown if number > 0]
    if above and max(above) > APART * min(above):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_xlim(min(above) / 1.5, max(above) * 1.5)
    else:
        axis.set_xlim(0, max(shown) * 1.1)
    axis.set_title(UNITS.get(unit, unit), loc="left")
    axis.grid(axis="x", color="#e3e6ea")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def page(heights, width, title):
    figure, axes = pyplot.subplots(
        len(heights), figsize=(width, 1 + sum(heights)), layout="constrained", gridspec_kw={"height_ratios": heights}, squeeze=False
    )
    figure.suptitle(title, x=0.01, ha="left")
    return figure, axes[:, 0]


def save(figure, name):
    figure.savefig(FOLDER / name, metadata={"Date": None})
    print(FOLDER / name)


def main():
    rows = [row for row in read("fleet.json")["rows"] if not is_contest(row)]
    if not rows:
        sys.exit("fleet.json has no rows: measure with make bench-fleet")
    units = {row["unit"]: None for row in rows}
    panels = [(unit, [row for row in rows if row["unit"] == unit]) for unit in UNITS if unit in units]
    figure, axes = page([0.45 * len(of) + 0.7 for _, of in panels], 12, f"cachalot; {read('fleet.json')['machine']}")
    for axis, (unit, of) in zip(axes, panels):
        fleet(axis, unit, of)
    signs = [
        lines.Line2D([], [], color=OURS, marker="o", ls="", label="median"),
        lines.Line2D([], [], color="black", marker="|", label="least to most"),
        lines.Line2D([], [], color=OTHERS, marker="D", ls="", label="reference: bare client"),
        lines.Line2D([], [], color=LIMIT, lw=2, label="goal"),
    ]
    figure.legend(handles=signs, loc="outside lower left", ncols=4, frameon=False)
    save(figure, "fleet.svg")

    report = read("rivals.json")
    found = contests(report)
    if not found:
        sys.exit("rivals.json has no rows of other projects: measure with make bench-fleet FLAGS=\"--parts rivals,rival-stories --out docs/performance/rivals.json --rival …\"")
    heights = [0.35 * len(all_of) + 0.45 for _, all_of in found.values()]
    figure, axes = page(heights, 9, report["machine"])
    for axis, (title, (unit, all_of)) in zip(axes, found.items()):
        contest(axis, title, unit, all_of)
    save(figure, "rivals.svg")


if __name__ == "__main__":
    main()
