#!/bin/bash
# Everything that needs a GPU: build, all tests, compute-sanitizer over the small CUDA cases, a short
# 8B training. Prints a table of steps; exits 1 if one failed. Arguments: build folder, jobs, and
# perhaps 75 or 80: then the CUDA tests run once more, from PTX of that version alone, translated by
# the driver: the code of older GPUs, on the GPU that is here. Or "" and names of compute-sanitizer's
# tools: then these alone run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
build=$1
jobs=$2
ptx=${3:-}
tools=${4:-}
if [[ -n $ptx && $ptx != 75 && $ptx != 80 ]]; then
  echo "make gpu-check PTX=75 or PTX=80: got '$ptx'"
  exit 1
fi
for tool in $tools; do
  [[ $tool =~ ^(memcheck|racecheck|initcheck|synccheck)$ ]] && continue
  echo "make gpu-check TOOLS='memcheck racecheck initcheck synccheck' or some of them: got '$tool'"
  exit 1
done
if [[ -n $ptx ]]; then
  build=$build/ptx$ptx
  # Each test is a process; what the first ones translate the others find there.
  export CUDA_CACHE_PATH=$PWD/$build/translated CUDA_CACHE_MAXSIZE=4294967296
fi
processes=$((jobs < 16 ? jobs : 16)) # of a sanitizer, or tests, at a time
logs=$build/gpu-check
# The small cases. Those that run out of memory or are refused a launch on purpose would be reported as
# errors of the API; whole runs launch the same kernels again, which takes long where every access is
# recorded.
filter='*Cuda*:*cuda*-*Large*:*Smollm2*:*DoesNotFit*:CudaErrors.*:Runs/*:Sweeps/*'
# Racecheck watches shared memory: the operations whose kernels use it, each kernel in a few shapes.
racecheck_filter=
for operation in AdamwTest Adamw8bitTest AdapterProductsTest AttentionTest CrossEntropyTest \
  Nf4LinearTest QuantizeTest RmsNormTest; do
  racecheck_filter+="Ops/$operation.*cuda*:"
done
racecheck_filter+='-*Large*:*Bits*:*Independent*:*Alone*:*Agree*:*Columns*:*DequantizesExactly*'
racecheck_filter+=':*MatchesDecodedValues*'
# Initcheck takes minutes, and gigabytes of the GPU beside each process, for tests that train a model
# many times over; others launch the same kernels.
initcheck_filter=$filter:*AMemberDoesNotSeeTheOthers*:*ChunksOfRowsChangeNoBit*
initcheck_filter+=':*RecomputeChangesNoBit*:*RecomputeKeepsNarrow*:*Nf4LinearTest.RowsAre*:*WarpgroupTiles*'

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

# Reports of racecheck that are known to be wrong, by a file or kernel in them:
# - attention_hopper_dkv.cuh: a warp reads, __syncwarp(), one lane arrives on the mbarrier for which the
#   next copy waits. The warp is converged there, so __syncwarp() compiles to nothing that is seen; and
#   what was read went into products that have ended before, so that no read is still under way.
# - attention_mma_backward.cu: two halves of a block, each with a barrier of its own, then __syncthreads().
#   compute-sanitizer 2025.3 takes reads before it and writes behind it for a race, 2026.4 does not.
# - nvjet: kernels of cuBLAS.
export wrong_reports='attention_hopper_dkv[.]cuh|attention_mma_backward[.]cu|nvjet'

# How many of a log's reports are not among them.
count_races() {
  awk -v wrong="$wrong_reports" '
    function close_report() { known += report ~ wrong; report = "" }
    /^=+ (Error|Warning): Race/ { close_report(); report = $0; next }
    /^=+ +and / { report = report $0; next }
    { close_report() }
    /^=+ RACECHECK SUMMARY/ { shown = $4; seen = 1 }
    END { print seen ? shown - known : "unknown" }' "$1"
}

# One part of a sanitizer's run: TOOL FILTER PARTS PART. Every tensor gets its own cudaMalloc, so that
# an access beyond it is seen.
sanitize_part() {
  local log=$logs/$1-$4.log status=0 own_code=1
  [[ $1 != racecheck ]] || own_code=0
  QLAB_PLAIN_ALLOC=1 OMP_NUM_THREADS=1 GTEST_TOTAL_SHARDS=$3 GTEST_SHARD_INDEX=$4 \
    "$sanitizer" --tool "$1" --error-exitcode "$own_code" --print-limit 0 "$build/qlab_tests" \
    --gtest_filter="$2" >"$log" 2>&1 || status=1
  [[ $1 != racecheck || $(count_races "$log") == 0 ]] || status=1
  if ((status != 0)); then # what is reported, and how often
    grep -E '^=+ +(at |Uninitialized|Invalid|Host API)|^=+ [A-Z].* error' "$log" |
      sed 's/0x[0-9a-f]*/ADDRESS/g; s/ in block.*//' | sort | uniq -c | sort -rn | head -n 20
    tail -n 40 "$log"
  fi
  grep -hE '^========= (ERROR|RACECHECK) SUMMARY|PASSED|tests ran' "$log"
  return "$status"
}

# One sanitizer tool over the small CUDA tests. More parts than processes even out their times.
sanitize() {
  local parts=$((3 * processes)) status=0 tests=$filter
  [[ $1 != racecheck ]] || tests=$racecheck_filter
  [[ $1 != initcheck ]] || tests=$initcheck_filter
  if [[ -z $sanitizer ]]; then
    echo "compute-sanitizer was not found in PATH or /usr/local/cuda/bin: it is part of the CUDA Toolkit"
    return 1
  fi
  seq 0 $((parts - 1)) |
    xargs -P "$processes" -I PART bash -c 'sanitize_part "$@"' _ "$1" "$tests" "$parts" PART || status=1
  if [[ $1 == racecheck ]]; then
    echo "$(grep -lE "$wrong_reports" "$logs"/racecheck-*.log | wc -l) of $parts parts have reports that are known to be wrong"
  fi
  if ! grep -qE 'PASSED +\] [1-9]' "$logs/$1"-*.log; then
    echo "no CUDA test ran: $build/qlab_tests --gtest_filter='$tests' found none that did"
    status=1
  fi
  return "$status"
}
export build logs processes sanitizer filter racecheck_filter initcheck_filter
export -f sanitize sanitize_part count_races

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
  elif [[ -n $tools ]]; then
    for tool in $tools; do
      step "compute-sanitizer $tool" 400 bash -c "sanitize $tool"
    done
  else
    OMP_NUM_THREADS=2 step "tests" 240 tools/run_tests.sh "$build" "$processes"
    step "short 8B training" 180 "$build/qlab" train experiments/gpu-check.yaml --device cuda \
      --out "$logs/train"
    step "compute-sanitizer memcheck" 150 bash -c 'sanitize memcheck'
    step "compute-sanitizer racecheck" 150 bash -c 'sanitize racecheck'
  fi
fi

printf '\n==> Summary (%d s in all; logs in %s)\n' "$SECONDS" "$logs"
printf '%s\n' "${table[@]}"
exit "$failed"
