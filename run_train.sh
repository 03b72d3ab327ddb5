#!/usr/bin/env bash
# Trains. The first call sets up .venv; every argument goes to the configuration:
#
#   CONFIG_FILE=train_configs/flux_debug.toml ./run_train.sh --training.steps 5
#
# CONFIG_FILE  the run (train_configs/flux_tiny.toml)
# NGPU         processes on this machine (the number of its GPUs, or 1)
# LOG_RANK     the ranks that tell how they are doing, with commas between (0)
set -euo pipefail
# Paths on the command line are relative to the recipe's own folder; CONFIG_FILE may also be to where it is called from.
[ ! -e "${CONFIG_FILE:-}" ] || CONFIG_FILE=$(realpath --relative-to="$(dirname "${BASH_SOURCE[0]}")" "$CONFIG_FILE")
cd "$(dirname "${BASH_SOURCE[0]}")"

CONFIG_FILE=${CONFIG_FILE:-train_configs/flux_tiny.toml}

count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true
    else
        { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}
# On a CPU, glibc would give every gradient above 32 MB back to the system at each step and get it back zeroed: 5 to 8 %.
[ "$(count_gpus)" != 0 ] || export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592
if [ -z "${NGPU:-}" ]; then
    NGPU=$(count_gpus)
    [ "$NGPU" != 0 ] || NGPU=1
fi

source setup_env.sh
setup_env requirements.txt

for argument in "$@"; do
    case $argument in -h | --help) exec "$PYTHON" -m scripts.check_config --help ;; esac
done
export NGPU
exec "$PYTHON" -m scripts.launch --job.config_file "$CONFIG_FILE" "$@"
