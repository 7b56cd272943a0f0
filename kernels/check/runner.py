"""Runs the programs of a check within their limits and records what came of each line.

Every program gets a session of its own, and whatever is left of that session is killed when its limit is over: a program that
a tool had started would go on using the device beside the next line. What it had said by then is kept.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

# Of the whole run, plots included in what is left of nine minutes.
SECONDS_MAX = 525
# How many times longer a dry run may take: the emulator on a busy machine is slow, and nobody waits for a device.
DRY_PATIENCE = 3
# Longest wait for a killed program: one that waits inside the driver may never go.
GONE_SECONDS = 10
# What the backend says where a kernel that it tried does not end, and how to run without such kernels.
HUNG = "portable kernels are chosen by"
PORTABLE = {"CACHALOT_CUDA_PRODUCTS": "portable", "CACHALOT_CUDA_ATTENTION": "portable"}


class Late(Exception):
    """A program was not done by its limit."""

    def __init__(self, seconds, stdout, stderr):
        super().__init__(f"not done after {seconds:.0f} s")
        self.stdout, self.stderr = stdout, stderr


class Failed(Exception):
    """A program ended with an error."""

    def __init__(self, done):
        super().__init__(f"exit {done.returncode}: {last_line(done.stderr)}")
        self.stdout, self.stderr = done.stdout, done.stderr


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing said"


def json_lines(text):
    """The objects among the lines of a text; the last line may be cut off."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def nccl():
    """The NCCL that came with PyTorch: its tests want a device for each rank, and one rank is enough to call everything."""
    places = (pathlib.Path(place) / "nvidia/nccl/lib/libnccl.so.2" for place in sys.path)
    return next((str(place) for place in places if place.exists()), None)


def in_session(command, limit, environment, folder):
    """A finished command, as subprocess.run gives it; its whole session is gone when this returns."""
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as error:
        program = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=error,
                                   start_new_session=True)
        try:
            code = program.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            try:
                os.killpg(program.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            try:
                program.wait(GONE_SECONDS)
            except subprocess.TimeoutExpired:
                pass
        out.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), error.read())


class Check:
    def __init__(self, arguments, folder):
        self.folder = folder
        self.emulated = arguments.emulated
        self.out = arguments.out
        self.only = set(arguments.only.split(",")) if arguments.only else None
        self.driver = str(folder / "emulated/libcuda.so.1") if self.emulated else arguments.driver
        self.lines = {}
        self.patience = DRY_PATIENCE if self.emulated else 1
        self.end = time.monotonic() + SECONDS_MAX * self.patience
        # Why the backend runs without Hopper's kernels, once one of them did not end.
        self.hung = None
        # Where weight files may go, those that a line left for a later one, and folders to delete.
        self.room = arguments.scratch
        self.files, self.kept = None, []

    def run(self, command, limit, environment=None):
        """What a command said; what it said to standard error is kept beside the results, also where it was not done."""
        environment = {"KERNELS_SEED": "1", **os.environ, "KERNELS_DRIVER": self.driver, **(environment or {})}
        if (library := nccl()) and not self.emulated:
            environment.setdefault("KERNELS_NCCL", library)
        limit = max(min(limit * self.patience, self.end - time.monotonic()), 0.1)
        done = in_session([str(word) for word in command], limit, environment, self.folder)
        with open(self.out / "stderr.txt", "a") as log:
            log.write(f"$ {' '.join(map(str, command))}\n{done.stderr}\n")
        if done.returncode is None:
            raise Late(limit, done.stdout, done.stderr)
        return done

    def json(self, command, limit, environment=None):
        try:
            done = self.run(command, limit, environment)
        except Late as late:
            # A program that a kernel holds may have answered, and yet not go.
            try:
                return json.loads(late.stdout)
            except ValueError:
                raise late from None
        if done.returncode:
            raise Failed(done)
        return json.loads(done.stdout)

    def backend(self, words, limit):
        """An answer of the backend; without Hopper's kernels from the first one on that does not end."""
        command = [self.folder / "gpu-check", *words]
        if self.hung is None:
            try:
                return self.json(command, limit)
            except Failed as failed:
                if HUNG not in failed.stderr:
                    raise
                self.hung = last_line(failed.stderr)
        return self.json(command, limit, PORTABLE)

    def line(self, name, work):
        """Runs one line; its failure is its result."""
        if self.only and name not in self.only:
            return
        begin = time.monotonic()
        hung = self.hung
        try:
            result = work()
        except Exception as error:  # noqa: BLE001: whatever it is, the other lines must run
            said = str(error) if isinstance(error, (Late, Failed)) else f"{type(error).__name__}: {error}"
            result = {"ok": False, "error": said}
        if self.hung != hung:
            result |= {"ok": False, "error": f"a kernel does not end: {self.hung}"}
        result["seconds"] = round(time.monotonic() - begin, 1)
        self.lines[name] = result
        state = "left out" if result.get("skipped") else "ok" if result.get("ok") else "FAILED"
        print(f"{name:12} {state:8} {result['seconds']:6.1f} s  {result.get('error') or result.get('skipped') or ''}", flush=True)
        self.write()

    def clear(self):
        """Deletes what lines left for each other."""
        for folder in self.kept:
            shutil.rmtree(folder, ignore_errors=True)
        self.files, self.kept = None, []

    def write(self):
        results = {"emulated": self.emulated, "lines": self.lines}
        (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
