#!/bin/bash
# Runs every test of a build folder and says how many were skipped, and why. Arguments: folder, jobs.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
jobs=$2
log=$build/ctest.log

status=0
ctest --test-dir "$build" --output-on-failure -j "$jobs" 2>&1 | tee "$log" || status=$?

skipped=$(grep -c '\*\*\*Skipped' "$log" || true)
gpu=$(grep '\*\*\*Skipped' "$log" | grep -ci cuda || true)
if ((status != 0)); then
  echo "Tests failed: their output is above and in $log. One of them again, with all its output:"
  echo "  ctest --test-dir $build -V -R NAME"
fi
echo "Skipped tests: $skipped ($gpu of them need an NVIDIA GPU and a build with CUDA)"
exit "$status"
