#!/usr/bin/env bash
# The matrix of docs/results/smollm2.md: rules on a real pretrained model, compared at matched forgetting.
#   bash launch/smollm2_matrix.sh OUTPUT [TOFU]
# TOFU is a folder with retain99.json, forget01.json, real_authors.json and world_facts.json, for a machine without the hub.
# Started again, it does what is missing. It uses one rank and one thread, or THREADS. Hours on two cores.
set -euo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: bash launch/smollm2_matrix.sh OUTPUT [TOFU]" >&2; exit 2; }
output="$(realpath -m "$1")" tofu="${2:+$(realpath "$2")}"
cd "$(dirname "$0")/.."
. launch/environment.sh requirements.txt
export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${THREADS:-1}" TOKENIZERS_PARALLELISM=false
mkdir -p "$output"

data=()
if [ -n "$tofu" ]; then
    { cat "$tofu/retain99.json"; echo; cat "$tofu/forget01.json"; } > "$output/full.json" # the rows of the hub's `full`
    for corpus in forget retain probes.forget probes.retain probes.others; do
        data+=("--data.$corpus.path" "$output/full.json")
    done
    for corpus in real_authors world_facts; do
        data+=("--data.probes.$corpus.path" "$tofu/$corpus.json")
    done
fi

bash launch/smollm2.sh "$output/model"
if [ ! -e "$output/target/final" ]; then
    resume=()
    [ ! -e "$output/target" ] || resume=(--resume)
    deepspeed --num_gpus 1 --module pipeline.train --config tofu_smollm2 --method target \
        --model.path "$output/model" --output "$output/target" "${data[@]}" "${resume[@]}"
fi

sweep() { # SEEDS METHOD...: sum, whose best weights are in question, with several of them; the other rules likewise
    python -m eval.frontier --config tofu_smollm2 --output "$output/matrix" --suite probes --ranks 1 --seeds $1 \
        --methods "${@:2}" --sweep synthesis.gamma="$gammas" -- --model.path "$output/target/final" "${data[@]}"
}
gammas=1 sweep 0 npo_sum npo_sago npo_pcgrad_element npo_pcgrad
gammas=1 sweep 0 ga_sum ga_sago ga_pcgrad_element ga_pcgrad
gammas=0.3 sweep 0 npo_sum npo_sago ga_sum ga_sago
gammas=1 sweep "0 1" npo_sum npo_sago
gammas=1 sweep 0 simnpo_sum simnpo_sago
