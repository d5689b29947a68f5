#!/bin/bash
# Builds, then measures one part of the GPU benchmark beside its peers (memory: beside what was
# predicted; long: by itself) and renews the headline, the plots and the tables. Arguments: build
# folder, jobs, part, filter ("" for all cases).
# PYTHONPATH names the peers that are not installed; .peers is added where it exists.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
build=$1
jobs=$2
part=$3
filter=$4
check=${5:-few} # of steps: the rows trained without graphs too, for their bits
limit=460 # seconds: a part stays under 8 minutes, its build included

case $part in
  step | kernels | linear | product | attention) programs="qlab qlab-bench" ;;
  memory | long) programs=qlab ;;
  *)
    echo "make gpu-bench PART=step|kernels|linear|product|attention|memory|long: which part? got '$part'"
    exit 1
    ;;
esac
case $check in
  few | all | none) ;;
  *)
    echo "make gpu-bench CHECK=few|all|none: which steps are trained without graphs too? got '$check'"
    exit 1
    ;;
esac
if ! nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null; then
  echo "No NVIDIA GPU was found: make gpu-bench needs a GPU with its driver."
  exit 1
fi
if ! command -v python3 >/dev/null; then
  echo "make gpu-bench needs python3: it runs both sides and writes the report."
  exit 1
fi
if [[ -d .peers ]]; then export PYTHONPATH=$PWD/.peers${PYTHONPATH:+:$PYTHONPATH}; fi
export PYTHONDONTWRITEBYTECODE=1

start=$SECONDS
make configure BUILD="$build" || exit 1
# shellcheck disable=SC2086
cmake --build "$build" -j "$jobs" --target $programs || exit 1
printf '==> Built in %d s; measuring %s\n' $((SECONDS - start)) "$part"

status=0
# What does not fit keeps its older figures; FILTER=REGEX measures it alone.
rest=$((limit - (SECONDS - start)))
if [[ $part == memory || $part == long ]]; then
  python3 "bench/$part.py" --qlab "$build/qlab" --filter "$filter" --seconds $((rest - 20)) || status=$?
else
  timeout "$rest" python3 bench/measure.py "$part" --build "$build" --filter "$filter" --check "$check" \
    --seconds $((rest - 40)) || status=$?
fi
((status != 124)) || echo "Stopped after $limit s: at most our side was recorded; measure less with FILTER."
python3 bench/report.py || status=$?
printf '==> %d s in all\n' $((SECONDS - start))
exit "$status"
