#!/usr/bin/env bash
# Slurm with m1 as controller and m1 and m2 as nodes, for one COMMAND:
#   bash tests/two_machines.sh bash tests/slurm_on_two_machines.sh sbatch --wait ...
# Needs slurmctld, slurmd and munged. Everything lies in /run, which belongs to the two machines alone.
set -euo pipefail
[ "$(hostname)" = m1 ] # never where a real Slurm may be

folder=/run/slurm
mkdir -p "$folder"/{state,m1,m2}
export SLURM_CONF="$folder/slurm.conf"
cat >"$SLURM_CONF" <<CONFIGURATION
ClusterName=two
SlurmctldHost=m1
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$folder/munge.socket,cred_expire=5 # a job that was requeued waits for as long
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/controller.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/controller.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=5
NodeName=m[1-2] CPUs=$(nproc)
PartitionName=all Nodes=ALL Default=YES
CONFIGURATION
echo CgroupPlugin=cgroup/v1 >"$folder/cgroup.conf" # slurmd does not start without one, though nothing here uses it
head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
    --log-file="$folder/munge.log" --seed-file="$folder/munge.seed" 2>"$folder/munge.err"
slurmctld -c
for node in m1 m2; do
    ssh "$node" "mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/freezer &&
        mount -t cgroup -o freezer none /sys/fs/cgroup/freezer && SLURM_CONF=$SLURM_CONF /usr/sbin/slurmd -N $node"
done
for _ in {1..60}; do
    [ "$(sinfo --noheader --format '%t %D')" != 'idle 2' ] || break
    sleep 0.5
done
"$@"
