import argparse
import json
import pathlib
import sys
import tempfile
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import gpu_check
import plots
import torch_side
import whole
from runner import HUNG, PORTABLE, Check, Late

HERE = pathlib.Path(__file__).resolve().parent


def check(folder, **changes):
    arguments = {"emulated": True, "out": pathlib.Path(folder), "only": None, "driver": "libcuda.so.1", "scratch": None} | changes
    return Check(argparse.Namespace(**arguments), pathlib.Path(folder))


def program(folder, name, text):
    """An executable of the bundle that runs some Python instead."""
    path = pathlib.Path(folder) / name
    path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{text}\n")
    path.chmod(0o755)


class Runner(unittest.TestCase):
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

    def test_an_answer_counts_also_where_its_program_does_not_go(self):
        with tempfile.TemporaryDirectory() as folder:
            text = "import time; print('[1]', flush=True); time.sleep(60)"
            self.assertEqual(check(folder, emulated=False).json([sys.executable, "-c", text], 2), [1])

    def test_no_command_outlives_the_whole_run(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            one.end = 0
            with self.assertRaises(Late):
                one.run([sys.executable, "-c", "import time; time.sleep(60)"], 100)

    def test_what_a_late_program_started_is_gone_and_what_it_said_is_kept(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder, emulated=False)
            # As compute-sanitizer does: the program that is killed only watches the one that uses the device.
            text = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); import time; time.sleep(60)"
            with self.assertRaises(Late) as late:
                one.run([sys.executable, "-c", text], 2)
            child = pathlib.Path("/proc") / late.exception.stdout.strip() / "stat"
            for _ in range(100):
                try:
                    if "(sleep) Z" in child.read_text():
                        return
                except OSError:
                    return
                time.sleep(0.05)
            self.fail(f"{child} is of a program that still runs")

    def test_after_a_kernel_that_does_not_end_the_backend_runs_without_such_kernels(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            program(folder, "gpu-check", f"""
portable = all(os.environ.get(name) == value for name, value in {PORTABLE}.items())
print(json.dumps([portable])) if portable else sys.exit("a trial was not done; {HUNG} this and that")""")
            one.line("golden", lambda: {"ok": True, "portable": one.backend(["golden"], 20)})
            one.line("model", lambda: {"ok": True, "portable": one.backend(["model"], 20)})
            self.assertEqual([line["portable"] for line in one.lines.values()], [[True], [True]])
            # What does not end is reported by the line that met it.
            self.assertEqual([line["ok"] for line in one.lines.values()], [False, True])
            self.assertIn("a trial was not done", one.lines["golden"]["error"])

    def test_another_failure_of_the_backend_is_not_tried_again(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            program(folder, "gpu-check", "open('count', 'a').write('x'); sys.exit('no device')")
            one.line("golden", lambda: one.backend(["golden"], 20))
            self.assertIn("no device", one.lines["golden"]["error"])
            self.assertEqual((pathlib.Path(folder) / "count").read_text(), "x")


    def test_a_dry_run_may_take_longer(self):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", "import time; time.sleep(1.5)"]
            self.assertEqual(check(folder).run(command, 1).returncode, 0)
            with self.assertRaises(Late):
                check(folder, emulated=False).run(command, 1)


class Lines(unittest.TestCase):
    def test_outputs_that_differ_fail_the_line(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            good = {"name": "a", "same_length": True, "exact_kind": False, "relative_difference": 1e-3, "same_bits": 0.9}
            cases = [({}, True), ({"relative_difference": 0.5}, False), ({"same_length": False}, False),
                     ({"exact_kind": True, "same_bits": 1.0}, True), ({"exact_kind": True, "same_bits": 0.5}, False)]
            for change, expected in cases:
                self.assertEqual(self.emulator(one, {"outputs": [good | change], "missing": []}), expected, change)

    def emulator(self, one, compared, failed=(), hopper=True):
        def answer(command, *_):
            if command[1] == "compare":
                return compared
            command[-1].touch()
            return {"outputs": 1, "hopper": hopper, "failed": list(failed)}
        one.json = answer
        return gpu_check.emulator(one)["ok"]

    def test_outputs_that_are_missing_fail_the_line_where_the_device_could_have_made_them(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            lacks = {"outputs": [], "missing": ["hopper_gemm: c"]}
            self.assertFalse(self.emulator(one, lacks))
            self.assertTrue(self.emulator(one, lacks, hopper=False))
            self.assertFalse(self.emulator(one, {"outputs": [], "missing": ["gemm: c"]}, hopper=False))
            failed = [{"name": "gemm", "error": "CUDA error 700"}]
            self.assertFalse(self.emulator(one, {"outputs": [], "missing": []}, failed=failed))

    def test_a_test_that_does_not_end_costs_neither_its_module_nor_the_others(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder, emulated=False)
            program(folder, "ops", """
tests = ["gemms::first", "gemms::hangs", "gemms::last", "rows::only"]
if "--list" in sys.argv:
    print("\\n".join(f"{name}: test" for name in tests)); sys.exit()
skipped = [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "--skip"]
for name in tests:
    if name.startswith(sys.argv[3]) and name not in skipped:
        print(f"test {name} ... ", end="", flush=True)
        time.sleep(60 if "hangs" in name else 0)
        print("ok", flush=True)""")
            seconds, gpu_check.MODULE_SECONDS = gpu_check.MODULE_SECONDS, 2
            try:
                found = gpu_check.tests(one)
            finally:
                gpu_check.MODULE_SECONDS = seconds
            self.assertEqual((found["tests"], found["failed"], found["ok"]), (4, ["gemms::hangs"], False))

    def test_a_run_of_tests_that_dies_is_not_ok(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            program(folder, "ops", "print('test rows::a ... ok', flush=True); os.abort()")
            found = gpu_check.tests(one)
            self.assertEqual((found["tests"], found["ok"]), (1, False))

    def test_every_model_is_held_to_a_bound(self):
        def judged(**changes):
            one = {"model": "m", "fp8_products": False, "relative_errors": [0.04, 0.01], "worst": 0.04} | changes
            with tempfile.TemporaryDirectory() as folder:
                found = check(folder)
                found.backend = lambda *_: [one]
                return gpu_check.golden(found)["ok"]
        narrow = {"fp8_products": True, "worst": 0.2}
        self.assertTrue(judged())
        self.assertFalse(judged(worst=0.06))
        self.assertFalse(judged(error="a shape"))
        self.assertTrue(judged(**narrow, relative_errors=[0.2, 0.1]))
        self.assertFalse(judged(**narrow, relative_errors=[0.2, 0.2]))
        self.assertFalse(judged(**narrow, relative_errors=[float("nan")]))

    def test_the_sanitizer_wants_every_fatbin_launched_and_nothing_said(self):
        good = {"cases": 2, "failed": [], "seen": ["a"], "unseen": []}

        def judged(answer, code=0, emulated=True, says=""):
            with tempfile.TemporaryDirectory() as folder:
                program(folder, "device", f"print({json.dumps(answer)!r}); sys.exit({code})")
                program(folder, "tool", f"""import subprocess
print("========= COMPUTE-SANITIZER")
code = subprocess.call(sys.argv[5:])
print({says!r})
sys.exit(9 if {says!r} else code)""")
                places, gpu_check.sanitizer_program = gpu_check.sanitizer_program, lambda: str(pathlib.Path(folder) / "tool")
                try:
                    return gpu_check.sanitizer("memcheck")(check(folder, emulated=emulated))
                finally:
                    gpu_check.sanitizer_program = places

        self.assertTrue(judged(good)["ok"])
        self.assertTrue(judged(good, emulated=False)["ok"])
        found = judged(good, emulated=False, says="========= ERROR SUMMARY: 3 errors")
        self.assertEqual((found["ok"], found["error"]), (False, "ERROR SUMMARY: 3 errors"))
        self.assertIn("hopper_gemm_fp8", judged(good | {"unseen": ["hopper_gemm_fp8"]})["error"])
        self.assertFalse(judged(good | {"failed": [{"name": "gemm", "error": "late"}]})["ok"])
        self.assertFalse(judged(good | {"cases": 0})["ok"])
        self.assertFalse(judged(good, code=1)["ok"])

    def test_a_sanitizer_that_is_late_says_where_it_was(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            one.end = time.monotonic() + 2
            program(folder, "device", """print("========= Invalid read", flush=True)
print("gemm\\nhopper_gemm", file=sys.stderr, flush=True)
time.sleep(60)""")
            found = gpu_check.sanitizer("racecheck")(one)
            self.assertEqual((found["ok"], found["said"]), (False, ["========= Invalid read"]))
            self.assertIn("the last case was hopper_gemm", found["error"])

    def test_times_that_were_taken_before_the_limit_are_kept(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            one.end = time.monotonic() + 2
            program(folder, "device", """print('{"name": "gemm"}\\nthread panicked\\n{"na', end="", file=sys.stderr, flush=True)
time.sleep(60)""")
            found = gpu_check.speed(one)
            self.assertEqual((found["ok"], found["cases"]), (False, [{"name": "gemm"}]))
            self.assertIn("not done after", found["error"])

    def test_weight_files_go_where_there_is_room_and_away_after_their_use(self):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder, scratch=pathlib.Path(folder))
            program(folder, "gpu-check", "print(json.dumps({'words': sys.argv[1:]}))")
            found = gpu_check.start(one)
            place = one.files
            self.assertEqual(found["files"]["words"], ["write", str(HERE / "shapes/tiny-v2.json"), str(place)])
            self.assertEqual([run["words"] for run in found["runs"]], [["start", str(place)]] * 2)
            one.clear()
            self.assertFalse(place.exists())
            self.assertIsNone(gpu_check.scratch(one, 1e18))


class Torch(unittest.TestCase):
    def run_bounds(self, lines, code=0):
        with tempfile.TemporaryDirectory() as folder:
            one = check(folder)
            one.run = lambda *_: argparse.Namespace(returncode=code, stdout="\n".join(map(json.dumps, lines)), stderr="no memory")
            lacks, gpu_check.absent = gpu_check.absent, lambda *_: None
            try:
                return gpu_check.bounds(one)
            finally:
                gpu_check.absent = lacks

    def test_what_was_measured_is_gathered_from_the_lines(self):
        rates = [{"copy_gb_per_s": 4000.0}, {"bf16_tflop_per_s": 0.0}]
        times = [{"torch": {"a": 1.0}, "by": {"a": "mm"}}, {"absent": {"b": "no"}}, {"torch": {"c": 2.0}, "by": {"c": "mm"}}]
        found = self.run_bounds(rates + times)
        self.assertEqual((found["ok"], found["torch"], found["absent"]), (True, {"a": 1.0, "c": 2.0}, {"b": "no"}))
        self.assertFalse(self.run_bounds(times)["ok"])
        cut = self.run_bounds(rates + times, code=1)
        self.assertEqual((cut["ok"], cut["torch"], cut["error"]), (False, {"a": 1.0, "c": 2.0}, "no memory"))

    def test_a_module_that_is_not_there_leaves_the_line_out(self):
        self.assertEqual(gpu_check.absent("json", "no_such_module"), {"skipped": "needs no_such_module"})
        self.assertIsNone(gpu_check.absent("json"))

    def test_small_widths_name_no_case_twice_and_are_of_the_same_kinds(self):
        kinds = {}
        for widths, values in torch_side.WIDTHS.items():
            names = [name for name, _ in torch_side.comparisons(values)]
            self.assertEqual(len(names), len(set(names)))
            kinds[widths] = {" ".join(word for word in name.split() if not word[0].isdigit()) for name in names}
        self.assertEqual(kinds["small"], kinds["true"])


class Bundle(unittest.TestCase):
    def test_the_bundle_has_every_module_that_the_scripts_import(self):
        modules = {path.stem for path in HERE.glob("*.py")}
        line = next(line for line in (HERE / "bundle.sh").read_text().splitlines() if line.startswith("cp kernels/check/{"))
        packed = set(line.split("{")[1].split("}")[0].split(","))
        imported = set()
        for name in packed:
            for line in (HERE / f"{name}.py").read_text().splitlines():
                words = line.split()
                if words[:1] in (["import"], ["from"]):
                    imported.add(words[1])
        self.assertEqual(imported & modules, packed - {"gpu_check", "torch_side"})


SHAPES = HERE / "shapes"


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
        self.assertEqual(plots.share_of_bound(self.CASE, 4000, 800), (0.5, "4000 GB/s"))
        flops = self.CASE | {"flops": 1e12, "milliseconds": 2.5}
        self.assertEqual(plots.share_of_bound(flops, 4000, 800), (0.5, "800 TFLOP/s"))
        self.assertIsNone(plots.share_of_bound(self.CASE, None, None))

    def test_a_product_of_fp8_is_held_to_the_rate_of_fp8(self):
        bounds = {"bf16_tflop_per_s": 800, "fp8_tflop_per_s": 1500}
        rates = [plots.rate_of_products(name, bounds) for name in ("hopper_gemm Fp8 1x2x3", "gemm Bf16 1x2x3", "rms_norm Fp8 1x2")]
        self.assertEqual(rates, [1500, 800, 800])
        self.assertEqual(plots.rate_of_products("gemm Fp8 1x2x3", {"bf16_tflop_per_s": 800}), 800)

    def test_hoppers_kernels_stand_beside_pytorchs_time_for_the_same_work(self):
        bounds = {"torch": {"gemm Fp8 1x2x3": 2.0, "mla_decode Bf16 1x9, 16 heads": 3.0}, "by": {"gemm Fp8 1x2x3": "_scaled_mm"},
                  "absent": {"grouped_gemm Fp8 1": "no operator"}}
        names = ["hopper_gemm Fp8 1x2x3", "hopper_mla_decode 1x9, 16 heads", "hopper_grouped_gemm Fp8 1", "permute"]
        self.assertEqual([plots.theirs(name, bounds) for name in names], ["2 (_scaled_mm)", "3 (PyTorch)", "absent", ""])

    def test_a_start_is_a_row_of_seconds_and_rates(self):
        run = {"open_seconds": 0.5, "load_seconds": 1.5, "first_token_seconds": 0.25, "start_seconds": 2.25, "bytes": 31.4e9,
               "load_gb_per_s": 20.9, "read_by_all_gb_per_s": 60.0, "copy_gb_per_s": 50.0, "share_of_bound": 0.42}
        table = plots.starts({"model": "v2-lite", "runs": [run]})
        self.assertEqual(table[-1], "| 0.5 | 1.5 | 0.25 | 2.25 | 20.9 | 60 | 50 | 42 % |")
        self.assertEqual(plots.starts({"skipped": "no room"}), [])

    def test_the_table_and_the_plots_are_written(self):
        lines = {"bounds": {"ok": True, "seconds": 1, "copy_gb_per_s": 4000, "bf16_tflop_per_s": 800, "torch": {"rms_norm <1>": 0.7}},
                 "speed": {"ok": False, "seconds": 2, "error": "gemm", "cases": [self.CASE, {"name": "gemm", "error": "700"}]}}
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder)
            plots.write(out, lines, True)
            table = (out / "table.md").read_text()
            self.assertIn("| rms_norm <1> | 0.5 | 2000 | 0.002 | 50 % of 4000 GB/s | 0.7 (PyTorch) |", table)
            self.assertIn("| speed | gemm | 2 |", table)
            self.assertIn("times mean nothing", table)
            self.assertIn("rms_norm &lt;1&gt;", (out / "bandwidth.svg").read_text())
            self.assertFalse((out / "flops.svg").exists())


if __name__ == "__main__":
    unittest.main()
