#!/usr/bin/env bash
#SBATCH --job-name=fsdfm_jax
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#
# Trains on a GPU cluster with SLURM: one task per GPU or per node.
#
#   launch/slurm.sh --nodes=N --gpus=G [options] -- PROGRAM ARGUMENTS
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 --sbatch=--partition=a100 -- \
#       --config=configs/paper.py:1.3B --workdir=/shared/runs/x
#
# Outside an allocation, this script submits itself with sbatch. Inside one (a job, or a shell of
# salloc), it starts the tasks with srun. The first line is equivalent to
# `sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh -- ARGUMENTS`.
#
# --nodes=N      nodes (default 1)
# --gpus=G       GPUs per node (default 8)
# --per_node     one task per node, with all of its GPUs; default: one per GPU
# --time=T       time limit of sbatch; 120 seconds before it, the run saves and is requeued
# --restarts=N   requeue at most N times (default 100)
# --sbatch=FLAG  extra flag for sbatch, repeatable: --sbatch=--account=x
# --dry_run      print the commands and run nothing
# --help         print this
#
# Task I writes to WORKDIR/logs/process-I.log. Only a run that has saved (exit code 143) is
# requeued. The exit code is 2 if the options were invalid, else the highest exit code of the tasks.
# Run it from the repository root. PYTHON (default: python) and MODULE (default: fsdfm_jax.main)
# name the program.
set -euo pipefail

usage() { awk 'NR > 1 { if (!/^#/) exit; if (/^#SBATCH/) next; sub(/^# ?/, ""); print }' "$0"; }

fail() {
  echo "slurm.sh: $*" >&2
  exit 2
}

check_number() { # flag, value, smallest
  if ! [[ $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3)); then
    fail "--$1 must be an integer >= $3, got '$2'. See --help."
  fi
}

nodes=1 gpus=8 per_node='' time_limit='' restarts=100 extra=() dry_run=''
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --per_node) per_node=yes ;;
    --time=*) time_limit=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --sbatch=*) extra+=("${1#*=}") ;;
    --dry_run) dry_run=yes ;;
    --help | -h) usage && exit ;;
    --) break ;;
    *) fail "unknown option '$1'; the program's own arguments follow '--'. See --help." ;;
  esac
  shift
done
[[ ${1:-} == -- ]] || fail "expected '--' and the program's arguments. See --help."
shift
check_number nodes "$nodes" 1
check_number gpus "$gpus" 1
check_number restarts "$restarts" 0

workdir='' previous=''
for argument in "$@"; do
  [[ $argument == --workdir=* || $argument == -workdir=* ]] && workdir=${argument#*=}
  [[ $previous == --workdir || $previous == -workdir ]] && workdir=$argument
  previous=$argument
done
[[ -n $workdir ]] || fail "no --workdir among the program's arguments."

# After a task fails, JAX ends the others when a heartbeat is missing, or --wait does; killing them
# immediately could interrupt a save. JAX gives task I of a node its I-th GPU, so each task must see
# all of them.
step=(srun --kill-on-bad-exit=0 --wait=600 --gpu-bind=none --open-mode=append
  "--output=$workdir/logs/process-%t.log" "${PYTHON:-python}" -m "${MODULE:-fsdfm_jax.main}"
  --distributed "$@")

print_step() {
  [[ -z ${JAX_LOCAL_DEVICE_IDS:-} ]] || printf 'JAX_LOCAL_DEVICE_IDS=%s ' "$JAX_LOCAL_DEVICE_IDS"
  printf '%q ' "${step[@]}"
  echo
}

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  tasks=$gpus
  if [[ $per_node ]]; then tasks=1; fi
  job=(sbatch "--nodes=$nodes" "--ntasks-per-node=$tasks" "--gpus-per-node=$gpus")
  [[ -z $time_limit ]] || job+=("--time=$time_limit")
  job+=(${extra[@]+"${extra[@]}"} "${BASH_SOURCE[0]}" "--restarts=$restarts" -- "$@")
  if [[ $dry_run ]]; then
    printf '%q ' "${job[@]}"
    echo
    if [[ $per_node ]]; then JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1))); fi
    print_step
    exit
  fi
  command -v sbatch >/dev/null ||
    fail "sbatch is not on PATH; run this on a SLURM cluster (--dry_run prints the commands)."
  exec "${job[@]}"
fi

# Inside the allocation. With one task per node, JAX would use only the first GPU.
if [[ ${SLURM_NTASKS_PER_NODE:-} == 1 && ${SLURM_GPUS_ON_NODE:-1} -gt 1 ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
if [[ $dry_run ]]; then
  print_step
  exit
fi
mkdir -p "$workdir/logs" || fail "can't create the folder '$workdir/logs'."

# Before the time limit, --signal reaches only the tasks. A SIGTERM to this shell is a preemption,
# which SLURM requeues itself, or scancel, which must not be requeued.
terminated=''
trap 'terminated=yes' TERM
"${step[@]}" &
while true; do
  code=0
  wait $! || code=$?
  kill -0 $! 2>/dev/null || break # else the trap interrupted `wait`
done
echo "slurm.sh: exit code $code, logs in $workdir/logs"
if ((code == 143)) && [[ -z $terminated ]]; then
  if ((${SLURM_RESTART_COUNT:-0} < restarts)); then
    echo "slurm.sh: saved; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "slurm.sh: saved; not requeued after $restarts restarts" >&2
  fi
fi
exit "$code"
