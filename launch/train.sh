#!/usr/bin/env bash
# Train on this machine: a rank for every GPU, or two on the CPU without a GPU.
#   bash launch/train.sh --config my.yaml [--method NAME] [--a.b VALUE ...]
# It uses the active environment, or else creates .venv in the repository. Paths are relative to the working folder.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # finds `pipeline` from any folder
command -v deepspeed >/dev/null || { cd "$root" && . launch/environment.sh requirements.txt && cd "$OLDPWD"; }

. "$root/launch/ranks.sh"
choose_device
choose_launcher
exec "${launcher[@]}" --module pipeline.train "$@"
