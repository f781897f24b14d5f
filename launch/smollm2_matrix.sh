#!/usr/bin/env bash
# The matrix of docs/results/smollm2.md: rules on a real pretrained model, compared at matched forgetting.
#   bash launch/smollm2_matrix.sh OUTPUT [LOCAL]
# LOCAL is for a machine without the hub: a folder with tofu/{retain99,forget01,real_authors_perturbed,world_facts_perturbed}.json,
# wikitext2/wiki.test.raw and general/{arc_easy,piqa,lambada_openai,bigbench_qa_wikidata}.jsonl (forms: docs/examples/tasks).
# Started again, it does what is missing. A run takes 5 to 15 minutes on a core; THREADS (1) is for machines with more.
# Where there is a GPU it takes the first that is visible.
set -euo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: bash launch/smollm2_matrix.sh OUTPUT [LOCAL]" >&2; exit 2; }
output="$(realpath -m "$1")" local="${2:+$(realpath "$2")}"
cd "$(dirname "$0")/.."
. launch/environment.sh requirements.txt
. launch/ranks.sh
export OMP_NUM_THREADS="${THREADS:-1}" TOKENIZERS_PARALLELISM=false
choose_device
mkdir -p "$output/tasks"

data=() tofu=hf://datasets/locuslab/TOFU tasks=(arc_easy piqa lambada_openai real_authors world_facts wikitext_lines)
task() { # NAME FORM FILE: a task of the form of an example, on a file
    sed "s|^task: .*|task: $1|; s|{test: .*}|{test: $3}|" "docs/examples/tasks/$2.yaml" >"$output/tasks/$1.yaml"
}
if [ -n "$local" ]; then
    { cat "$local/tofu/retain99.json"; echo; cat "$local/tofu/forget01.json"; } >"$output/full.json" # as the hub's `full`
    for corpus in forget retain probes.forget probes.retain probes.others; do
        data+=("--data.$corpus.path" "$output/full.json")
    done
    tofu="$local/tofu"
    tasks+=(bigbench_qa_wikidata)
    for name in arc_easy piqa; do task $name arc_easy "$local/general/$name.jsonl"; done
    for name in lambada_openai bigbench_qa_wikidata; do task $name wikidata "$local/general/$name.jsonl"; done
    task wikitext_lines wikitext_lines "$local/wikitext2/wiki.test.raw"
else
    sed '/^dataset_kwargs:/,+1d; s|^dataset_path: .*|dataset_path: Salesforce/wikitext\ndataset_name: wikitext-2-raw-v1|' \
        docs/examples/tasks/wikitext_lines.yaml >"$output/tasks/wikitext_lines.yaml"
fi
for name in real_authors world_facts; do task $name real_authors "$tofu/${name}_perturbed.json"; done
general=(lm_eval --tasks "${tasks[@]}" --tasks-dir "$output/tasks" --limit 80)

bash launch/smollm2.sh "$output/model"
if [ ! -e "$output/target/final" ]; then
    rm -rf "$output/target" # left over from a run that did not finish
    choose_launcher 1
    "${launcher[@]}" --module pipeline.train --config tofu_smollm2 --method target \
        --model.path "$output/model" --output "$output/target" "${data[@]}"
fi
[ -e "$output/target.json" ] ||
    python -m eval.run --model "$output/target/final" --suite "${general[@]}" --output "$output/target.json"

sweep() { # "AXES" SEEDS METHOD...
    python -m eval.frontier --config tofu_smollm2 --output "$output/matrix" --suite probes \
        --target "$output/target.json" --level 0.2 --ranks 1 \
        --sweep $1 --seeds $2 --methods "${@:3}" -- --model.path "$output/target/final" "${data[@]}"
}
rules() { echo "$1_sum" "$1_pcgrad" "$1_pcgrad_element" "$1_sago"; }
sweep synthesis.gamma=1 0 $(rules npo)
sweep synthesis.gamma=1 0 $(rules ga)
sweep synthesis.gamma=1 "0 1" npo_sum npo_sago ga_sum ga_sago
sweep synthesis.gamma=1 0 simnpo_sum simnpo_sago
for gamma in 0.1 0.3 3; do sweep synthesis.gamma=$gamma 0 $(rules npo) $(rules ga); done
sweep "synthesis.rule=barrier synthesis.scope=element" 0 npo_sum # the candidate of docs/results/rules.md
for method in npo_sum npo_sago npo_pcgrad_element npo_pcgrad ga_sum ga_sago; do
    run="$output/matrix/runs/$method/synthesis.gamma=1/seed-0"
    [ -e "$run/evaluation.json" ] ||
        python -m eval.run --model "$run" --suite probes "${general[@]}" --output "$run/evaluation.json"
done
for method in npo_sum npo_sago npo_pcgrad_element; do
    python -m eval.robustness --run "$output/matrix/runs/$method/synthesis.gamma=1/seed-0" --suite probes \
        --attacks int4 nf4 relearn --ranks 1 --steps 20
done
python -m eval.report "$output"/matrix/runs/*/*/seed-*[0-9] --target "$output/target.json" --level 0.2 \
    --forget probes.forget.extraction_strength --retain probes.retain.extraction_strength --output "$output/report"
