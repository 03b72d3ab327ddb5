#!/usr/bin/env bash
# Trains. The first call sets up .venv; every argument goes to the configuration:
#
#   CONFIG_FILE=train_configs/flux_debug.toml ./run_train.sh --training.steps 5
#
# CONFIG_FILE  the run (train_configs/flux_tiny.toml)
# NGPU         processes on this machine (the number of its GPUs, or 1)
# LOG_RANK     the ranks whose output is shown (0)
set -euo pipefail
# Paths on the command line are relative to the recipe's own folder; CONFIG_FILE may also be to where it is called from.
[ ! -e "${CONFIG_FILE:-}" ] || CONFIG_FILE=$(realpath --relative-to="$(dirname "${BASH_SOURCE[0]}")" "$CONFIG_FILE")
cd "$(dirname "${BASH_SOURCE[0]}")"

CONFIG_FILE=${CONFIG_FILE:-train_configs/flux_tiny.toml}
LOG_RANK=${LOG_RANK:-0}

count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true
    else
        { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}
# On a CPU, glibc would give every gradient above 32 MB back to the system at each step and get it back zeroed: 5 to 8 %.
[ "$(count_gpus)" != 0 ] || export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592
NGPU=${NGPU:-$(count_gpus)}
[ "$NGPU" != 0 ] || NGPU=1
if ! [[ $NGPU =~ ^[1-9][0-9]*$ ]]; then
    echo "NGPU=$NGPU must be a number of processes, 1 or more" >&2
    exit 2
fi

source setup_env.sh
setup_env requirements.txt

# Without torch, so that a mistake in the configuration is answered at once.
for argument in "$@"; do
    case $argument in -h | --help) exec "$PYTHON" -m scripts.check_config --help ;; esac
done
"$PYTHON" -m scripts.check_config --job.config_file "$CONFIG_FILE" "$@" >/dev/null

if [ "$NGPU" = 1 ]; then
    exec "$PYTHON" train.py --job.config_file "$CONFIG_FILE" "$@"
fi

# torchrun answers every failure with 1, so the first rank that fails leaves the real code in a file.
records=$(mktemp -d)
trap 'rm -rf "$records"' EXIT
export FLUX_EXIT_RECORD=$records/exit.json
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + NGPU - 1) / NGPU))}

# In the background, because bash would hold a signal back until a foreground command ends; with job control, because
# background commands ignore Ctrl-C without it.
set -m
"$PYTHON" -m torch.distributed.run --nproc_per_node "$NGPU" --rdzv_backend c10d --rdzv_endpoint localhost:0 \
    --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
    train.py --job.config_file "$CONFIG_FILE" "$@" &
launcher=$!
trap 'interrupted=1; kill -TERM $launcher' TERM
trap 'interrupted=1; kill -INT $launcher' INT
interrupted=1
while [ "$interrupted" = 1 ]; do # a signal ends `wait`, not the launcher
    interrupted=0 code=0
    wait $launcher || code=$?
done
recorded=$(sed -n 's/.*"code": \([0-9]*\).*/\1/p' "$FLUX_EXIT_RECORD" 2>/dev/null || true)
if [ "$code" != 0 ] && [ "${recorded:-0}" != 0 ]; then
    code=$recorded
fi
exit "$code"
