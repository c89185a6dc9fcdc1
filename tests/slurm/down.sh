#!/usr/bin/env bash
# Stops what up.sh started, each daemon by its pid file, and removes its configuration; --wipe also removes state and logs.
set -uo pipefail

LAB=${SLURM_HOME:-/var/lib/distill-bench-slurm} MARK='# distill-bench test cluster'
[ -s "$LAB/conf" ] || exit 0
SLURM_CONF=$(cat "$LAB/conf")
export SLURM_CONF

stop() {
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  kill "$pid" 2>/dev/null
  for _ in $(seq 150); do kill -0 "$pid" 2>/dev/null || { rm -f "$1"; return; }; sleep 0.1; done
  echo "down.sh: process $pid of $1 does not stop" >&2
  failed=1
}

failed=0
if grep -qsF "$MARK" "$SLURM_CONF"; then
  timeout 10 scancel --user="$(id -un)" 2>/dev/null
  for _ in $(seq 150); do [ -z "$(timeout 10 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
fi
for pid in "$LAB"/run/slurmd.*.pid "$LAB"/run/{slurmctld,slurmdbd,mariadbd,munged}.pid; do stop "$pid"; done
if grep -qsF "$MARK" "$SLURM_CONF"; then
  for file in slurm gres cgroup slurmdbd; do rm -f "$(dirname "$SLURM_CONF")/$file.conf"; done
fi
hosts=$(grep -vF "$MARK" /etc/hosts) && echo "$hosts" >/etc/hosts # in a container /etc/hosts cannot be replaced
[ "${1:-}" != --wipe ] || rm -rf "$LAB"
exit $failed
