#!/usr/bin/env bash
# Starts a real SLURM on this one Debian machine: installs it where it is missing, needs root and no systemd.
# Twice is a no-op. Every daemon is a normal one; a node is one more slurmd on 127.0.0.1. down.sh stops it all.
#
#   main  the default partition, preempts `low` by requeueing its jobs
#   low   preemptible, 10 s of grace
#
# Knobs (environment; change one and run again, the daemons restart on the new configuration):
#   SLURM_NODES=2           simulated nodes, n1 n2 ...
#   SLURM_CPUS=4            CPUs that each claims (may exceed the machine's)
#   SLURM_MEM=8000          MB that each claims
#   SLURM_GPUS=2            fake GPUs a node: jobs get distinct CUDA_VISIBLE_DEVICES
#   SLURM_ARRAY=1001        MaxArraySize
#   SLURM_PREEMPT_SIGNAL=1  1: preemption sends the job's --signal before SIGTERM; 0: SIGTERM alone, as on many clusters
#   SLURM_ACCOUNTING=none   none: `sacct` fails, as on many clusters; dbd: MariaDB and slurmdbd, real accounting
#   SLURM_HOME=/var/lib/distill-bench-slurm   state, spool, logs and pid files
#   SLURM_CONF=/etc/slurm/slurm.conf          elsewhere, only who exports it sees the cluster (SLURM's own variable)
set -euo pipefail

NODES=${SLURM_NODES:-2} CPUS=${SLURM_CPUS:-4} MEM=${SLURM_MEM:-8000} GPUS=${SLURM_GPUS:-2} ARRAY=${SLURM_ARRAY:-1001}
PREEMPT_SIGNAL=${SLURM_PREEMPT_SIGNAL:-1} ACCOUNTING=${SLURM_ACCOUNTING:-none}
LAB=${SLURM_HOME:-/var/lib/distill-bench-slurm} HOST=$(hostname -s) MARK='# distill-bench test cluster'
export SLURM_CONF=${SLURM_CONF:-/etc/slurm/slurm.conf}
ETC=$(dirname "$SLURM_CONF")

die() { echo "up.sh: $*" >&2; exit 1; }
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
await() { for _ in $(seq 300); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done; die "waited 30 s in vain for: $*; logs in $LAB/log"; }
[ "$(id -u)" = 0 ] || die "run me as root"
[ ! -s "$SLURM_CONF" ] || grep -qF "$MARK" "$SLURM_CONF" || die "$SLURM_CONF is another cluster's: I leave it alone"

