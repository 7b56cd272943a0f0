#!/usr/bin/env python3
"""Checks the kernels and the CUDA backend on a machine with a GPU, from the folder that `make gpu-bundle` made.

    python3 gpu_check.py [--out FOLDER] [--driver LIBRARY] [--only LINE,LINE]
    python3 gpu_check.py --emulated      a dry run over the emulated driver: small shapes, and its times mean nothing

Needs Python and a driver of CUDA 13.0; PyTorch and transformers for the lines that compare with them, compute-sanitizer for
two more. Every line has a time limit and the whole run ends within nine minutes; a line that fails, or for which no time was
left, is recorded, so that one run returns all there is. Writes results.json, table.md and SVG plots.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import plots
import whole

HERE = pathlib.Path(__file__).resolve().parent
# What a bf16 or fp8 kernel may differ by between the device and the emulator, relative to the largest value: the order of
# sums inside a tensor core, and ex2.approx. Codes, tokens and choices must be equal but for ties that rounding breaks.
DIFFERENCE_MAX = 2e-2
SAME_INTEGERS_MIN = 0.99
# Of the whole run, plots included in what is left of nine minutes.
SECONDS_MAX = 525


class Check:
    def __init__(self, arguments):
        self.emulated = arguments.emulated
        self.out = arguments.out
        self.only = set(arguments.only.split(",")) if arguments.only else None
        self.driver = str(HERE / "emulated/libcuda.so.1") if self.emulated else arguments.driver
        self.lines = {}
        self.end = time.monotonic() + SECONDS_MAX

    def run(self, command, limit, driver=None):
        """Standard output of a command; what it said to standard error is kept beside the results."""
        environment = {**os.environ, "KERNELS_DRIVER": driver or self.driver}
        environment.setdefault("KERNELS_SEED", "1")  # the same inputs on every card
        if (library := nccl()) and not self.emulated:
            environment.setdefault("KERNELS_NCCL", library)
        limit = max(min(limit, self.end - time.monotonic()), 0.1)
        done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=limit)
        with open(self.out / "stderr.txt", "a") as log:
            log.write(f"$ {' '.join(map(str, command))}\n{done.stderr}\n")
        return done

    def json(self, command, limit, driver=None):
        done = self.run(command, limit, driver)
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {last_line(done.stderr)}")
        return json.loads(done.stdout)

    def line(self, name, work):
        """Runs one line; its failure is its result."""
        if self.only and name not in self.only:
            return
        begin = time.monotonic()
        try:
            result = work()
        except subprocess.TimeoutExpired as error:
            result = {"ok": False, "error": f"not done after {error.timeout:.0f} s"}
        except Exception as error:  # noqa: BLE001: whatever it is, the other lines must run
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        result["seconds"] = round(time.monotonic() - begin, 1)
        self.lines[name] = result
        state = "left out" if result.get("skipped") else "ok" if result.get("ok") else "FAILED"
        print(f"{name:12} {state:8} {result['seconds']:6.1f} s  {result.get('error') or result.get('skipped') or ''}", flush=True)
        self.write()

    def write(self):
        results = {"emulated": self.emulated, "lines": self.lines}
        (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing said"


def machine(check):
    """What it runs on."""
    found = {"ok": True}
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"
        done = check.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], 20)
        found["nvidia_smi"] = done.stdout.strip()
    return found


def nccl():
    """The NCCL that came with PyTorch: its tests want a device for each rank, and one rank is enough to call everything."""
    places = (pathlib.Path(place) / "nvidia/nccl/lib/libnccl.so.2" for place in sys.path)
    return next((str(place) for place in places if place.exists()), None)


def tests(check):
    """Every kernel against float64: the tests of the kernels crate, on this driver."""
    command = [HERE / "ops", "--test-threads", "1"]
    if check.emulated:
        command += ["rows::", "attention::rope", "grouped::grouped_heads"]
    done = check.run(command, 110)
    outcomes = {}
    for line in done.stdout.splitlines():
        if line.startswith("test ") and " ... " in line:
            name, outcome = line.removeprefix("test ").split(" ... ", 1)
            outcomes[name] = outcome.strip()
    failed = [name for name, outcome in outcomes.items() if outcome.startswith("FAILED")]
    messages = [line[:300] for line in done.stdout.splitlines() if "panicked at" in line or "should be" in line]
    return {"ok": done.returncode == 0 and bool(outcomes), "tests": len(outcomes), "failed": failed, "messages": messages[:40],
            "error": f"{len(failed)} of {len(outcomes)} fail" if failed or done.returncode else None}


def emulator(check):
    """The same inputs on the device and on the emulator, value by value: what the emulator's reading of the manuals is worth."""
    mine = check.out / "device.bin"
    done = check.run([HERE / "device", "outputs", mine], 60)
    if done.returncode:
        raise RuntimeError(last_line(done.stderr))
    # The emulator's were made with the bundle: its inputs depend on the cases' names alone.
    found = check.json([HERE / "device", "compare", mine, HERE / "emulator.bin"], 20)
    bad = []
    for output in found["outputs"]:
        if "error" in output or not output["same_length"]:
            bad.append(output["name"])
        elif output["exact_kind"]:
            bad += [output["name"]] * (output["same_bits"] < SAME_INTEGERS_MIN)
        elif output["relative_difference"] > DIFFERENCE_MAX:
            bad.append(output["name"])
    mine.unlink()
    return {"ok": not bad and not found["missing"], "outputs": found["outputs"], "bad": bad,
            "error": f"{len(bad)} outputs differ" if bad else None}


