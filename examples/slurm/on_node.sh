#!/bin/bash
# What each node of a training job runs: on_node.sh LOGS ENDPOINT [recipe.yaml] FLAGS; see train_job.sh, which starts it.
set -eo pipefail

logs=$1 endpoint=$2
shift 2
trap 'trap - EXIT; exit 0' INT TERM USR1 USR2 # before there are ranks nothing is lost
trap 'touch "$logs/$SLURMD_NODENAME.lacking"' EXIT # job_end.py reads it
eval "${LATHE_SETUP:-}" # in this shell, so that what it sets up reaches the ranks
trap - EXIT
set -u

# The job's first node keeps the store, whatever names resolve to. The others wait for it, should it start late.
is_host=$([ "$SLURM_NODEID" = 0 ] && echo true || echo false)

# shellcheck disable=SC2016  # torchrun's own sign for a rank, which begins each line of the job's log
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:-'[${rank}]: '}

exec "$LATHE_PYTHON" "$LATHE_HOME/examples/cluster/launcher.py" \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$LATHE_RANKS" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint "$endpoint" \
    --rdzv-conf "is_host=$is_host,read_timeout=900,join_timeout=900" \
    --log-dir "$logs/$SLURMD_NODENAME" \
    --tee 3 \
    "$LATHE_HOME/examples/pretrain_sft.py" "$@"
