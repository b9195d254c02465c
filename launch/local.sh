#!/usr/bin/env bash
# Trains with several processes on one machine.
#
#   launch/local.sh --processes=N [options] -- PROGRAM ARGUMENTS
#   launch/local.sh --processes=2 --devices=4 -- --config=configs/tiny.py:smoke --workdir=runs/x
#
# --processes=N     number of processes
# --devices=M       simulate M CPU devices in each process; by default the processes use the GPUs
# --accelerators=K  GPUs per process, of those in CUDA_VISIBLE_DEVICES (default 1)
# --restarts=N      restart after a failure, at most N times (default 0); the run resumes. No
#                   restart after exit code 2: invalid input, full disk ..
# --grace=S         seconds from the first failure until the other processes get SIGTERM, and from
#                   then until they are killed (default 30)
# --logs=FOLDER     output, a file per process (default: WORKDIR/logs); process 0 is also shown
# --dry_run         print the commands and run nothing
# --help            print this
#
# SIGTERM and SIGINT are forwarded to all processes; a second signal kills them. There is no restart
# after a signal. The exit code is 2 if any process exited with it or the options were invalid, else
# the first nonzero code.
# PYTHON (default: python) and MODULE (default: fsdfm_jax.main) name the program.
set -euo pipefail

usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

fail() {
  echo "local.sh: $*" >&2
  exit 2
}

check_number() { # flag, value, smallest
  if ! [[ $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3)); then
    fail "--$1 must be an integer >= $3, got '$2'. See --help."
  fi
}

processes='' devices='' accelerators=1 restarts=0 grace=30 logs='' dry_run=''
while (($#)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --accelerators=*) accelerators=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --help | -h) usage && exit ;;
    --) break ;;
    *) fail "unknown option '$1'; the program's own arguments follow '--'. See --help." ;;
  esac
  shift
done
[[ ${1:-} == -- ]] || fail "expected '--' and the program's arguments. See --help."
shift

check_number processes "$processes" 1
[[ -z $devices ]] || check_number devices "$devices" 1
check_number accelerators "$accelerators" 1
check_number restarts "$restarts" 0
check_number grace "$grace" 0
if [[ -z $logs ]]; then
  previous=''
  for argument in "$@"; do
    [[ $argument == --workdir=* || $argument == -workdir=* ]] && logs=${argument#*=}/logs
    [[ $previous == --workdir || $previous == -workdir ]] && logs=$argument/logs
    previous=$argument
  done
  [[ -n $logs ]] || fail "no --workdir among the program's arguments; give --logs=FOLDER."
fi

free_port() { # an unused port, below the ephemeral range
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  fail "found no free port."
}

command_of() { # process, port, program arguments: sets `command`
  local id=$1 port=$2 first
  shift 2
  if [[ -n $devices ]]; then
    command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")
  else
    first=$((id * accelerators))
    command=(env "JAX_LOCAL_DEVICE_IDS=$(seq -s, "$first" $((first + accelerators - 1)))")
  fi
  command+=("${PYTHON:-python}" -m "${MODULE:-fsdfm_jax.main}" --distributed
    "--coordinator=localhost:$port" "--num_processes=$processes" "--process_id=$id" "$@")
}

if [[ $dry_run ]]; then
  port=$(free_port)
  for ((id = 0; id < processes; id++)); do
    command_of "$id" "$port" "$@"
    printf '%q ' "${command[@]}"
    printf '>>%q 2>&1 &\n' "$logs/process-$id.log"
  done
  exit
fi

pids=() signals=0

send() { # signal, to all remaining processes
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    if [[ $1 == KILL ]]; then
      kill -s KILL -- "-$pid" 2>/dev/null || true # with its children
    else
      kill -s "$1" "$pid" 2>/dev/null || true
    fi
  done
}

# shellcheck disable=SC2329 # the traps call it
on_signal() {
  signals=$((signals + 1))
  if ((signals == 1)); then send "$1"; else send KILL; fi
}

# Job control puts every process in a separate group: Ctrl-C reaches only this script, which
# forwards it once, and the processes don't start with SIGINT ignored.
set -m
trap 'on_signal TERM' TERM
trap 'on_signal INT' INT
trap '' PIPE # a closed output pipe must not end the training
trap 'send KILL' EXIT

start() {
  local id port log
  port=$(free_port)
  pids=()
  for ((id = 0; id < processes && signals == 0; id++)); do
    log=$logs/process-$id.log
    echo "== $(date '+%F %T'), attempt $attempt" >>"$log"
    if ((id == 0)); then
      exec 4<"$log"
      cat <&4 >/dev/null # skip the output of earlier runs
    fi
    command_of "$id" "$port" "$@"
    "${command[@]}" </dev/null >>"$log" 2>&1 4<&- &
    pids+=("$!")
  done
}

unfinished=''
show() { # new output of process 0
  local line
  while IFS= read -r line <&4; do
    printf '%s\n' "$unfinished$line" 2>/dev/null || true
    unfinished=''
  done
  unfinished+=$line
}

# Sets `code`: 2 if any process exited with it, else the first nonzero code. A process that exits
# with 2 makes the others fail, and one of those may be seen first.
wait_for_all() {
  local left id status deadline='' signal=TERM
  left=${#pids[@]} code=0
  while ((left)); do
    sleep 0.2 || true
    show
    for id in "${!pids[@]}"; do
      kill -0 "${pids[id]}" 2>/dev/null && continue
      status=0
      wait "${pids[id]}" 2>/dev/null || status=$?
      unset "pids[id]"
      left=$((left - 1))
      ((status && (code == 0 || (status == 2 && code != 2)))) || continue
      code=$status
      [[ $deadline ]] || deadline=$((SECONDS + grace))
      echo "local.sh: process $id exited with code $code, see $logs/process-$id.log" >&2
    done
    if [[ $deadline ]] && ((left && SECONDS >= deadline)); then
      send "$signal"
      signal=KILL deadline=$((SECONDS + grace))
    fi
  done
  show
}

mkdir -p "$logs" || fail "can't create the folder '$logs'."
for ((attempt = 1; ; attempt++)); do
  start "$@"
  wait_for_all
  if ((code == 0 || code == 2 || signals || attempt > restarts)); then break; fi
  echo "local.sh: restart $attempt of $restarts" >&2
done
exit "$code"
