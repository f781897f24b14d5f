#!/usr/bin/env bash
# Train on the machines of a hostfile; MPI (Open MPI, MPICH, Intel MPI) starts the ranks.
#   bash launch/mpirun.sh HOSTFILE --config my.yaml [--method NAME] [--a.b VALUE ...]
# The machines share their disks, and ssh between them needs no password. MPI only starts the ranks; they communicate by
# NCCL or gloo. More options for mpirun, e.g. its network: MPIRUN_OPTIONS="--mca oob_tcp_if_include eth0".
# Paths are relative to the working folder.
set -euo pipefail
hosts="$(realpath -- "$1")" && shift
root="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # finds `pipeline` from any folder
command -v deepspeed >/dev/null || { cd "$root" && . launch/environment.sh requirements.txt && cd "$OLDPWD"; }

slots="$(awk '
    function refuse(what) { print "error: " FILENAME ": " what >"/dev/stderr"; refused = 1; exit 2 }
    { sub(/#.*/, ""); slots = "" }
    { for (i = 2; i <= NF; i++) if ($i ~ /^slots=[1-9][0-9]*$/) slots = substr($i, 7) }
    NF && slots == "" { refuse($1 " has no slots=N; write the number of its ranks behind the name") }
    NF { printf "%s%s:%s", comma, $1, slots; comma = "," }
    END { if (!refused && comma == "") refuse("it names no machine; write a line NAME slots=N for each") }
' "$hosts")"
ranks="$(tr , '\n' <<<"$slots" | awk -F: '{ n += $NF } END { print n }')"
export UCX_TLS="${UCX_TLS:-tcp,self}" # for the few bytes that MPI itself sends; always available, unlike faster transports
options=()
if mpirun --version | grep -q 'Open MPI'; then
    # By default Open MPI binds a rank to one core, which all its threads would share.
    options+=(--hostfile "$hosts" -np "$ranks" --map-by slot --bind-to none)
    [ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
    # Open MPI passes no variables on by itself.
    for name in $(compgen -e | grep -E '^(PATH|LD_LIBRARY|PYTHON|DS_|OMP_|HF_|TOKENIZERS_|CUDA_|NCCL_|GLOO_|TORCH|UCX_|MPI4PY_)'); do
        options+=(-x "$name")
    done
else # Hydra, of MPICH and Intel MPI: passes all variables on, and reads another format of hostfile
    options+=(-hosts "$slots" -n "$ranks")
fi
read -ra more <<<"${MPIRUN_OPTIONS:-}"
exec mpirun "${options[@]}" "${more[@]}" "$(command -v python)" -m pipeline.train "$@"
