#!/usr/bin/env bash
# Train on the machines of a hostfile, the ranks started by MPI (Open MPI, MPICH, Intel MPI).
#   bash launch/mpirun.sh HOSTFILE --config my.yaml [--method NAME] [--a.b VALUE ...]
# The machines share the disks, and ssh between them asks for nothing. MPI only starts the ranks; they talk by NCCL or
# gloo. More options for mpirun, e.g. the network it may use: MPIRUN_OPTIONS="--mca oob_tcp_if_include eth0".
set -euo pipefail
hosts="$(realpath -- "$1")" && shift
cd "$(dirname "$0")/.."
command -v deepspeed >/dev/null || . launch/environment.sh requirements.txt

slots="$(awk '!/^ *(#|$)/ { n = $2; sub("slots=", "", n); printf "%s%s:%s", comma, $1, n; comma = "," }' "$hosts")"
ranks="$(tr , '\n' <<<"$slots" | awk -F: '{ n += $NF } END { print n }')"
export UCX_TLS="${UCX_TLS:-tcp,self}" # for the few bytes that MPI itself carries; always there, unlike faster ways
options=()
if mpirun --version | grep -q 'Open MPI'; then
    # Bound to a core, as is its default, the threads of a rank would share that core.
    options+=(--hostfile "$hosts" -np "$ranks" --map-by slot --bind-to none)
    [ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
    # It hands on nothing by itself.
    for name in $(compgen -e | grep -E '^(PATH|LD_LIBRARY|PYTHON|DS_|OMP_|HF_|TOKENIZERS_|CUDA_|NCCL_|GLOO_|TORCH|UCX_|MPI4PY_)'); do
        options+=(-x "$name")
    done
else # Hydra, of MPICH and Intel MPI: hands on everything, reads another format of hostfile
    options+=(-hosts "$slots" -n "$ranks")
fi
read -ra more <<<"${MPIRUN_OPTIONS:-}"
exec mpirun "${options[@]}" "${more[@]}" "$(command -v python)" -m pipeline.train "$@"
