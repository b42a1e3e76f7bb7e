#!/bin/bash
# A job that runs one command of Lathe on one node: stage_job.sh COMMAND [recipe.yaml] FLAGS, as `lathe COMMAND` takes
# them. Job scripts source it. It begins once RUN (LATHE_RUN) is done, or at once with LATHE_AT_ONCE=1, as preparing does.
# LATHE_SETUP, LATHE_SRUN, LATHE_HOME and LATHE_PYTHON are those of train_job.sh.
set -euo pipefail

LATHE_HOME=${LATHE_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
export LATHE_HOME LATHE_PYTHON=${LATHE_PYTHON:-$LATHE_HOME/.venv/bin/python}
export PYTHONPATH=$LATHE_HOME${PYTHONPATH:+:$PYTHONPATH}
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}}
python=$(command -v "$LATHE_PYTHON" || command -v python3)
if [ -z "${LATHE_AT_ONCE:-}" ]; then
    "$python" "$LATHE_HOME/examples/cluster/job_end.py" check "${LATHE_RUN:?the run whose end it waits for}" || exit 3
fi
# shellcheck disable=SC2016  # the node's own shell reads it
exec srun --nodes 1 --ntasks 1 ${LATHE_SRUN[@]+"${LATHE_SRUN[@]}"} \
    bash -c 'eval "${LATHE_SETUP:-}" && exec "$LATHE_PYTHON" "$LATHE_HOME/examples/lathe.py" "$@"' bash "$@" </dev/null
