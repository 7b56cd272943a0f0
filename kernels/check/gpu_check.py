#!/usr/bin/env python3
"""Checks the kernels and the CUDA backend on a machine with a GPU, from the folder that `make gpu-bundle` made.

    python3 gpu_check.py [--out FOLDER] [--driver LIBRARY] [--only LINE,LINE] [--scratch FOLDER]
    python3 gpu_check.py --emulated      a dry run over the emulated driver: small shapes, and its times mean nothing

Needs Python and a driver of CUDA 13.0; PyTorch and transformers for the lines that compare with them, compute-sanitizer for
two more, and room for 32 GB of files for the start from files. Every line has a time limit and the whole run ends within nine
minutes; a line that fails, or for which no time was left, is recorded, so that one run returns all there is. Writes
results.json, table.md and SVG plots.
"""

import argparse
import glob
import importlib.util
import json
import pathlib
import shutil
import signal
import statistics
import sys
import tempfile
import time

import plots
import whole
from runner import PORTABLE, Check, Late, json_lines, last_line

HERE = pathlib.Path(__file__).resolve().parent
# What a bf16 or fp8 kernel may differ by between the device and the emulator, relative to the largest value: the order of
# sums inside a tensor core, and ex2.approx. Codes, tokens and choices must be equal but for ties that rounding breaks.
DIFFERENCE_MAX = 2e-2
SAME_INTEGERS_MIN = 0.99
# Largest error of a model's logits against transformers, and the mean where activations are rounded to e4m3: a tipped near tie
# of a gate moves a row further than that. As the CUDA backend's own tests allow.
ERROR_MAX = 5e-2
FLOAT8_MEAN_MAX = 0.16
# Of all modules of the kernels' tests, and of one; a kernel that does not end must not cost the others' time.
TESTS_SECONDS = 120
MODULE_SECONDS = 30


def machine(check):
    """What it runs on."""
    found = {"ok": True, "python": sys.version.split()[0]}
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"
        done = check.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], 20)
        found["nvidia_smi"] = done.stdout.strip()
    found["compute_sanitizer"] = sanitizer_program()
    modules = ("torch", "transformers", "safetensors", "triton")
    found["absent"] = [name for name in modules if importlib.util.find_spec(name) is None]
    return found


def outcomes_of(stdout):
    """By test, what the runner said; a test that was begun last and has no outcome did not end."""
    outcomes = {}
    for line in stdout.splitlines():
        if line.startswith("test ") and " ... " in line:
            name, outcome = line.removeprefix("test ").split(" ... ", 1)
            outcomes[name] = outcome.strip()
    return outcomes


def tests_of(check, filters, seconds):
    """Outcomes of the tests that a filter names, and what was said of those that fail."""
    outcomes, said = {}, ""
    # A test that does not end costs its module's time once: the others are run without it.
    for _ in range(3):
        skipped = [word for name in outcomes for word in ("--skip", name)]
        try:
            done = check.run([check.folder / "ops", "--test-threads", "1", *filters, *skipped], seconds)
            outcomes |= outcomes_of(done.stdout)
            return outcomes, said + done.stdout, done.returncode
        except Late as late:
            before = len(outcomes)
            outcomes |= {name: outcome or f"FAILED: {late}" for name, outcome in outcomes_of(late.stdout).items()}
            said += late.stdout
            if len(outcomes) == before:
                break
    return outcomes, said, None


