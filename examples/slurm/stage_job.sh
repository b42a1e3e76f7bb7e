#!/bin/bash
# A job that runs one command of Lathe on one node: stage_job.sh COMMAND [recipe.yaml] FLAGS, as `lathe COMMAND` takes
# them. Job scripts source it. It begins once RUN (LATHE_RUN) is done, or at once with LATHE_AT_ONCE=1, as preparing does.
# LATHE_SETUP, LATHE_SRUN, LATHE_HOME and LATHE_PYTHON are those of train_job.sh.
set -euo pipefail

# shellcheck source=examples/slurm/common.sh
source "${LATHE_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}/examples/slurm/common.sh"
if [ -z "${LATHE_AT_ONCE:-}" ]; then
    "${job_end[@]}" check "${LATHE_RUN:?the run whose end it waits for}" || exit 3
fi
# shellcheck disable=SC2016  # the node's own shell reads it
srun --nodes 1 --ntasks 1 ${LATHE_SRUN[@]+"${LATHE_SRUN[@]}"} \
    bash -c 'eval "${LATHE_SETUP:-}" && exec "$LATHE_PYTHON" "$LATHE_HOME/examples/lathe.py" "$@"' bash "$@" </dev/null &
step=$!
wait_for_step "scancel --signal=TERM $self" # srun itself would take it as an order to kill
exec "${job_end[@]}" stage "$status"
