#!/usr/bin/env bash
# Train on this machine: a rank for every GPU, or two on the CPU where there is none.
#   bash launch/train.sh --config my.yaml [--method NAME] [--a.b VALUE ...]
# In the environment that is active, or else in .venv, which is made. Paths are relative to the repository's root.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v deepspeed >/dev/null || . launch/environment.sh requirements.txt

ranks=() # the launcher's own default: all GPUs, or those of CUDA_VISIBLE_DEVICES
if [ "${DS_ACCELERATOR:-}" = cpu ] || ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    ranks=(--num_gpus 2)
fi
# A port of its own, so that two jobs on a machine do not meet.
port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
exec deepspeed "${ranks[@]}" --master_port "$port" --module pipeline.train "$@"
