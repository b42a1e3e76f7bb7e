#!/bin/bash
# What a training job does on its first node: train_job.sh [recipe.yaml] FLAGS, those of pretrain_sft.py.
#
# Job scripts source it; inside salloc it is called by hand. It starts one torchrun a node, waits, and then decides by
# RUN/status.json how the job ends (examples/cluster/job_end.py). All of these variables may be left out:
#
#   LATHE_RANKS     processes a node; by default the GPUs that SLURM counts
#   LATHE_RETRIES   how often a job goes back to the queue after it was killed (3)
#   LATHE_UNTIL_DONE=1   it also goes back when its time is over, until the run is done
#   LATHE_SETUP     commands that each node runs first
#   LATHE_SRUN      a bash array: more flags of srun, for containers and mounts
#   LATHE_RUN       RUN, where the flags do not say it
#   LATHE_HOME, LATHE_PYTHON   the repository, and the interpreter ($LATHE_HOME/.venv/bin/python)
set -euo pipefail

# shellcheck source=examples/slurm/common.sh
source "${LATHE_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}/examples/slurm/common.sh"
export LATHE_RANKS=${LATHE_RANKS:-${SLURM_GPUS_ON_NODE:-}}
[[ $LATHE_RANKS =~ ^[1-9][0-9]*$ ]] ||
    refuse "LATHE_RANKS=$LATHE_RANKS: SLURM counts no GPUs for this job, so give the number of processes a node"

# Releases before 23.02 do not tell a job its end, before which the run saves and stops.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    for ((try = 0; try < 3; try++)); do # a controller that is busy says nothing, which is no answer
        end=$(squeue -h -j "$self" -o %e) && [ -n "$end" ] && break
        sleep 10
    done
    if [[ ${end:-} == 20* ]]; then
        SLURM_JOB_END_TIME=$(date -d "$end" +%s)
        SLURM_JOB_START_TIME=$(date +%s)
        export SLURM_JOB_START_TIME SLURM_JOB_END_TIME
    else
        echo "start: this job has no time limit that SLURM knows, so the run saves before none"
    fi
fi

threads=$((cores / LATHE_RANKS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}
# Sequence parallelism overlaps its collectives with products only where they are issued in order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# The address at which SLURM itself reaches the node; two jobs on a node must not meet at one port.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || refuse "scontrol does not say which nodes this job has"
first=${nodes%%$'\n'*}
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') || address=
endpoint=${address:-$first}:$((20000 + SLURM_JOB_ID % 10000))

run=${LATHE_RUN:-$("${job_end[@]}" where "$@")} || exit 3
status=0
logs=$("${job_end[@]}" begin "$run" "$@") || status=$?
case $status in
0) ;;
10) exit 0 ;; # the run is done
*) exit 3 ;;
esac
echo "start: job $self, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NNODES nodes with $LATHE_RANKS processes each," \
    "$OMP_NUM_THREADS threads a process, meeting at $endpoint, logs in $logs"
env | sed -n 's/^NCCL_/start: NCCL_/p' | sort

# A job that went back to the queue keeps its number, and SLURM may repeat the signal that ended an earlier step more
# than a minute later. With a number of its own this start's step is not the one that is meant.
for ((past = 0; past < ${SLURM_RESTART_COUNT:-0}; past++)); do
    srun --quiet --nodes 1 --ntasks 1 true || echo "start: a step that does nothing has failed"
done

srun --kill-on-bad-exit=1 --nodes "$SLURM_NNODES" --ntasks "$SLURM_NNODES" --ntasks-per-node 1 \
    ${LATHE_SRUN[@]+"${LATHE_SRUN[@]}"} \
    "$LATHE_HOME/examples/slurm/on_node.sh" "$logs" "$endpoint" "$@" </dev/null &
step=$!
wait_for_step "kill -s USR1 $step"
exec "${job_end[@]}" end "$run" "$status"