def tests(check):
    """Every kernel against float64: the tests of the kernels crate, on this driver, a module at a time."""
    if check.emulated:
        groups = [["rows::", "attention::rope", "grouped::grouped_heads"]]
    else:
        listed = check.run([check.folder / "ops", "--list"], 20).stdout.splitlines()
        names = [line.removesuffix(": test") for line in listed if line.endswith(": test")]
        groups = [[f"{module}::"] for module in dict.fromkeys(name.split("::")[0] for name in names)]
    outcomes, said, cut, left = {}, "", [], TESTS_SECONDS
    for filters in groups:
        begin = time.monotonic()
        found, more, code = tests_of(check, filters, min(MODULE_SECONDS if not check.emulated else TESTS_SECONDS, max(left, 1)))
        left -= time.monotonic() - begin
        outcomes |= found
        said += more
        failures = any(outcome.startswith("FAILED") for outcome in found.values())
        cut += [filters[0]] * (code is None or (code != 0 and not failures))
    failed = [name for name, outcome in outcomes.items() if outcome.startswith("FAILED")]
    messages = [line[:300] for line in said.splitlines() if "panicked at" in line or "should be" in line]
    wrong = [f"{len(failed)} of {len(outcomes)} fail"] * bool(failed) + [f"{name} was not whole" for name in cut]
    return {"ok": bool(outcomes) and not wrong, "tests": len(outcomes), "failed": failed, "messages": messages[:40],
            "error": ", ".join(wrong) or (None if outcomes else "no test ran")}


def emulator(check):
    """The same inputs on the device and on the emulator, value by value: what the emulator's reading of the manuals is worth."""
    mine = check.out / "device.bin"
    made = check.json([check.folder / "device", "outputs", mine], 60)
    # The emulator's were made with the bundle: its inputs depend on the cases' names alone.
    found = check.json([check.folder / "device", "compare", mine, check.folder / "emulator.bin"], 20)
    mine.unlink()
    bad = []
    for output in found["outputs"]:
        if "error" in output or not output["same_length"]:
            bad.append(output["name"])
        elif output["exact_kind"]:
            bad += [output["name"]] * (output["same_bits"] < SAME_INTEGERS_MIN)
        elif not output["relative_difference"] <= DIFFERENCE_MAX:
            bad.append(output["name"])
    missing = [name for name in found["missing"] if made["hopper"] or not name.startswith("hopper")]
    return {"ok": not bad and not missing and not made["failed"], "outputs": found["outputs"], "bad": bad, "missing": missing,
            "failed": made["failed"], "error": f"{len(bad)} outputs differ, {len(missing)} are missing" if bad or missing else None}


def sanitizer_program():
    """NVIDIA's compute-sanitizer, or none."""
    of_toolkit = [glob.glob(f"/usr/local/cuda*/{folder}/compute-sanitizer") for folder in ("bin", "compute-sanitizer")]
    return next((place for place in [shutil.which("compute-sanitizer"), *sum(of_toolkit, [])] if place), None)


def sanitizer(tool):
    """A small launch of a kernel of every fatbin under a tool of compute-sanitizer; in a dry run the launches alone."""
    def run(check):
        program = sanitizer_program()
        if not check.emulated and not program:
            return {"skipped": "needs compute-sanitizer"}
        under = [] if check.emulated else [program, "--tool", tool, "--error-exitcode", "9"]
        try:
            done = check.run([*under, check.folder / "device", "once"], 60)
        except Late as late:
            said = [line for line in late.stdout.splitlines() if line.startswith("=========")]
            return {"ok": False, "said": said[:60], "error": f"{late}; the last case was {last_line(late.stderr)}"}
        said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        answer = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("========="))
        found = json.loads(answer) if answer.strip() else {"cases": 0, "failed": [], "unseen": []}
        wrong = [line.strip("= ") for line in said if "SUMMARY" in line] if done.returncode else []
        wrong += [last_line(done.stderr)] * (done.returncode != 0 and not wrong)
        wrong += [f"{one['name']}: {one['error']}" for one in found["failed"]]
        wrong += [f"no case launches {name}" for name in found["unseen"]]
        return {"ok": not wrong and found["cases"] > 0, **found, "said": said[:60], "error": "; ".join(wrong)[:600] or None}
    return run


def is_close(one):
    """Whether a model's logits are as near to transformers' as rounding allows; a NaN is not."""
    if one["fp8_products"]:
        return statistics.mean(one["relative_errors"]) <= FLOAT8_MEAN_MAX
    return one["worst"] <= ERROR_MAX


