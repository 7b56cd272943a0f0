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

# In one call, for cargo chooses the features of dependencies for all that is named together: in three the same crates would be
# built thrice. The last three are named and not built, so that whoever builds them next, as `make test` does, has those crates.
packages=(-p kernels -p engine-cuda -p engine -p operator -p kubectl-cachalot)
built=$(cargo build --release --locked --quiet "${packages[@]}" --test ops --bench device --example gpu-check \
  --message-format json-render-diagnostics | python3 -c 'import json, sys
for message in map(json.loads, sys.stdin):
    if message.get("reason") == "compiler-artifact" and message.get("executable"):
        print(message["target"]["name"], message["executable"])')
program() { awk -v name="$1" '$1 == name { sub(/^[^ ]* /, ""); print }' <<<"$built"; }
ops=$(program ops) device=$(program device) backend=$(program gpu-check)
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
