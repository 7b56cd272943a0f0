"""Makes the bundle and runs all of it over the emulated driver, from the archive alone, as a machine with a GPU would.

    python3 -m unittest discover -s kernels/check -p dry_run.py

Needs Cargo and a C++ compiler on x86-64, and says so where there is none; builds in release mode. The lines that compare with
PyTorch run where this Python has it.
"""

import json
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest

import torch_side

KERNELS = pathlib.Path(__file__).resolve().parent.parent
BYTES_MAX = 40 << 20
# Over the emulated driver on a busy machine; a device takes nine minutes at most.
SECONDS_MAX = 1800
# Lines that may be left out here, and what for.
OF_TORCH = {"bounds": {"torch"}, "logits": {"torch", "transformers", "safetensors"}}


def lacks():
    """What the bundle cannot be built without and is not here."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    programs = [name for name in ("cargo", compiler, "strip") if shutil.which(name) is None]
    return programs + ["an x86-64 processor"] * (platform.machine() != "x86_64")


class DryRun(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        if lacks():
            return
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        root = pathlib.Path(cls.folder.name)
        cls.archive = root / "bundle.tar.gz"
        subprocess.run([KERNELS / "check/bundle.sh", cls.archive], check=True)
        subprocess.run(["tar", "-C", root, "-xzf", cls.archive], check=True)
        cls.bundle, out = root / "gpu-check", root / "out"
        # No tool of this repository may be needed: neither its folder nor what builds it.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CARGO", "RUST", "KERNELS"))}
        command = [sys.executable, cls.bundle / "gpu_check.py", "--out", out, "--emulated"]
        cls.code = subprocess.run(command, cwd=root, env=environment | {"PATH": "/usr/bin:/bin"}, timeout=SECONDS_MAX).returncode
        cls.lines = json.loads((out / "results.json").read_text())["lines"]
        cls.table = (out / "table.md").read_text()
        cls.out = out

    def setUp(self):
        # Test by test, so that those who count tests count these.
        if lacks():
            self.skipTest(f"the bundle needs {', '.join(lacks())}")

    def test_the_bundle_is_small(self):
        self.assertTrue(1 << 20 < self.archive.stat().st_size < BYTES_MAX, self.archive.stat().st_size)

    def test_every_line_runs(self):
        for name, line in self.lines.items():
            with self.subTest(line=name):
                if reason := line.get("skipped"):
                    wanted = reason.removeprefix("needs ").split(" and ")
                    self.assertLessEqual(set(wanted), OF_TORCH.get(name, set()), reason)
                else:
                    self.assertTrue(line["ok"], line.get("error"))
        self.assertEqual(self.code, 0)
        self.assertEqual(list(self.lines), ["machine", "emulator", "tests", "golden", "bounds", "speed", "start", "model", "slices",
                                            "logits", "memcheck", "racecheck"])

    def test_the_sanitizers_meet_a_kernel_of_every_fatbin(self):
        fatbins = {path.stem for path in (KERNELS / "prebuilt").glob("*.fatbin")}
        self.assertEqual(len(fatbins), len(list((KERNELS / "prebuilt").iterdir())) - 1)
        for name in ("memcheck", "racecheck"):
            self.assertEqual(set(self.lines[name]["seen"]), fatbins)

    def test_pytorch_is_timed_for_cases_that_are_timed(self):
        done = subprocess.run([self.bundle / "device", "names"], check=True, capture_output=True, text=True)
        ours = set(json.loads(done.stdout))
        theirs = {name for name, _ in torch_side.comparisons(torch_side.WIDTHS["true"])}
        self.assertEqual(theirs - ours, set())

    def test_the_table_and_the_plots_are_there(self):
        for words in ("times mean nothing", "Start of tiny-v2", "| tiny | 1 |"):
            self.assertTrue(words in self.table, words)
        self.assertTrue((self.out / "bandwidth.svg").is_file() and (self.out / "decode.svg").is_file())


if __name__ == "__main__":
    unittest.main()
