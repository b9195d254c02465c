#!/usr/bin/env bash
#SBATCH --job-name=fsdfm_jax
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#
# Trains on a GPU cluster with SLURM: a task per GPU, or a task per node.
#
#   launch/slurm.sh --nodes=N --gpus=G [options] -- PROGRAM ARGUMENTS
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 --sbatch=--partition=a100 -- \
#       --config=configs/paper.py:1.3B --workdir=/shared/runs/x
#
# Outside an allocation this submits itself by sbatch; inside one (a job, or the shell of salloc) it
# starts the tasks by srun. `sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh
# -- ARGUMENTS` does the same as the first line.
#
# --nodes=N      nodes (default 1)
# --gpus=G       GPUs of each node (default 8)
# --per_node     one task a node, with all of its GPUs; otherwise one a GPU
# --time=T       time limit, as sbatch takes it; 120 seconds before it the run saves and is requeued
# --restarts=N   requeue at most N times (default 100)
# --sbatch=FLAG  a further flag of sbatch, as often as needed: --sbatch=--account=x
# --dry_run      print the commands and run nothing
# --help         print this
#
# Output of each task goes to WORKDIR/logs/process-I.log. Only a run that has saved (exit code 143)
# is requeued. The exit code is 2 if the options were refused, else the highest of the tasks'. Run
# it from the repository's root. PYTHON (default: python) and MODULE (default: fsdfm_jax.main) name
# the program.
set -euo pipefail

usage() { awk 'NR > 1 { if (!/^#/) exit; if (/^#SBATCH/) next; sub(/^# ?/, ""); print }' "$0"; }

fail() {
  echo "slurm.sh: $*" >&2
  exit 2
}

check_number() { # flag, value, smallest
  if ! [[ $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3)); then
    fail "--$1 must be a whole number from $3 on, got '$2'. See --help."
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

# A task that fails leaves the others to JAX, which ends them when a heartbeat is missing, and to
# --wait; killing them at once could cut off a save. JAX gives task I of a node its I-th GPU, so
# that each task has to see all of them.
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
    fail "sbatch is not on PATH; run this on a SLURM cluster (--dry_run shows what it does)."
  exec "${job[@]}"
fi

# Inside the allocation. With one task a node JAX would take its first GPU alone.
if [[ ${SLURM_NTASKS_PER_NODE:-} == 1 && ${SLURM_GPUS_ON_NODE:-1} -gt 1 ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
if [[ $dry_run ]]; then
  print_step
  exit
fi
mkdir -p "$workdir/logs" || fail "can't make the folder '$workdir/logs'."

# Before the time limit --signal reaches the tasks alone. A SIGTERM to this shell is a preemption,
# which SLURM requeues itself, or scancel, which nobody wants requeued.
terminated=''
trap 'terminated=yes' TERM
"${step[@]}" &
while true; do
  code=0
  wait $! || code=$?
  kill -0 $! 2>/dev/null || break # else the trap interrupted the waiting
done
echo "slurm.sh: exit code $code, logs in $workdir/logs"
if ((code == 143)) && [[ -z $terminated ]]; then
  if ((${SLURM_RESTART_COUNT:-0} < restarts)); then
    echo "slurm.sh: saved; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "slurm.sh: saved; not requeued, $restarts restarts are used up" >&2
  fi
fi
exit "$code"
