import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import gpu_check
import plots


def check(folder, **changes):
    arguments = {"emulated": True, "out": pathlib.Path(folder), "only": None, "driver": "libcuda.so.1"} | changes
    return gpu_check.Check(argparse.Namespace(**arguments))


class Lines(unittest.TestCase):
    def test_a_failing_line_is_recorded_and_the_next_one_runs(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            one.line("broken", lambda: one.json([sys.executable, "-c", "import sys; sys.exit('no device')"], 20))
            one.line("slow", lambda: one.json([sys.executable, "-c", "import time; time.sleep(60)"], 0.2))
            one.line("whole", lambda: {"ok": True, **one.json([sys.executable, "-c", "print('{\"cases\": []}')"], 20)})
            found = json.loads((one.out / "results.json").read_text())["lines"]
            self.assertEqual([line["ok"] for line in found.values()], [False, False, True])
            self.assertIn("no device", found["broken"]["error"])
            self.assertIn("not done after", found["slow"]["error"])

    def test_no_command_outlives_the_whole_run(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            one.end = 0
            with self.assertRaises(subprocess.TimeoutExpired):
                one.run([sys.executable, "-c", "import time; time.sleep(60)"], 100)

    def test_outputs_that_differ_fail_the_line(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            good = {"name": "a", "same_length": True, "exact_kind": False, "relative_difference": 1e-3, "same_bits": 0.9}
            cases = [({}, True), ({"relative_difference": 0.5}, False), ({"same_length": False}, False),
                     ({"exact_kind": True, "same_bits": 1.0}, True), ({"exact_kind": True, "same_bits": 0.5}, False)]
            for change, expected in cases:
                one.run = lambda command, *_: command[-1].touch() or argparse.Namespace(returncode=0, stderr="")
                one.json = lambda *_, change=change: {"outputs": [good | change], "missing": 0}
                self.assertEqual(gpu_check.emulator(one)["ok"], expected, change)


class Plots(unittest.TestCase):
    CASE = {"name": "rms_norm <1>", "milliseconds": 0.5, "bytes": 1e9, "flops": 1e6, "gb_per_s": 2000.0, "tflop_per_s": 0.002}

    def test_the_share_is_of_the_longer_bound(self):
        # 1 GB at 4000 GB/s takes 0.25 ms; 1 TFLOP at 800 TFLOP/s takes 1.25 ms.
        self.assertAlmostEqual(plots.share_of_bound(self.CASE, 4000, 800), 0.5)
        self.assertAlmostEqual(plots.share_of_bound(self.CASE | {"flops": 1e12, "milliseconds": 2.5}, 4000, 800), 0.5)
        self.assertIsNone(plots.share_of_bound(self.CASE, None, None))

    def test_the_table_and_the_plots_are_written(self):
        lines = {"bounds": {"ok": True, "seconds": 1, "copy_gb_per_s": 4000, "bf16_tflop_per_s": 800, "torch": {"rms_norm <1>": 0.7}},
                 "speed": {"ok": False, "seconds": 2, "error": "gemm", "cases": [self.CASE, {"name": "gemm", "error": "700"}]}}
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder)
            plots.write(out, lines, True)
            table = (out / "table.md").read_text()
            self.assertIn("| rms_norm <1> | 0.5 | 2000 | 0.002 | 50 % | 0.7 |", table)
            self.assertIn("| speed | gemm | 2 |", table)
            self.assertIn("times mean nothing", table)
            self.assertIn("rms_norm &lt;1&gt;", (out / "bandwidth.svg").read_text())
            self.assertFalse((out / "flops.svg").exists())


if __name__ == "__main__":
    unittest.main()
