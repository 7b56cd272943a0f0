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
import whole


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


SHAPES = pathlib.Path(__file__).resolve().parent / "shapes"


def shape(name):
    return json.loads((SHAPES / f"{name}.json").read_text())


class Whole(unittest.TestCase):
    def test_a_step_of_all_layers_is_the_slices_terms(self):
        # By hand: dense (1.4 - 1.0) / 2 = 0.2, mixed 1.9 - 1.0 = 0.9, the rest 0.8: 0.8 + 3 * 0.2 + 58 * 0.9 = 53.6.
        times = {"one-dense": 1.0, "three-dense": 1.4, "one-mixed": 1.9}
        found = whole.extrapolate(shape("v3"), times)
        self.assertAlmostEqual(found["step_seconds"], 53.6)
        self.assertAlmostEqual(found["fixed_seconds"], 0.8)
        layers = {name: (part["num_hidden_layers"], part["first_k_dense_replace"]) for name, part in whole.slices(shape("v3")).items()}
        self.assertEqual(layers, {"one-dense": (1, 1), "three-dense": (3, 3), "one-mixed": (2, 1)})

    def test_times_that_say_nothing_are_refused(self):
        good = {"one-dense": 1.0, "three-dense": 1.4, "one-mixed": 1.9}
        for change in [{"three-dense": 0.9}, {"one-mixed": 1.0}, {"three-dense": 3.1}, {"one-dense": 0.0}, {"one-mixed": float("nan")}]:
            with self.assertRaises(ValueError, msg=change):
                whole.extrapolate(shape("v3"), good | change)
        with self.assertRaisesRegex(ValueError, "three-dense"):
            whole.extrapolate(shape("v3"), {"one-dense": 1.0, "one-mixed": 1.9})

    def test_the_published_numbers_of_parameters_are_found(self):
        # DeepSeek-V2-Lite: 2.4 B active parameters of the paper hold its 0.2 B of embedding rows that a step does not read,
        # but for one; 979 tokens/s are 4.8 TB/s of an H200 over what is left, in bf16.
        self.assertEqual(whole.read_parameters(shape("v2-lite"), 1), 2_451_308_544)
        line = {"batch": 1, "context": 0, "step_seconds": 1 / 979}
        self.assertAlmostEqual(whole.share_of_bandwidth(shape("v2-lite"), line, 4800), 1.0, places=3)
        # DeepSeek-V3: 37 B active parameters, embedding included (0.9 B).
        self.assertAlmostEqual(whole.read_parameters(shape("v3"), 1) / 1e9, 36.6, places=1)
        # Every expert is read when there are many sequences: 671 B without the embedding.
        self.assertAlmostEqual(whole.read_parameters(shape("v3"), 10_000) / 1e9, 670.1, places=0)

    def test_a_batch_reads_no_expert_twice(self):
        one, two, many = (whole.read_parameters(shape("v2-lite"), batch) for batch in [1, 2, 256])
        self.assertTrue(one < two < 2 * one and many < 16e9, (one, two, many))

    def test_the_slices_line_reads_what_the_backend_prints(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder, emulated=False)
            times = {(1, 1): 1.0, (3, 3): 1.4, (2, 1): 1.9}

            def answer(command, *_):
                config = json.loads(pathlib.Path(command[2]).read_text())
                step = times[config["num_hidden_layers"], config["first_k_dense_replace"]]
                return {"decode": [{"batch": 1, "step_seconds": step}, {"batch": 8, "step_seconds": 1.0}]}

            one.json = answer
            found = gpu_check.slices(one)
            self.assertAlmostEqual(found["whole"][0]["tokens_per_second"], 1 / 53.6)
            # A batch whose times say nothing is recorded as such, and the line is not ok.
            self.assertIn("error", found["whole"][1])
            self.assertFalse(found["ok"])
            table = "\n".join(plots.whole_models({}, [found["whole"][0]], 61))
            self.assertIn("| 1 | 200 | 900 | 800 | 5.36e+04 | 0.01866 |", table)


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