# ---- packages
packages=(slurmctld slurmd slurm-client munge)
[ "$ACCOUNTING" = none ] || packages+=(slurmdbd mariadb-server)
missing=()
for p in "${packages[@]}"; do dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q ' installed' || missing+=("$p"); done
mkdir -p "$LAB"/{state,spool,log,run,gpu} "$ETC"
echo "$SLURM_CONF" >"$LAB/conf"
if [ ${#missing[@]} -gt 0 ]; then
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$LAB/log/apt.log" 2>&1 ||
    { tail -20 "$LAB/log/apt.log" >&2; die "cannot install ${missing[*]}"; }
fi

# ---- munge: how the daemons know each other
install -d -o munge -g munge -m 755 /run/munge
install -d -o munge -g munge -m 700 /etc/munge /var/log/munge
install -d -o munge -g munge -m 711 /var/lib/munge
[ -s /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=128 count=1 status=none
chown munge:munge /etc/munge/munge.key && chmod 400 /etc/munge/munge.key
if ! { munge -n | unmunge; } >/dev/null 2>&1; then
  setpriv --reuid=munge --regid=munge --clear-groups /usr/sbin/munged
  await cp /run/munge/munged.pid "$LAB/run/"  # ours to stop
fi
await sh -c 'munge -n | unmunge'

# ---- names: MASTER_ADDR of a many-node job is the first node's name
for name in "$HOST" $(seq -f 'n%g' "$NODES"); do
  grep -qE "[[:space:]]$name([[:space:]]|\$)" /etc/hosts || echo "127.0.0.1 $name $MARK" >>/etc/hosts
done

# ---- configuration
staged=$(mktemp -d)
# a fake GPU must be a character device of its own (a regular file leaves CUDA_VISIBLE_DEVICES empty): here another /dev/null
for i in $(seq 0 $((GPUS - 1))); do [ -e "$LAB/gpu/nvidia$i" ] || mknod "$LAB/gpu/nvidia$i" c 1 3; done
: >"$staged/gres.conf"
[ "$GPUS" = 0 ] || echo "NodeName=n[1-$NODES] Name=gpu File=$LAB/gpu/nvidia[0-$((GPUS - 1))]" >"$staged/gres.conf"
echo "CgroupAutomount=no" >"$staged/cgroup.conf"
{
  cat <<CONF
$MARK
ClusterName=lab
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits for this long (default 120 s). It must exceed KillWait: a node that still runs the job's last
# attempt refuses the next as a duplicate, and SLURM then holds the job ("launch failed requeued held")
AuthInfo=cred_expire=25
MailProg=/bin/true
MpiDefault=none
# no cgroups: they need systemd or privileges; memory is then not enforced
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SwitchType=switch/none
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MaxArraySize=$ARRAY
MaxJobCount=10000
MinJobAge=3600
# a job that is told to stop saves within this time, also on a busy machine
KillWait=10
OverTimeLimit=0
InactiveLimit=0
MessageTimeout=30
SlurmdTimeout=60
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,sched_min_interval=100000,bf_interval=5
PriorityType=priority/basic
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
SlurmctldPort=6817
CONF
  [ "$PREEMPT_SIGNAL" = 0 ] || echo "SlurmctldParameters=preempt_send_user_signal"
  if [ "$ACCOUNTING" = none ]; then echo "AccountingStorageType=accounting_storage/none"
  else printf '%s\n' "AccountingStorageType=accounting_storage/slurmdbd" "AccountingStorageHost=127.0.0.1"; fi
  gres=""
  [ "$GPUS" = 0 ] || { echo "GresTypes=gpu"; gres="Gres=gpu:$GPUS"; }
  for i in $(seq "$NODES"); do
    echo "NodeName=n$i NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((17000 + i)) CPUs=$CPUS RealMemory=$MEM $gres State=UNKNOWN"
  done
  # without DefMemPerCPU a job takes its node's whole memory
  common="Nodes=n[1-$NODES] DefaultTime=10 MaxTime=7-0 DefMemPerCPU=100 State=UP"
  echo "PartitionName=main $common Default=YES PriorityTier=10 PreemptMode=OFF"
  echo "PartitionName=low $common PriorityTier=1 PreemptMode=REQUEUE GraceTime=10"
} >"$staged/slurm.conf"
changed=0
for file in "$staged"/*; do cmp -s "$file" "$ETC/${file##*/}" || { install -m 644 "$file" "$ETC/"; changed=1; }; done
rm -rf "$staged"

# ---- accounting
if [ "$ACCOUNTING" != none ]; then
  install -d -o mysql -g mysql /run/mysqld
  if ! mariadb-admin ping >/dev/null 2>&1; then
    setsid /usr/sbin/mariadbd --user=mysql --skip-networking --pid-file="$LAB/run/mariadbd.pid" --innodb-buffer-pool-size=64M \
      --innodb-lock-wait-timeout=900 >>"$LAB/log/mariadbd.log" 2>&1 </dev/null &
    chown mysql "$LAB/run"
    await mariadb-admin ping
  fi
  mariadb -e "CREATE DATABASE IF NOT EXISTS slurm_acct_db"
  cat >"$ETC/slurmdbd.conf" <<CONF
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
LogFile=$LAB/log/slurmdbd.log
PidFile=$LAB/run/slurmdbd.pid
CONF
  chmod 600 "$ETC/slurmdbd.conf"
  alive "$LAB/run/slurmdbd.pid" || /usr/sbin/slurmdbd
  await bash -c 'exec 3<>/dev/tcp/127.0.0.1/6819'
fi

# ---- daemons: a changed configuration restarts them
stop() { alive "$1" || return 0; local pid; pid=$(cat "$1"); kill "$pid"; await sh -c "! kill -0 $pid"; }
if [ "$changed" = 1 ]; then for pid in "$LAB"/run/slurmd.*.pid "$LAB/run/slurmctld.pid"; do stop "$pid"; done; fi
alive "$LAB/run/slurmctld.pid" || /usr/sbin/slurmctld
for i in $(seq "$NODES"); do
  mkdir -p "$LAB/spool/n$i"
  alive "$LAB/run/slurmd.n$i.pid" || /usr/sbin/slurmd -N "n$i"
done
ready() { [ "$(sinfo -h -N -p main -o '%T' 2>/dev/null | grep -cE '^(idle|mixed|allocated)$')" = "$NODES" ]; }
settle() { ready || { scontrol update nodename="n[1-$NODES]" state=resume; false; }; }
await settle
[ "$ACCOUNTING" = none ] || await sh -c '[ "$(sacctmgr -nP list cluster lab format=controlport)" = 6817 ]'
sinfo -N -o '%N %t %c CPUs %m MB %G %P'
