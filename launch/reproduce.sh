#!/usr/bin/env bash
# Reproduce a table of the paper: every row is trained, evaluated and reported beside the numbers that were printed.
#   bash launch/reproduce.sh table1 --gpus 8 [--output FOLDER] [--parts NAME ...] [--rows NAME ...] [-- --a.b VALUE ...]
# Started again, it does what is missing; --help lists all options. Paths are relative to the working folder.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # finds `eval` from any folder
command -v deepspeed >/dev/null || { cd "$root" && . launch/environment.sh requirements.txt && cd "$OLDPWD"; }
exec python -m eval.reproduce "$@"
