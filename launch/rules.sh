#!/usr/bin/env bash
# The runs of docs/results/rules.md: every rule on `bios`, and the search for a better one.
#   bash launch/rules.sh OUTPUT            world 0, seeds 0 1 2: every rule, and the candidates and rivals of the search
#   bash launch/rules.sh OUTPUT WORLD...   fresh worlds (1 2 3 4 5), the seed of its number: `barrier` by element beside its rivals
# Started again, it does what is missing. A run takes 40 seconds of a core, a target model two minutes: two hours for
# world 0. SEEDS="0" makes one seed of it.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash launch/rules.sh OUTPUT [WORLD...]" >&2; exit 2; }
output="$(realpath -m "$1")"
shift
cd "$(dirname "$0")/.."
. launch/environment.sh requirements.txt
. launch/ranks.sh
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

world() { # NUMBER: its people and facts, and the model that knows them all
    folder="$output/world$1"
    [ -e "$folder/bios" ] || python -m eval.bios --output "$folder/bios" --seed "$1"
    if [ ! -e "$folder/target/final" ]; then
        rm -rf "$folder/target" # left over from a run that did not finish
        choose_launcher 1
        "${launcher[@]}" --module pipeline.train --config bios --method target --model.path "$folder/bios/base" \
            --data.forget.path "$folder/bios/forget.jsonl" --data.retain.path "$folder/bios/all.jsonl" \
            --output "$folder/target"
    fi
    [ -e "$folder/target.json" ] ||
        python -m eval.run --model "$folder/target/final" --suite bios --data "$folder" --output "$folder/target.json"
}

sweep() { # NAME SEEDS "METHODS" "AXES" [OVERRIDES...]
    python -m eval.frontier --config bios --ranks 1 --data "$folder" --target "$folder/target.json" \
        --output "$folder/$1" --seeds $2 --methods $3 --sweep $4 -- \
        --train.micro_batch_size 16 --model.path "$folder/target/final" \
        --data.forget.path "$folder/bios/forget.jsonl" --data.retain.path "$folder/bios/retain.jsonl" "${@:5}"
}

both="npo_sum ga_sum" element="synthesis.scope=element"
if [ $# -eq 0 ]; then
    world 0
    seeds="${SEEDS:-0 1 2}"
    rules=sago,sum,pcgrad,mgda,cagrad,imtl_g,conflict_free,nash_mtl,auxinash,aligned_mtl,upgrad
    rules+=,dualproj,barrier,mask,agem,gradvac,graddrop,bloop,sdmgrad,gru,blur
    sweep rules "$seeds" "$both" synthesis.rule=$rules
    sweep element "$seeds" "$both" "synthesis.rule=pcgrad,barrier $element"
    sweep global "$seeds" "$both" "synthesis.rule=pcgrad synthesis.scope=global"
    sweep weights "$seeds" npo_sum synthesis.gamma=0.02,0.06 # of the recipe's 0.2: a tenth and three tenths
    sweep weights "$seeds" ga_sum synthesis.gamma=0.1,0.3
    for scope in global module; do
        sweep adam "$seeds" "$both" "synthesis.rule=pcgrad synthesis.scope=$scope" --synthesis.metric adam
    done
    confine=(--synthesis.confine.share 0.2 --synthesis.confine.by)
    sweep mean_square "$seeds" "$both" "synthesis.rule=sago,pcgrad $element" "${confine[@]}" forget_mean_square
    sweep ratio "$seeds" "$both" synthesis.rule=sago "${confine[@]}" forget_over_retain
    python -m eval.report "$folder"/{rules,element,global,weights}/runs/*/*/seed-*[0-9] \
        --target "$folder/target.json" --output "$output/report"
fi
for number in "$@"; do
    world "$number"
    sweep element "$number" "$both" "synthesis.rule=sago,pcgrad,barrier $element"
    sweep weights "$number" npo_sum synthesis.gamma=0.02,0.06
    sweep weights "$number" ga_sum synthesis.gamma=0.1,0.3
done
