#!/bin/bash
# A SLURM cluster of two nodes on this machine, on 127.0.0.1 alone: munged, slurmctld and two slurmd of its own.
#
#   bash tests/slurm/cluster.sh start DIR    needs slurm-wlm and munge (Debian), and to be root
#   export SLURM_CONF=DIR/slurm.conf         then sbatch, srun, salloc, squeue, scontrol work
#   bash tests/slurm/cluster.sh stop DIR     ends all jobs and the daemons
#   bash tests/slurm/cluster.sh node DIR 2   starts the slurmd of a node again
#
# All state and every log lies in DIR; daemons are ended by the pid files there and in no other way. A node claims 64
# cores and 8 GPUs that it has not: nothing is pinned and no device is opened. Jobs of the partition `high` preempt those
# of `low` at once and those of `grace` after $GRACE seconds; both go back to the queue.
set -euo pipefail

command=${1:?start, stop or node}
state=$(realpath -m "${2:?a directory}")
port=${PORT:-17817} # slurmctld's; the nodes have the next ones
host=$(hostname -s)
export SLURM_CONF=$state/slurm.conf

configuration() {
    cat <<END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits cred_expire seconds before it starts again; the default is 120.
AuthInfo=socket=$state/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile=$state/slurmctld.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdPidFile=$state/slurmd-%n.pid
SlurmdLogFile=$state/slurmd-%n.log
SlurmdSpoolDir=$state/spool-%n
StateSaveLocation=$state/saved
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=2,requeue_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=${KILL_WAIT:-30}
SlurmdTimeout=${SLURMD_TIMEOUT:-20}
ReturnToService=2
MinJobAge=3600
GresTypes=gpu
NodeName=node1 NodeAddr=127.0.0.1 NodeHostname=$host Port=$((port + 1)) CPUs=64 RealMemory=1000000 Gres=gpu:8
NodeName=node2 NodeAddr=127.0.0.1 NodeHostname=$host Port=$((port + 2)) CPUs=64 RealMemory=1000000 Gres=gpu:8
PartitionName=normal Nodes=ALL PriorityTier=10 PreemptMode=OFF Default=YES
PartitionName=high Nodes=ALL PriorityTier=100 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1
PartitionName=grace Nodes=ALL PriorityTier=1 GraceTime=${GRACE:-60}
END
}

lives() { # PROGRAM FILE: whether the process of this pid file is that program
    [ -s "$2" ] && [ "$(cat "/proc/$(cat "$2")/comm" 2>/dev/null)" = "$1" ]
}

end() { # PROGRAM FILE
    for signal in TERM KILL; do
        lives "$1" "$2" && kill -s "$signal" "$(cat "$2")"
        for _ in $(seq 100); do
            lives "$1" "$2" || return 0
            sleep 0.1
        done
    done
}

start_node() { # NUMBER
    lives slurmd "$state/slurmd-node$1.pid" || slurmd -N "node$1"
}

start() {
    mkdir -p "$state/saved" "$state/devices"
    touch "$state"/devices/gpu{0..7}
    configuration >"$SLURM_CONF"
    printf 'AutoDetect=off\nNodeName=node[1-2] Name=gpu File=%s/devices/gpu[0-7]\n' "$state" >"$state/gres.conf"
    # --force: pytest lets nobody else into its directories, which munged takes for a mistake.
    (umask 077 && head -c 128 /dev/urandom >"$state/munge.key")
    munged --force --key-file="$state/munge.key" --socket="$state/munge.socket" --pid-file="$state/munged.pid" \
        --log-file="$state/munged.log" --seed-file="$state/munge.seed"
    slurmctld
    start_node 1
    start_node 2
    for _ in $(seq 150); do
        [ "$(sinfo -h -p normal -t idle -o %D 2>/dev/null)" = 2 ] && return
        sleep 0.2
    done
    echo "the nodes did not come up: see $state/*.log" >&2
    return 1
}

stop() {
    if lives slurmctld "$state/slurmctld.pid"; then
        scancel --user=root --signal=KILL --full --quiet || true
        scancel --user=root --quiet || true
        for _ in $(seq 50); do
            [ -z "$(squeue -h)" ] && break
            sleep 0.2
        done
    fi
    end slurmd "$state/slurmd-node1.pid"
    end slurmd "$state/slurmd-node2.pid"
    end slurmctld "$state/slurmctld.pid"
    end munged "$state/munged.pid"
}

case $command in
start) start ;;
stop) stop ;;
node) start_node "${3:?1 or 2}" ;;
*) echo "error: $command is none of start, stop and node" >&2 && exit 2 ;;
esac
