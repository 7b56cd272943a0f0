#!/usr/bin/env python3
"""Lines of the kernels' sources that their tests run on the emulated driver, by g++ and gcov.

    kernels/check/coverage.py             run the tests, print a table
    kernels/check/coverage.py --missed    name the lines that no test ran, too

Needs g++, gcov and Cargo; some minutes. A line counts where the compiler made code of it, in any kernel that includes it; the
mutation tests are left out, since they run other sources.
"""

import argparse
import collections
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent
ROOT = KERNELS.parent


def target_folder() -> Path:
    metadata = subprocess.run(["cargo", "metadata", "--format-version=1", "--no-deps", "--locked"], cwd=ROOT, check=True,
                              capture_output=True, text=True)
    return Path(json.loads(metadata.stdout)["target_directory"])


def run_tests(compiler: Path) -> None:
    compiler.write_text('#!/bin/sh\nexec g++ --coverage -fprofile-update=atomic "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    command = ["cargo", "test", "--locked", "-p", "kernels", "--test", "ops", "--", "--skip", "mutation::"]
    done = subprocess.run(command, cwd=ROOT, env={"KERNELS_SEED": "1", **os.environ, "CXX": str(compiler)})
    if done.returncode:
        sys.exit("the tests failed: their coverage says nothing")


def lines_of(objects: Path) -> dict[Path, dict[int, bool]]:
    """By source: whether each line that is code was run."""
    found: dict[Path, dict[int, bool]] = collections.defaultdict(dict)
    for data in sorted(objects.glob("*.gcda")):
        report = subprocess.run(["gcov", "--json-format", "--stdout", str(data)], cwd=objects, check=True, capture_output=True)
        for line in report.stdout.splitlines():
            for file in json.loads(line)["files"]:
                path = (objects / file["file"]).resolve()
                if KERNELS not in path.parents:
                    continue
                for entry in file["lines"]:
                    number = entry["line_number"]
                    found[path][number] = found[path].get(number, False) or entry["count"] > 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missed", action="store_true")
    missed = parser.parse_args().missed
    objects = target_folder() / "tmp" / "emulation"
    for old in [*objects.glob("*.gcda")]:
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        run_tests(Path(folder) / "g++")
    found = lines_of(objects)
    if not found:
        sys.exit(f"no test left counts in {objects}: is gcov the one of this g++?")
    folders: dict[str, list[tuple[Path, dict[int, bool]]]] = collections.defaultdict(list)
    for path, lines in sorted(found.items()):
        folders[str(path.parent.relative_to(KERNELS))].append((path, lines))
    for folder, files in folders.items():
        run = sum(sum(lines.values()) for _, lines in files)
        code = sum(len(lines) for _, lines in files)
        print(f"{folder}: {run} of {code} lines, {100 * run / code:.1f} %")
        for path, lines in files:
            absent = sorted(number for number, was_run in lines.items() if not was_run)
            print(f"  {path.name}: {len(lines) - len(absent)} of {len(lines)}")
            if missed:
                text = path.read_text().splitlines()
                for number in absent:
                    print(f"    {number}: {text[number - 1].strip()}")


if __name__ == "__main__":
    main()
