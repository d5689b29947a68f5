#!/bin/bash
# Runs every test of a build folder and says how many were skipped, and why. Arguments: folder, jobs,
# and what else ctest is to be told.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
jobs=$2
shift 2
log=$build/ctest.log

# Each of the tests that run side by side gets its share of the cores, and waits without spinning.
threads=$(($(nproc) / jobs))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

status=0
ctest --test-dir "$build" --output-on-failure -j "$jobs" "$@" 2>&1 | tee "$log" || status=$?

skipped=$(grep -c '\*\*\*Skipped' "$log" || true)
if ((status != 0)); then
  echo "Tests failed: their output is above and in $log. One of them again, with all its output:"
  echo "  ctest --test-dir $build -V -R NAME"
fi
echo "Skipped, and why:"
# GoogleTest writes "FILE:LINE: Skipped" and on the next line why; ctest keeps all output there.
awk '/: Skipped$/ && (getline reason) > 0 { ++count[reason] }
     END { for (reason in count) printf "%6d  %s\n", count[reason], reason }' \
  "$build/Testing/Temporary/LastTest.log" | sort -k1,1nr -k2
echo "$(grep 'tests passed,' "$log" | tail -1); skipped, as said above: $skipped"
exit "$status"