def golden(check):
    """Logits and greedy tokens of small models against transformers' vectors, through the whole backend."""
    folders = sorted(path.parent for path in (check.folder / "models").glob("*/golden.json"))
    if check.emulated:
        # One with bf16 products and the one with fp8 products.
        folders = [folder for folder in folders if folder.name in ("llama-cuda", "v3-fp8-cuda")]
    found = check.backend(["golden", *folders], 60)
    bad = [pathlib.Path(one["model"]).name for one in found if "error" in one or not is_close(one)]
    return {"ok": bool(found) and not bad, "models": found, "error": ", ".join(bad) or None}


def speed(check):
    """Every kernel at true shapes, by events over graph replays."""
    command = [check.folder / "device", "speed"] + (["--small"] if check.emulated else [])
    try:
        found, late = check.json(command, 150), None
    except Late as error:
        # Each case was said when it was done.
        found, late = {"cases": json_lines(error.stderr)}, str(error)
    bad = [case["name"] for case in found["cases"] if "error" in case]
    bad += [late] * bool(late)
    return {"ok": bool(found["cases"]) and not bad, **found, "error": ", ".join(bad) or None}


def config_of(name):
    return json.loads((HERE / f"shapes/{name}.json").read_text())


def scratch(check, size):
    """A new folder for so many bytes of files, in memory where there is room: what is spoken of as page cache is there too."""
    places = [check.room] if check.room else ["/dev/shm", tempfile.gettempdir(), check.out]
    for place in places:
        if pathlib.Path(place).is_dir() and shutil.disk_usage(place).free > 1.1 * size:
            return pathlib.Path(tempfile.mkdtemp(prefix="gpu-check-", dir=place))
    return None


def start(check):
    """From the opening of the driver to the first token of V2-Lite's shape, from files in the page cache."""
    name, size = ("tiny-v2", 10e6) if check.emulated else ("v2-lite", 32e9)
    folder = scratch(check, size)
    if folder is None:
        return {"skipped": f"needs {size / 1e9:.0f} GB of room: name a folder with --scratch"}
    check.kept.append(folder)
    files = check.json([check.folder / "gpu-check", "write", HERE / f"shapes/{name}.json", folder], 90)
    check.files = folder
    # Twice: the first one also finds the driver's own files cold.
    runs = [check.backend(["start", folder], 40) for _ in range(2)]
    return {"ok": True, "model": name, "folder": str(folder.parent), "files": files, "runs": runs}


def decode(check, shape, words, limit):
    return check.backend(["model", shape, *words], limit)


def model(check):
    """Decode of a V2-Lite-shaped model from random weights, whole."""
    name, words = ("tiny", ["8", "1", "2"]) if check.emulated else ("v2-lite", ["512", "1", "8", "64", "256"])
    # The files of the start are of the same shape, and read sooner than made up.
    given = check.files if check.files and not check.emulated else HERE / f"shapes/{name}.json"
    found = decode(check, given, words, 70)
    copy = check.lines.get("bounds", {}).get("copy_gb_per_s")
    if copy and not check.emulated:
        for line in found["decode"]:
            line["share_of_bandwidth"] = whole.share_of_bandwidth(config_of(name), line, copy)
    return {"ok": True, "models": {name: found}}


def slices(check):
    """Decode of three slices of V3's true width, and what they say about all 61 layers."""
    name, words = ("tiny-v3", ["8", "1", "2"]) if check.emulated else ("v3", ["512", "1", "8", "64"])
    config = config_of(name)
    found, seconds = {}, {}
    for slice_name, part in whole.slices(config).items():
        shape = check.out / f"{name}-{slice_name}.json"
        shape.write_text(json.dumps(part))
        found[slice_name] = decode(check, shape, words, 50)
        shape.unlink()
        for line in found[slice_name]["decode"]:
            seconds.setdefault(line["batch"], {})[slice_name] = line["step_seconds"]
    lines, bad = [], []
    for batch, times in seconds.items():
        try:
            line = whole.extrapolate(config, times)
            lines.append({"batch": batch, "context": int(words[0]), **line, "tokens_per_second": batch / line["step_seconds"]})
        except ValueError as error:
            lines.append({"batch": batch, "error": str(error)})
            bad.append(f"batch {batch}: {error}")
    # Over the emulated driver times mean nothing, so neither does their difference.
    return {"ok": check.emulated or not bad, "layers": config["num_hidden_layers"], "slices": found, "whole": lines,
            "error": "; ".join(bad) if bad and not check.emulated else None}


