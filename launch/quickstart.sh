#!/usr/bin/env bash
# From nothing to an unlearned model and a report, on any machine with Python and bash; no GPU, compiler or MPI.
#   bash launch/quickstart.sh            three seeds
#   SEEDS=0 bash launch/quickstart.sh    one seed, a third of the time
# Running it again does only what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${SEEDS:-}" ] || echo "== three seeds, about 9 minutes on two idle cores; SEEDS=0 bash launch/quickstart.sh takes a third"
. launch/environment.sh requirements.txt
. launch/ranks.sh

runs=runs/quickstart
seeds="${SEEDS:-0 1 2}"
# Two gloo ranks on the CPU, one thread each, also where there is a GPU: everybody gets the same numbers.
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
start=$SECONDS
step() { echo "== [$((SECONDS - start)) s] $*"; }

total=1 # trainings: the target, and three rules for each seed
for _ in $seeds; do total=$((total + 3)); done
begun=0 made=0 first_made=0

left() { # ", about N min left", by the runs that this start has made; nothing before the first of them
    [ "$made" -gt 0 ] || return 0
    local seconds=$(((SECONDS - first_made) * (total - begun + 1) / made))
    echo ", about $(((seconds + 59) / 60)) min left"
}

train() { # OUTPUT ARGUMENTS... : one run of the program on two ranks, unless it is there already
    local output="$1"
    shift
    begun=$((begun + 1))
    [ ! -e "$output/final" ] || return 0
    rm -rf "$output" # left over from a run that did not finish
    step "training $output ($begun of $total$(left)); log: $output.log"
    choose_launcher 2
    mkdir -p "$(dirname "$output")"
    [ "$begun" = 1 ] || [ "$first_made" -gt 0 ] || first_made=$SECONDS
    # The log gets everything, the terminal the lines of progress and warnings.
    "${launcher[@]}" --module pipeline.train --config launch/recipes/bios.yaml \
        --output "$output" "$@" 2>&1 | tee "$output.log" | { grep --line-buffered -E '^(step [0-9]+ of|warning: )' || :; } || {
        tail -n 30 "$output.log" >&2
        echo "error: $output failed; the whole log is $output.log" >&2
        exit 1
    }
    [ "$begun" = 1 ] || made=$((made + 1)) # the target is larger: its time does not predict the others'
}

evaluate() { # MODEL_OR_RUN OUTPUT
    [ ! -e "$2" ] || return 0
    step "evaluating $1"
    python -m eval.run --model "$1" --suite bios --data "$runs" --output "$2"
}

python -m eval.bios --output "$runs/bios"
train "$runs/target" --method target
evaluate "$runs/target/final" "$runs/target.json"
finished=()
for seed in $seeds; do
    for rule in sum pcgrad sago; do
        train "$runs/ga_$rule-seed$seed" --method "ga_$rule" --seed "$seed"
        evaluate "$runs/ga_$rule-seed$seed" "$runs/ga_$rule-seed$seed/evaluation.json"
        finished+=("$runs/ga_$rule-seed$seed")
    done
done
step "report"
python -m eval.report "${finished[@]}" --target "$runs/target.json" --output "$runs/report"
step "done; the losses live: .venv/bin/tensorboard --logdir $runs"
