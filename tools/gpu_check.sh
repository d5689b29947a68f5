#!/bin/bash
# Everything that needs a GPU: build, all tests, compute-sanitizer over the small CUDA cases, a short
# 8B training. Prints a table of steps; exits 1 if one failed. Arguments: build folder, jobs, and
# perhaps 75 or 80: then the CUDA tests run once more, from PTX of that version alone, translated by
# the driver: the code of older GPUs, on the GPU that is here.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
build=$1
jobs=$2
ptx=${3:-}
if [[ -n $ptx ]]; then
  build=$build/ptx$ptx
  # Each test is a process; what the first ones translate the others find there.
  export CUDA_CACHE_PATH=$PWD/$build/translated CUDA_CACHE_MAXSIZE=4294967296
fi
shards=$((jobs < 16 ? jobs : 16)) # processes per sanitizer tool
logs=$build/gpu-check
# The small cases; those that run out of memory on purpose would be reported as errors of the API. The
# tests of whole runs launch the same kernels again, which is too slow where every access is recorded.
filter='*Cuda*:*cuda*-*Large*:*Smollm2*:*DoesNotFit*'
racecheck_filter="$filter:*Train*:*Gang*:*Runner*:*Llama*"

if ! gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null); then
  echo "No NVIDIA GPU was found: nvidia-smi is missing or fails${gpu:+ ($gpu)}"
  echo "make gpu-check needs a GPU with its driver; make test runs everything that does not."
  exit 1
fi
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer || true)
rm -rf "$logs"
mkdir -p "$logs"

table=()
failed=0
# step NAME SECONDS COMMAND...: runs a step within a time limit and notes how it went.
step() {
  local name=$1 limit=$2 start=$SECONDS result=passed status=0
  shift 2
  printf '\n==> %s\n' "$name"
  timeout "$limit" "$@" || status=$?
  if ((status == 124)); then
    result="FAILED (over ${limit} s)"
  elif ((status != 0)); then
    result=FAILED
  fi
  [[ $result == passed ]] || failed=1
  table+=("$(printf '%-28s %-22s %6d s' "$name" "$result" $((SECONDS - start)))")
}

# One sanitizer tool over the small CUDA tests, split over processes. Every tensor gets its own
# cudaMalloc, so that an access beyond it is seen.
sanitize() {
  local tool=$1 shard status=0 pids=()
  if [[ -z $sanitizer ]]; then
    echo "compute-sanitizer was not found in PATH or /usr/local/cuda/bin: it is part of the CUDA Toolkit"
    return 1
  fi
  for ((shard = 0; shard < shards; ++shard)); do
    QLAB_PLAIN_ALLOC=1 OMP_NUM_THREADS=1 GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$shard \
      "$sanitizer" --tool "$tool" --error-exitcode 1 "$build/qlab_tests" \
      --gtest_filter="$([[ $tool == racecheck ]] && echo "$racecheck_filter" || echo "$filter")" --gtest_brief=1 >"$logs/$tool-$shard.log" 2>&1 &
    pids+=($!)
  done
  for ((shard = 0; shard < shards; ++shard)); do
    if ! wait "${pids[$shard]}"; then
      status=1
      tail -n 40 "$logs/$tool-$shard.log"
    fi
    grep -hE '^========= (ERROR|RACECHECK) SUMMARY|PASSED|tests ran' "$logs/$tool-$shard.log"
  done
  if ! grep -qE 'PASSED +\] [1-9]' "$logs/$tool"-*.log; then
    echo "no CUDA test ran: $build/qlab_tests --gtest_filter='$filter' found none that did"
    status=1
  fi
  return "$status"
}
export build logs shards sanitizer filter racecheck_filter
export -f sanitize

echo "GPU: $gpu"
step "build" 400 make build BUILD="$build" JOBS="$jobs" \
  ${ptx:+CMAKE_ARGS=-DQLAB_CUDA_ARCHITECTURES=$ptx-virtual}
if ((failed == 0)); then
  if ! grep -q 'QLAB_NVCC_WORKS' "$build/CMakeCache.txt"; then
    failed=1
    table+=("built without CUDA: no nvcc 12.4 or newer (see $build/configure.log)")
  elif [[ -n $ptx ]]; then
    step "CUDA tests from PTX $ptx" 500 tools/run_tests.sh "$build" $((jobs < 8 ? jobs : 8)) \
      -R '[Cc]uda'
  else
    step "tests" 240 tools/run_tests.sh "$build" $((jobs < 8 ? jobs : 8))
    step "short 8B training" 180 "$build/qlab" train experiments/gpu-check.yaml --device cuda \
      --out "$logs/train"
    step "compute-sanitizer memcheck" 200 bash -c 'sanitize memcheck'
    step "compute-sanitizer racecheck" 200 bash -c 'sanitize racecheck'
  fi
fi

printf '\n==> Summary (%d s in all; logs in %s)\n' "$SECONDS" "$logs"
printf '%s\n' "${table[@]}"
exit "$failed"