def absent(*modules):
    """A line's result where Python lacks what it needs, or none."""
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    return {"skipped": f"needs {' and '.join(lacking)}"} if lacking else None


def torch_words(check):
    """Device and widths of what PyTorch does: small and on the processor in a dry run."""
    return ["cpu", "small"] if check.emulated else ["cuda", "true"]


def bounds(check):
    """What this card does at best: a copy and products of PyTorch; and PyTorch's own time for what the kernels do."""
    if (lacks := absent("torch")):
        return lacks
    command = [sys.executable, HERE / "torch_side.py", "bounds", *torch_words(check)]
    try:
        done = check.run(command, 75)
        stdout, late = done.stdout, None if done.returncode == 0 else last_line(done.stderr)
    except Late as error:
        stdout, late = error.stdout, str(error)
    found = {"torch": {}, "by": {}, "passed_over": {}, "absent": {}}
    # A line for each thing measured, so that a run that is cut off leaves what it had.
    for part in json_lines(stdout):
        for key, value in part.items():
            found[key] = found[key] | value if isinstance(value, dict) else value
    measured = {"copy_gb_per_s", "bf16_tflop_per_s"} <= found.keys() and bool(found["torch"])
    wrong = late or (None if measured else "the card's rates were not measured")
    return {"ok": not wrong, **found, "error": wrong}


def transformers_logits(check):
    """Logits of random models of true head shapes, against transformers."""
    if (lacks := absent("torch", "transformers", "safetensors")):
        return lacks
    environment = {"GPU_CHECK_PROGRAM": str(check.folder / "gpu-check"), **(PORTABLE if check.hung else {})}
    folder = scratch(check, 5e9 if not check.emulated else 10e6)
    if folder is None:
        return {"skipped": "needs 5 GB of room: name a folder with --scratch"}
    check.kept.append(folder)
    return check.json([sys.executable, HERE / "torch_side.py", "logits", *torch_words(check), folder], 100, environment)


# In their order: the emulator's reading of the hardware first, for what it says decides how the others are read.
LINES = {"machine": machine, "emulator": emulator, "tests": tests, "golden": golden, "bounds": bounds, "speed": speed, "start": start,
         "model": model, "slices": slices, "logits": transformers_logits, "memcheck": sanitizer("memcheck"),
         "racecheck": sanitizer("racecheck")}
# Whose files a line uses that comes before another one.
LAST_WITH_FILES = ("model", "logits")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu-check-out"))
    parser.add_argument("--driver", default="libcuda.so.1")
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--only")
    parser.add_argument("--scratch", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.only and (unknown := set(arguments.only.split(",")) - LINES.keys()):
        parser.error(f"there is no line {', '.join(sorted(unknown))}; the lines are {', '.join(LINES)}")
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    check = Check(arguments, HERE)
    # Whoever ends this ends its programs and its files with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name, work in LINES.items():
            check.line(name, lambda work=work: work(check))
            if name in LAST_WITH_FILES:
                check.clear()
    finally:
        check.clear()
    failed = [name for name, line in check.lines.items() if not line.get("ok") and not line.get("skipped")]
    try:
        plots.write(check.out, check.lines, check.emulated)
    except Exception as error:  # noqa: BLE001: the results are written, and whoever reads this can plot them elsewhere
        print(f"no table or plots: {type(error).__name__}: {error}")
        failed.append("plots")
    print(f"results in {check.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
