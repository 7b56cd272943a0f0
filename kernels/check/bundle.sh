#!/usr/bin/env bash
# Everything that a machine with a GPU needs for the check, in one archive: programs, the emulated driver and its outputs,
# golden models, shapes and scripts; the fatbins are in the programs. `make gpu-bundle` runs this; it needs no CUDA.
#
#   kernels/check/bundle.sh [FILE]
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${1:-.lab/cachalot-gpu-check.tar.gz}
limit=$((40 << 20))
folder=.lab/gpu-check
rm -rf "$folder"
mkdir -p "$folder/emulated" "$folder/models"

# built PACKAGE TARGET... : the program that cargo built for a target.
built() {
  cargo "${@:2}" --locked --quiet -p "$1" --message-format json-render-diagnostics |
    python3 -c 'import json, sys
found = [m["executable"] for m in map(json.loads, sys.stdin) if m.get("reason") == "compiler-artifact" and m.get("executable")]
print(found[-1] if found else "")'
}

ops=$(built kernels test --release --test ops --no-run)
device=$(built kernels bench --bench device --no-run)
backend=$(built engine-cuda build --release --example gpu-check)
for program in "$ops" "$device" "$backend"; do
  [ -x "$program" ] || { echo "gpu-bundle: a program does not build; see cargo build" >&2; exit 1; }
done
cp "$ops" "$folder/ops"
cp "$device" "$folder/device"
cp "$backend" "$folder/gpu-check"
strip "$folder/ops" "$folder/device" "$folder/gpu-check"
"$device" driver >"$folder/emulated/path"
cp "$(cat "$folder/emulated/path")" "$folder/emulated/libcuda.so.1"
rm "$folder/emulated/path"
# The emulator's outputs, so that the machine with the GPU need not run it.
KERNELS_DRIVER="$folder/emulated/libcuda.so.1" "$folder/device" outputs "$folder/emulator.bin" |
  python3 -c 'import json, sys
failed = json.load(sys.stdin)["failed"]
sys.exit(f"gpu-bundle: the emulator fails at {failed}" if failed else 0)'
for model in engine/cpu/tests/golden/*-cuda; do
  name=$(basename "$model")
  mkdir "$folder/models/$name"
  cp "$model/config.json" "$model/golden.json" "$model"/*.safetensors* "$folder/models/$name/"
done
cp kernels/check/{gpu_check,plots,runner,torch_side,whole}.py "$folder/"
cp -r kernels/check/shapes "$folder/shapes"

tar -C "$(dirname "$folder")" --owner 0 --group 0 -czf "$out" "$(basename "$folder")"
bytes=$(stat -c %s "$out")
[ "$bytes" -lt "$limit" ] || { echo "gpu-bundle: $out has $bytes bytes, the limit is $limit" >&2; exit 1; }
echo "$out: $bytes bytes; there: tar xzf $(basename "$out") && python3 gpu-check/gpu_check.py"
