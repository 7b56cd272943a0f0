#!/usr/bin/env bash
# All tests, from cheap to dear; `make test` runs this. Ends with true counts over every runner.
#
#   e2e/test.sh            everything this machine allows (a real node needs root)
#   e2e/test.sh fast       what needs no Kubernetes
#
# Each stage's full output is kept in .lab/test-logs/; a failing stage does not hide the later ones.
set -uo pipefail
cd "$(dirname "$0")/.."

mode=${1:-all}
logs=.lab/test-logs
python=.lab/venv/bin/python
mkdir -p "$logs"
rm -f "$logs"/*.log
passed=0 failed=0 skipped=0
failures=()

# stage NAME COMMAND... : runs, shows, keeps the log, adds up what the runner counted.
stage() {
  local name=$1 log=$logs/${1// /-}.log start=$SECONDS rc
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  "$@" 2>&1 | tee "$log"
  rc=${PIPESTATUS[0]}
  count "$log"
  printf '== %s took %d s\n' "$name" $((SECONDS - start))
  if [ "$rc" -ne 0 ]; then
    failures+=("$name (log: $log)")
    # A stage that dies before its runner counts anything is one failure all the same.
    [ "$stage_failed" -gt 0 ] || failed=$((failed + 1))
  fi
  return 0
}

# count LOG : cargo ("test result: … N passed; M failed; K ignored"), go test -v, unittest, node --test.
count() {
  local sums
  sums=$(awk '
    /^test result:/ { for (i = 1; i < NF; i++) { if ($(i+1) ~ /^passed/) p += $i; if ($(i+1) ~ /^failed/) f += $i; if ($(i+1) ~ /^ignored/) s += $i } }
    /^SKIPPED/ { s++ }
    /^--- PASS/ { p++ } /^--- FAIL/ { f++ } /^--- SKIP/ { s++ }
    /^# pass [0-9]+$/ { p += $3 } /^# (fail|cancelled) [0-9]+$/ { f += $3 } /^# (skipped|todo) [0-9]+$/ { s += $3 }
    /^Ran [0-9]+ test/ { ran = $2 }
    /^(OK|FAILED)( \(|$)/ && ran != "" {
      bad = 0; skip = 0; line = $0
      if (match(line, /failures=[0-9]+/)) bad += substr(line, RSTART + 9, RLENGTH - 9)
      if (match(line, /errors=[0-9]+/)) bad += substr(line, RSTART + 7, RLENGTH - 7)
      if (match(line, /skipped=[0-9]+/)) skip += substr(line, RSTART + 8, RLENGTH - 8)
      p += ran - bad - skip; f += bad; s += skip; ran = ""
    }
    END { print p + 0, f + 0, s + 0 }' "$1")
  # shellcheck disable=SC2086
  set -- $sums
  passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3)) stage_failed=$2
}

finish() {
  printf '\n'
  if [ "${#failures[@]}" -gt 0 ]; then
    printf 'failed stage: %s\n' "${failures[@]}"
  fi
  printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
  [ "${#failures[@]}" -eq 0 ] && [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
}

venv() {
  local wanted=e2e/sdk/requirements.txt
  if [ ! -x "$python" ] || ! cmp -s "$wanted" .lab/venv/requirements.txt; then
    python3 -m venv .lab/venv && "$python" -m pip install -q -r "$wanted" && cp "$wanted" .lab/venv/
  fi
}

# The official JavaScript client, where there is a Node to run it.
javascript() {
  local wanted=e2e/sdk/js/package-lock.json
  if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    echo "SKIPPED: the OpenAI JavaScript client needs node and npm (20 or newer) in PATH"
    return 0
  fi
  if ! cmp -s "$wanted" .lab/js/package-lock.json || [ ! -d .lab/js/node_modules/openai ]; then
    mkdir -p .lab/js && cp e2e/sdk/js/package.json "$wanted" .lab/js/ &&
      npm ci --prefix .lab/js --ignore-scripts --no-audit --no-fund || return 1
  fi
  node --test --test-reporter=tap e2e/sdk/js/openai.test.mjs
}

if [ "$mode" != fast ]; then
  stage "tools" make --no-print-directory tools
  stage "python environment" venv
fi
stage "rust" cargo test --workspace --locked --no-fail-fast
# With the whole workspace, though the tests are of one package: for that one alone cargo would choose other features of its
# dependencies and build them again.
lab=(cargo test --workspace --features e2e/lab --locked --no-fail-fast)
stage "kubelab" env GOWORK=off CGO_ENABLED=0 go -C e2e/kubelab test -trimpath -v ./...
stage "up" env GOWORK=off CGO_ENABLED=0 go -C e2e/up test -v ./...
stage "dashboards" env GOWORK=off CGO_ENABLED=0 go -C e2e/dashboards test -v ./...
stage "gpu check scripts" python3 -m unittest discover -s kernels/check -p 'test_*.py'
stage "gpu check dry run" python3 -m unittest discover -s kernels/check -p dry_run.py
stage "model scripts" python3 -m unittest discover -s e2e/models/tiny-r1 -p 'test_*.py'
if [ "$mode" != fast ]; then
  stage "engine build" cargo build --release --locked -p engine -p operator -p kubectl-cachalot
  stage "openai sdk" "$python" -m unittest discover -s e2e/sdk -p 'test_*.py'
  stage "openai sdk javascript" javascript
  stage "control plane" "${lab[@]}" --test 'control_plane_*' -- --test-threads=2
  if [ "$(id -u)" -eq 0 ]; then
    stage "make up" make --no-print-directory up
    stage "real node" "${lab[@]}" --test 'node_*' -- --test-threads=1
    stage "make down" make --no-print-directory down
  else
    echo "SKIPPED: the end-to-end tests on a real node need root: sudo make test" | tee "$logs/real-node.log"
    skipped=$((skipped + 1))
  fi
fi
finish