def sanitizer(tool):
    def run(check):
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if check.emulated or not os.path.exists(program):
            return {"skipped": "needs a GPU and compute-sanitizer"}
        subjects = ["grouped::a_grouped", "attention::a_decoded", "experts::permutation", "sampling::a_row", "rows::greedy",
                    "rows::a_norm", "gemms::a_gemm", "fp8_cache::a_row"]
        done = check.run([program, "--tool", tool, "--error-exitcode", "9", HERE / "ops", "--test-threads", "1", *subjects], 45)
        summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        return {"ok": done.returncode == 0, "summary": summary, "error": None if done.returncode == 0 else last_line(done.stdout)}
    return run


def golden(check):
    """Logits and greedy tokens of small models against transformers' vectors, through the whole backend."""
    folders = sorted(path.parent for path in (HERE / "models").glob("*/golden.json"))
    if check.emulated:
        folders = folders[:1]
    found = check.json([HERE / "gpu-check", "golden", *folders], 60)
    # FP8 activations tip near ties of a gate; the others keep to bf16's rounding.
    bad = [one["model"] for one in found if "error" in one or ("fp8" not in one["model"] and one["worst"] > 5e-2)]
    return {"ok": not bad, "models": found, "error": ", ".join(bad) or None}


def speed(check):
    """Every kernel at true shapes, by events over graph replays."""
    command = [HERE / "device", "speed"] + (["--small"] if check.emulated else [])
    found = check.json(command, 150)
    bad = [case["name"] for case in found["cases"] if "error" in case]
    return {"ok": not bad, **found, "error": ", ".join(bad) or None}


def decode(check, shape, words):
    return check.json([HERE / "gpu-check", "model", shape, *words], 50)


def config_of(name):
    return json.loads((HERE / f"shapes/{name}.json").read_text())


def model(check):
    """Decode of a V2-Lite-shaped model from random weights, whole."""
    name, words = ("tiny", ["8", "1", "2"]) if check.emulated else ("v2-lite", ["512", "1", "8", "64", "256"])
    found = decode(check, HERE / f"shapes/{name}.json", words)
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
        found[slice_name] = decode(check, shape, words)
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


def bounds(check):
    """What this card does at best: a copy and a bf16 product of PyTorch; and PyTorch's own time for what the kernels do."""
    if check.emulated:
        return {"skipped": "needs a GPU"}
    return check.json([sys.executable, HERE / "torch_side.py", "bounds"], 60)


def transformers_logits(check):
    """Logits of random models of true head shapes, against transformers."""
    if check.emulated:
        return {"skipped": "needs a GPU"}
    return check.json([sys.executable, HERE / "torch_side.py", "logits", check.out / "weights"], 100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu-check-out"))
    parser.add_argument("--driver", default="libcuda.so.1")
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--only")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    check = Check(arguments)
    # The emulator's reading of the hardware first: what it says decides how the others are read.
    for name, work in [("machine", machine), ("emulator", emulator), ("tests", tests), ("golden", golden), ("bounds", bounds),
                       ("speed", speed), ("model", model), ("slices", slices), ("logits", transformers_logits),
                       ("memcheck", sanitizer("memcheck")), ("racecheck", sanitizer("racecheck"))]:
        check.line(name, lambda work=work: work(check))
    plots.write(check.out, check.lines, check.emulated)
    failed = [name for name, line in check.lines.items() if not line.get("ok") and not line.get("skipped")]
    print(f"results in {check.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
