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

refuse() {
    echo "error: $1" >&2
    exit 3
}

[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is no job of SLURM: call it from a job script or inside salloc"
export LATHE_RANKS=${LATHE_RANKS:-${SLURM_GPUS_ON_NODE:-}}
[[ $LATHE_RANKS =~ ^[1-9][0-9]*$ ]] ||
    refuse "LATHE_RANKS=$LATHE_RANKS: SLURM counts no GPUs for this job, so give the number of processes a node"
LATHE_HOME=${LATHE_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
export LATHE_HOME LATHE_PYTHON=${LATHE_PYTHON:-$LATHE_HOME/.venv/bin/python}
export PYTHONPATH=$LATHE_HOME${PYTHONPATH:+:$PYTHONPATH}
# Where nodes run a container, this script does not: there its interpreter may be missing, and any will do.
python=$(command -v "$LATHE_PYTHON" || command -v python3) || refuse "LATHE_PYTHON=$LATHE_PYTHON is not there"
job_end=("$python" "$LATHE_HOME/examples/cluster/job_end.py")

# Releases before 23.02 do not tell a job its end, before which the run saves and stops.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    if end=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null); then
        SLURM_JOB_START_TIME=$(date +%s)
        export SLURM_JOB_START_TIME SLURM_JOB_END_TIME=$end
    else
        echo "lathe: this job has no time limit that SLURM knows, so the run saves before none"
    fi
fi

# From 22.05 on srun does not take the cores of a task from sbatch, and a node's torchrun may get one core.
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
threads=$((cores / LATHE_RANKS))
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$cores}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}
# Sequence parallelism overlaps its collectives with products only where they are issued in order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# The address at which SLURM itself reaches the node; two jobs on a node must not meet at one port.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
endpoint=${address:-$first}:$((20000 + SLURM_JOB_ID % 10000))

run=${LATHE_RUN:-$("${job_end[@]}" where "$@")} || exit 3
status=0
logs=$("${job_end[@]}" begin "$run" "$@") || status=$?
case $status in
0) ;;
10) exit 0 ;; # the run is done
*) exit 3 ;;
esac
echo "lathe: job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NNODES nodes with $LATHE_RANKS processes each," \
    "$OMP_NUM_THREADS threads a process, meeting at $endpoint, logs in $logs"
env | sed -n 's/^NCCL_/lathe: NCCL_/p' | sort

# A job that went back to the queue keeps its number, and SLURM may repeat the signal that ended an earlier step more
# than a minute later. With a number of its own this start's step is not the one that is meant.
for ((past = 0; past < ${SLURM_RESTART_COUNT:-0}; past++)); do
    srun --quiet --nodes 1 --ntasks 1 true
done

# Signals that reach this script alone (--signal=B:USR1@600, Ctrl-C inside salloc) go on to all nodes.
srun --kill-on-bad-exit=1 --nodes "$SLURM_NNODES" --ntasks "$SLURM_NNODES" --ntasks-per-node 1 \
    ${LATHE_SRUN[@]+"${LATHE_SRUN[@]}"} \
    "$LATHE_HOME/examples/slurm/on_node.sh" "$logs" "$endpoint" "$@" </dev/null &
step=$!
trap 'kill -s USR1 "$step" 2>/dev/null || true' INT TERM USR1 USR2
while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # a signal ends it early
done
status=0
wait "$step" || status=$?
exec "${job_end[@]}" end "$run" "$status"
