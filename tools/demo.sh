#!/bin/bash
# Runs the demo sweep, which ends with a table of its results. Arguments: build folder, the demo model's file.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
model=$2

sweep=demo
if [[ ! -f $model ]]; then
  sweep=demo-scratch
  echo
  echo "The demo model is not there ($model), so the demo trains a small Llama from"
  echo "scratch on the same data instead. With a network, \`make demo\` runs the real one."
  [[ -f models/scratch/model.safetensors ]] || python3 tools/make_scratch_model.py --out models/scratch
fi
printf '\n==> Running the sweep experiments/%s.yaml\n' "$sweep"
"$build/qlab" sweep "experiments/$sweep.yaml" --out "runs/$sweep" || {
  echo "The sweep did not finish; the lines above and runs/$sweep/trials/*/log.txt say why."
  echo "\`make demo\` goes on with the trials that are not done; \`rm -r runs/$sweep\` starts over."
  exit 1
}
printf '\nOpen %s/runs/%s/report.html in a browser.\n' "$PWD" "$sweep"
