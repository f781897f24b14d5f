# Sourced by train.sh and gpu_check.sh:
#   choose_launcher [--num_gpus N]
# Sets the array `launcher`: what starts that many ranks, or else one for each GPU, of CUDA_VISIBLE_DEVICES where that is
# set, at a free port, so that two jobs on a machine do not use the same one.

choose_launcher() {
    local port
    port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
    # DeepSpeed's launcher knows GPUs by their numbers alone, not by UUID (GPU-...) or MIG id.
    if [ $# -eq 0 ] && [[ "${CUDA_VISIBLE_DEVICES:-}" =~ [^0-9,[:space:]] ]]; then
        launcher=(torchrun --nproc_per_node gpu --master_port "$port")
    else # -q: it reports every process; the program's own lines are enough
        launcher=(deepspeed -q "$@" --master_port "$port")
    fi
}
