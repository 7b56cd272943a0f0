#!/usr/bin/env python3
"""Builds the fatbins of cuda/ with a pinned nvcc from PyPI, checks them, and writes prebuilt/manifest.json.

    kernels/build.py            build everything, write prebuilt/
    kernels/build.py --check    build into a temporary folder and compare with what is committed
    kernels/build.py --check --if-available     the same where the toolkit is or can be installed; else says SKIPPED

Needs Python, g++ and, the first time, PyPI (104 MB). The output is the same bytes on every machine, so CI compares it.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A driver of CUDA 13.0 does not accept the PTX of a newer toolkit. The disassemblers were first published at 13.2.
PACKAGES = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-cuobjdump==13.2.86",
    "nvidia-cuda-nvdisasm==13.2.86",
]
INSTALL_SECONDS_MAX = 300
OPTIONS = ["-std=c++17", "-O3", "--compress-mode=size"]
GENERIC = ["sm_80", "sm_90a", "sm_100a"]
# Instructions a file claims to use, by architecture: their absence in the SASS fails the build.
CLAIMS = {
    "gemm_bf16": {"sm_80": ["HMMA.16816.F32.BF16", "LDGSTS"]},
    "gemm_fp8": {"sm_80": ["HMMA.16816.F32.BF16", "LDGSTS"]},
    "grouped_gemm_bf16": {"sm_80": ["HMMA.16816.F32.BF16", "LDGSTS"]},
    "grouped_gemm_fp8": {"sm_80": ["HMMA.16816.F32.BF16", "LDGSTS"]},
    "gqa_decode_bf16": {"sm_80": ["HMMA.16816.F32.BF16", "LDGSTS", "LDSM"]},
    "gqa_prefill_bf16": {"sm_80": ["HMMA.16816.F32.BF16", "LDGSTS", "LDSM"]},
    "mla_decode_bf16": {"sm_80": ["HMMA.16816.F32.BF16", "LDGSTS", "LDSM"]},
    "mla_decode_fp8": {"sm_80": ["HMMA.16816.F32.BF16", "LDGSTS", "LDSM"]},
    "mla_prefill_bf16": {"sm_80": ["HMMA.16816.F32.BF16", "LDGSTS", "LDSM"]},
    "hopper_gemm_bf16": {
        "sm_90a": [*(f"HGMMA.64x{rows}x16.F32.BF16" for rows in (16, 32, 64, 128)), "UTMALDG.3D"],
    },
    "hopper_gemm_fp8": {
        "sm_90a": [*(f"QGMMA.64x{rows}x32.F32.E4M3.E4M3" for rows in (16, 32, 64, 128)), "UTMALDG.3D"],
    },
    "hopper_mla_prefill_bf16": {"sm_90a": ["HGMMA.64x128x16.F32.BF16", "LDGSTS", "USETMAXREG"]},
    "hopper_mla_decode_bf16": {"sm_90a": ["HGMMA.64x64x16.F32.BF16", "HGMMA.64x256x16.F32.BF16", "LDGSTS", "USETMAXREG"]},
}


class NoToolkit(Exception):
    """It is not there and cannot be installed."""


def toolkit(venv: Path) -> Path:
    """The folder of the CUDA toolkit in a virtual environment, installed when it is not there."""
    marker = venv / "packages"
    if not marker.exists() or marker.read_text().split() != PACKAGES:
        install = [venv / "bin/pip", "install", "-q", "--no-deps", "--retries", "1", "--timeout", "15", *PACKAGES]
        try:
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            subprocess.run(install, check=True, timeout=INSTALL_SECONDS_MAX)
        except (subprocess.SubprocessError, OSError) as error:
            raise NoToolkit(f"nvcc cannot be installed from PyPI: {error}") from error
        marker.write_text("\n".join(PACKAGES))
    found = list(venv.glob("lib/python3*/site-packages/nvidia/cu13"))
    if not found:
        sys.exit(f"no CUDA toolkit in {venv}: delete the folder and run again")
    return found[0]


def headers() -> list[Path]:
    return sorted(HERE.glob("cuda/**/*.h"))


def source_hash(source: Path) -> str:
    """Over the file and every header, names included; src/image.rs computes the same."""
    digest = hashlib.sha256()
    for path in [*headers(), source]:
        digest.update(str(path.relative_to(HERE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def architectures(source: Path) -> list[str]:
    return ["sm_90a"] if source.parent.name == "sm90" else GENERIC


def build(source: Path, out: Path, cuda: Path) -> dict:
    name, archs = source.stem, architectures(source)
    codes = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in archs]
    if archs == GENERIC:
        codes.append("-gencode=arch=compute_80,code=compute_80")
    fatbin = out / f"{name}.fatbin"
    environment = {**os.environ, "PATH": f"{cuda / 'bin'}:{os.environ['PATH']}"}
    command = ["nvcc", *OPTIONS, *codes, "-fatbin", "-Xptxas", "-v", "-o", str(fatbin), str(source.relative_to(HERE))]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source.name}:\n{done.stderr}")
    if "instructions are serialized" in done.stderr:
        sys.exit(f"{source.name}: ptxas waits after every wgmma:\n{done.stderr}")
    kernels: dict[str, dict] = {}
    for entry, arch, body in re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'\n(.*?)(?=ptxas info\s*: Compiling|\Z)", done.stderr, re.S
    ):
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", body))
        stack = int(re.search(r"(\d+) bytes stack frame", body).group(1))
        registers = int(re.search(r"Used (\d+) registers", body).group(1))
        if spills or stack:
            sys.exit(f"{source.name}: {entry} for {arch} spills {spills} bytes and uses {stack} bytes of stack")
        kernels.setdefault(entry, {})[arch] = registers
    sass_check(name, fatbin, environment)
    data = fatbin.read_bytes()
    return {
        "name": name,
        "source": str(source.relative_to(HERE)),
        "source_sha256": source_hash(source),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "registers": kernels,
    }


def sass_check(name: str, fatbin: Path, environment: dict) -> None:
    for arch, claims in CLAIMS.get(name, {}).items():
        sass = subprocess.run(
            ["cuobjdump", "--dump-sass", "--gpu-architecture", arch, str(fatbin)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for claim in claims:
            if claim not in sass:
                sys.exit(f"{name}: no {claim} in the code for {arch}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with prebuilt/ instead of writing it")
    parser.add_argument("--if-available", action="store_true", help="succeed where there is no toolkit and no PyPI")
    parser.add_argument("--venv", type=Path, default=HERE / ".cuda", help="where the toolkit is or goes")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    try:
        cuda = toolkit(arguments.venv)
    except NoToolkit as error:
        if arguments.if_available:
            print(f"SKIPPED: the fatbins are not compared: {error}")
            return
        sys.exit(str(error))
    sources = sorted(HERE.glob("cuda/sm*/*.cu"))
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            fatbins = list(pool.map(lambda source: build(source, out, cuda), sources))
        manifest = {"compiler": PACKAGES[0], "options": OPTIONS, "fatbins": sorted(fatbins, key=lambda f: f["name"])}
        text = json.dumps(manifest, indent=2) + "\n"
        total = sum(fatbin["bytes"] for fatbin in fatbins)
        prebuilt = HERE / "prebuilt"
        if arguments.check:
            if (prebuilt / "manifest.json").read_text() != text:
                sys.exit("prebuilt/ is not what the sources give: run kernels/build.py and commit the result")
        else:
            prebuilt.mkdir(exist_ok=True)
            for old in prebuilt.glob("*.fatbin"):
                old.unlink()
            for fatbin in out.glob("*.fatbin"):
                (prebuilt / fatbin.name).write_bytes(fatbin.read_bytes())
            (prebuilt / "manifest.json").write_text(text)
        print(f"{len(fatbins)} fatbins, {total} bytes, no spills" + (", as committed" if arguments.check else ""))


if __name__ == "__main__":
    main()
