#!/usr/bin/env bash
# What only a GPU can show, in under 8 minutes on one: that every step is exact there, and what it costs.
#   bash launch/gpu_check.sh [OUTPUT]      (default: runs/gpu_check)
#   SMALL=2 bash launch/gpu_check.sh       the same on a small model and few cases, also on 2 ranks of a CPU
# It writes OUTPUT/gpu_check.json, and OUTPUT/benchmarks.md: rows for docs/results/benchmarks.md.
set -euo pipefail
[ $# -le 1 ] || { echo "usage: bash launch/gpu_check.sh [OUTPUT]" >&2; exit 2; }
[[ "${SMALL:-1}" =~ ^[1-9][0-9]*$ ]] || { echo "error: SMALL=$SMALL: give a number of ranks, 1 or more" >&2; exit 2; }
output="$(realpath -m "${1:-runs/gpu_check}")"
cd "$(dirname "$0")/.."
. launch/environment.sh requirements.txt
. launch/ranks.sh
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 KINETO_LOG_LEVEL=99 # the profiler's own lines are left out
mkdir -p "$output"

if [ -n "${SMALL:-}" ]; then
    export OMP_NUM_THREADS=1
    check=(--small) pairs=1
    hidden=32 layers=2 vocabulary=256 tokens=16 dtype=float32 tensors="10 100" elements=65536
else
    check=() pairs=7
    hidden=2048 layers=18 vocabulary=32000 tokens=512 dtype=bfloat16 tensors="100 1000 2000 10000" elements=134217728
fi
[ -z "${SMALL:-}" ] || choose_device
where=() # on the CPU; on GPUs, all of them
if [ -n "${SMALL:-}" ] && [ "${DS_ACCELERATOR:-}" = cpu ]; then
    where=("$SMALL")
fi
part() { # MODULE ARGUMENTS... : a part on all ranks
    choose_launcher "${where[@]}" || return
    "${launcher[@]}" --module "$@"
}

echo "== is every step exact?"
failed=0
part pipeline.planning.device_check "${check[@]}" --output "$output/exact.json" || failed=1
echo "== what does a rule cost?"
part pipeline.planning.step_cost --ds-config zero3 --dtype "$dtype" --hidden "$hidden" --layers "$layers" \
    --vocabulary "$vocabulary" --tokens "$tokens" --accumulation 1 --warm-up 2 --pairs "$pairs" --json "$output/steps.json"
echo "== what does the combination alone cost?"
python -m pipeline.planning.combine_cost --tensors $tensors --elements "$elements" --json "$output/combination.json"
python -m pipeline.planning.device_rows "$output"
exit "$failed"
