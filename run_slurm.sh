#!/usr/bin/env bash
#SBATCH --job-name=flux
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@240
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#
# Trains on the nodes of a Slurm job, which starts itself again until the last step is done. From the recipe's folder, on a
# file system that all nodes see:
#
#   sbatch --nodes=4 run_slurm.sh train_configs/flux_dev.toml [--section.key value ...]
#
# NGPU                processes on each node (SLURM_GPUS_ON_NODE)
# FLUX_GRACE_SECONDS  what the ranks get to save after a signal (30 less than the --signal line above has)
# FLUX_EXPORT         further variables that the ranks see, with commas between: WANDB_API_KEY,AWS_PROFILE
# CONTAINER_IMAGE     an apptainer image to run in
#
# Log: slurm-JOB.log. How the run ended: slurm-JOB.json, and exit.json in the run's folder. docs/clusters.md has more.
set -euo pipefail

fail() {
    echo "$*" >&2
    exit 2
}

case ${1:-} in
-h | --help)
    sed -n '/^# Trains/,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
    exit
    ;;
"" | -*) fail "run_slurm.sh needs a configuration: sbatch run_slurm.sh train_configs/flux_dev.toml [--section.key value ...]" ;;
esac

NGPU=${NGPU:-${SLURM_GPUS_ON_NODE:-}}
missing=()
for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES; do [ -n "${!name:-}" ] || missing+=("$name"); done
[ -n "$NGPU" ] || missing+=("SLURM_GPUS_ON_NODE (or NGPU)")
if [ ${#missing[@]} -gt 0 ]; then
    missing=$(printf ', %s' "${missing[@]}")
    fail "Slurm's environment lacks ${missing:2}: start this script with sbatch, which sets them"
fi
[ -f run_train.sh ] || fail "$PWD is not the recipe's folder: submit from there, or with sbatch --chdir"

NNODES=$SLURM_JOB_NUM_NODES
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((10000 + SLURM_JOB_ID % 5000 * 4)) # below the ports a system hands out; neighbors on a node keep apart
FLUX_EXIT_RECORD=$PWD/slurm-$SLURM_JOB_ID.json
lead=$(sed -n 's/^#SBATCH --signal=TERM@//p' "$0")
FLUX_GRACE_SECONDS=${FLUX_GRACE_SECONDS:-$((lead - 30))} # the rest is for ending the step and the decision below
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$FLUX_GRACE_SECONDS       # for who puts torchrun in run_train.sh's place
CONFIG_FILE=$1
shift
export NGPU NNODES MASTER_ADDR MASTER_PORT CONFIG_FILE FLUX_EXIT_RECORD FLUX_GRACE_SECONDS TORCH_ELASTIC_SHUTDOWN_TIMEOUT

inside=()
if [ -n "${CONTAINER_IMAGE:-}" ]; then
    inside=(apptainer exec --nv "$CONTAINER_IMAGE")
    PYTHON=python
else # done once here, not by all nodes at the same time
    source setup_env.sh
    setup_env requirements.txt
fi
requeue=("${inside[@]}" "$PYTHON" -m scripts.requeue)
began=$("${requeue[@]}" begin --job.config_file "$CONFIG_FILE" "$@")

# What the ranks see of this environment, by name: no key or token is among it that was not asked for.
exported=$(compgen -e | grep -E '^(PATH|HOME|USER|LOGNAME|LANG|LC_.*|TZ|TMPDIR|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_.*|PYTHON.*)$
^(CUDA|NVIDIA|NCCL|GLOO|UCX|FI|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|OMP|HF|WANDB|APPTAINER|FLUX|TORCH_ELASTIC)_.*$
^(NGPU|NNODES|MASTER_ADDR|MASTER_PORT|CONFIG_FILE|LOG_RANK|XDG_CACHE_HOME)$' |
    grep -vE 'KEY|TOKEN|SECRET|PASS|CREDENTIAL' | paste -sd,)

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $NNODES nodes x $NGPU processes," \
    "$MASTER_ADDR:$MASTER_PORT, $FLUX_GRACE_SECONDS s to save after a signal"
on_all=(srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --cpu-bind=none)
if [ "$NNODES" -gt 1 ]; then
    code=0
    marker=$FLUX_EXIT_RECORD.seen
    touch "$marker"
    "${on_all[@]}" --export=PATH bash -c '[ -f "$0" ] && [ -f run_train.sh ] || { echo "$SLURMD_NODENAME does not see $0"; exit 2; }' \
        "$marker" >&2 || code=$?
    rm "$marker"
    [ "$code" != 2 ] || fail "all nodes of a job must see its folder: submit from a file system that they share"
fi

# To srun SIGTERM means to kill the ranks; SIGUSR1 it hands on, and to them both mean the same.
step=
trap '[ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true' TERM USR1
"${on_all[@]}" --export="$exported${FLUX_EXPORT:+,$FLUX_EXPORT}" "${inside[@]}" \
    bash -c 'NODE_RANK=$SLURM_NODEID exec ./run_train.sh "$@"' run_slurm.sh "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a trap ends `wait` early

# srun's code is that of some task; what counts is what the run says itself.
code=0
again=$("${requeue[@]}" end "$began" --job.config_file "$CONFIG_FILE" "$@") || code=$?
if [ -n "$again" ]; then
    # Slurm would requeue a job that its user has just cancelled, too.
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null || true)
    if [ "${state:-RUNNING}" != RUNNING ]; then
        echo "job $SLURM_JOB_ID is $state: it is not started again" >&2
    elif ! scontrol requeue "$SLURM_JOB_ID"; then
        echo "job $SLURM_JOB_ID could not be requeued: submit the same command again to go on" >&2
    fi
fi
exit "$code"
