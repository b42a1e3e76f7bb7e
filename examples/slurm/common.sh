# shellcheck shell=bash disable=SC2034,SC2154  # some names are read or set by what sources this
# What job scripts share; train_job.sh and stage_job.sh source it, and say which variables they read.

refuse() {
    echo "error: $1" >&2
    exit 3
}

[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is no job of SLURM: call it from a job script or inside salloc"
LATHE_HOME=${LATHE_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
export LATHE_HOME LATHE_PYTHON=${LATHE_PYTHON:-$LATHE_HOME/.venv/bin/python}
export PYTHONPATH=$LATHE_HOME${PYTHONPATH:+:$PYTHONPATH}
export SLURM_TIME_FORMAT=standard # in which the times of squeue and scontrol are read here
# Where nodes run a container, this script does not: there its interpreter may be missing, and any of 3.10 or later will
# do, for this side takes the standard library alone where LATHE_RUN is given.
python=$(command -v "$LATHE_PYTHON" || command -v python3) || refuse "LATHE_PYTHON=$LATHE_PYTHON is not there"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    refuse "$python is older than Python 3.10: name a newer one in LATHE_PYTHON, or put one on the PATH as python3"
job_end=("$python" "$LATHE_HOME/examples/cluster/job_end.py")

# What SLURM's commands call this job: a task of an array has a name of its own, which its number alone is not.
self=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
self=${self:-$SLURM_JOB_ID}

# From 22.05 on srun does not take the cores of a task from sbatch, and a node's torchrun may get one core.
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$cores}

# Waits for the background process $step. At a signal that reaches this script alone (--signal=B:USR1@600, Ctrl-C inside
# salloc) it calls $1, which passes one on; the step's exit status is left in $status.
wait_for_step() {
    # shellcheck disable=SC2064  # the command is known now
    trap "$1 2>/dev/null || true" INT TERM USR1 USR2
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true # a signal ends it early
    done
    status=0
    wait "$step" || status=$?
}
