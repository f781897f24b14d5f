# Sourced by the other scripts:
#   choose_launcher [RANKS]
# Sets the array `launcher`: what starts that many ranks on this machine, or else one for each visible GPU and two on a
# CPU, at a free port, so that two jobs on a machine do not use the same one (pipeline/distributed/launcher.py).

choose_launcher() {
    local words
    words="$(python -m pipeline.distributed.launcher "$@")" || return
    mapfile -t launcher <<<"$words"
}

# DeepSpeed and the program read these: on a machine without a GPU, one thread a rank on the CPU.
choose_device() {
    if [ "${DS_ACCELERATOR:-}" = cpu ] || ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    fi
}
