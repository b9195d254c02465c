#!/usr/bin/env bash
# Trains on Cloud TPU slices: creates them, installs, runs on every host, survives preemption.
#
#   launch/tpu_pod.sh ACTION --name=NAME --zone=ZONE [options] [-- PROGRAM ARGUMENTS]
#   launch/tpu_pod.sh run --name=fsdfm --zone=us-west4-a --type=v5litepod-32 --spot \
#       --setup='mountpoint -q /runs || { sudo mkdir -p /runs; sudo mount 10.0.0.2:/x /runs; }' -- \
#       --config=configs/paper.py:1.3B --workdir=/runs/x --config.mesh.fsdp=16
#
# ACTION
#   run      create, install, start and watch; repeat after a preemption until the program finishes.
#            If the program is already running, only watch it
#   create   request the slices unless they exist, and wait for them
#   install  run --setup, copy this working tree and install it, on every host
#   start    start the program on every host; it then runs without this machine
#   watch    wait until the program ends
#   status   print the state of the slices and of the program on every host
#   logs     follow the output of one host: --slice=0 --worker=0
#   stop     send SIGTERM to the program on every host: it saves and exits
#   delete   delete the slices
#
# --name, --zone, --project  of the queued resource; its slices are NAME, or NAME-0, NAME-1 ..
# --type=TYPE            accelerator type: v5litepod-64, v5p-128, v6e-64 .. (run, create)
# --runtime=VERSION      software version of the TPU VMs (default: by TYPE)
# --slices=N             number of slices (default 1)
# --spot                 spot slices: cheap, but may be preempted at any time
# --create_flag=FLAG     extra flag for `queued-resources create`, repeatable
# --ssh_flag=FLAG        extra flag for `tpu-vm ssh` and `scp`: --ssh_flag=--internal-ip
# --setup=COMMAND        run on every host before the installation and at each restart, e.g. to
#                        mount the folder that all hosts share; must be idempotent
# --env=NAME=VALUE       environment variable of the program, repeatable
# --extras=LIST          extras of the package to install (default tpu,demo)
# --python=VERSION       Python version on the hosts, installed by uv (default 3.12)
# --restarts=N           restarts after failures other than preemptions (default 10); none after
#                        exit code 2
# --poll=SECONDS         interval between checks (default 60)
# --settle=SECONDS       from the first failure until all exit codes are read (default 20)
# --grace=SECONDS        from SIGTERM until the program is killed (default 300)
# --slice=I --worker=I   host for `logs` (default 0 and 0)
# --dry_run              print the commands and run nothing
# --help                 print this
#
# Exit codes: 0 done; 2 you must fix something: invalid options, gcloud refused the slices, or the
# program exited with 2, see its log; 143 stopped by `stop`; 1 a gcloud command failed or a host
# didn't answer; else the exit code of a failed host.
set -euo pipefail

usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

say() { echo "tpu_pod.sh: $*" >&2; }

fail() {
  say "$*"
  exit 2
}

check_number() { # flag, value, smallest
  if ! [[ $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3)); then
    fail "--$1 must be an integer >= $3, got '$2'. See --help."
  fi
}

quoted() { # words, quoted for a shell
  local word text='' quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/$quote}'"
    text+=" $word"
  done
  echo "${text# }"
}

action=${1:-} name='' zone='' project=() type='' runtime='' slices=1 create_flags=() ssh_flags=()
setup='' environment=() extras=tpu,demo python=3.12 restarts=10 poll=60 settle=20 grace=300
slice=0 worker=0 dry_run=''
case $action in
  run | create | install | start | watch | status | logs | stop | delete) shift ;;
  --help | -h) usage && exit ;;
  *) fail "unknown action '$action'. See --help." ;;
esac
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=("$1") ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) create_flags+=(--spot) ;;
    --create_flag=*) create_flags+=("${1#*=}") ;;
    --ssh_flag=*) ssh_flags+=("${1#*=}") ;;
    --setup=*) setup=${1#*=} ;;
    --env=*) environment+=("${1#*=}") ;;
    --extras=*) extras=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --settle=*) settle=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --slice=*) slice=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --help | -h) usage && exit ;;
    --) break ;;
    *) fail "unknown option '$1'; the program's own arguments follow '--'. See --help." ;;
  esac
  shift
done
[[ ${1:-} != -- ]] || shift

[[ $name =~ ^[a-z][a-z0-9-]*$ ]] ||
  fail "--name must be lower-case letters, digits and dashes, got '$name'."
[[ -n $zone ]] || fail "expected --zone=ZONE, the zone of the TPUs."
check_number slices "$slices" 1
check_number restarts "$restarts" 0
check_number poll "$poll" 0
check_number settle "$settle" 0
check_number grace "$grace" 1
check_number slice "$slice" 0
check_number worker "$worker" 0
for pair in ${environment[@]+"${environment[@]}"}; do
  [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env must be NAME=VALUE, got '$pair'."
done
if [[ $action == run || $action == create ]]; then
  [[ -n $type ]] || fail "expected --type=TYPE, e.g. v5litepod-64."
  case $runtime$type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
  esac
  [[ -n $runtime ]] || fail "unknown runtime for --type=$type; give --runtime=VERSION."
fi
if [[ $action == run || $action == start ]]; then
  workdir='' previous=''
  for argument in "$@"; do
    [[ $argument == --workdir=* || $argument == -workdir=* ]] && workdir=${argument#*=}
    [[ $previous == --workdir || $previous == -workdir ]] && workdir=$argument
    previous=$argument
  done
  [[ $workdir == /* ]] || fail "expected --workdir=/FOLDER after '--', a folder that all hosts" \
    "share (see --setup), got '$workdir'."
elif (($#)); then
  fail "the action '$action' takes no program arguments."
fi
if [[ -z $dry_run ]] && ! command -v gcloud >/dev/null; then
  fail "gcloud is not on PATH; install the Google Cloud CLI and run 'gcloud auth login'" \
    "(--dry_run prints the commands without it)."
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
where=("--zone=$zone" ${project[@]+"${project[@]}"})
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((index = 0; index < slices; index++)); do nodes+=("$name-$index"); done
fi

tpus() { # arguments of `gcloud compute tpus`
  if [[ $dry_run ]]; then
    quoted gcloud compute tpus "$@"
  else
    gcloud compute tpus "$@" </dev/null
  fi
}

on_hosts() { # slice, workers, command
  tpus tpu-vm ssh "$1" "${where[@]}" "--worker=$2" ${ssh_flags[@]+"${ssh_flags[@]}"} --quiet \
    "--command=$3"
}

on_all_hosts() { # command; on all slices in parallel
  local node pids=() pid code=0
  for node in "${nodes[@]}"; do
    if [[ $dry_run ]]; then
      on_hosts "$node" all "$1"
    else
      on_hosts "$node" all "$1" &
      pids+=("$!")
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || code=$?; done
  return "$code"
}

state() { # prints the state of the queued resource, ABSENT if it doesn't exist
  local text
  if text=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    '--format=value(state.state)' 2>&1 </dev/null); then
    echo "${text##*$'\n'}"
  elif [[ $text == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    say "can't read the state of $name: $text"
    return 1
  fi
}

delete() { tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }

ask() {
  local node=("--node-id=$name")
  ((slices == 1)) || node=("--node-count=$slices" "--node-prefix=$name")
  tpus queued-resources create "$name" "${where[@]}" "${node[@]}" "--accelerator-type=$type" \
    "--runtime-version=$runtime" ${create_flags[@]+"${create_flags[@]}"} --quiet
}

create() {
  local now before=''
  if [[ $dry_run ]]; then
    quoted gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      '--format=value(state.state)'
    ask
    return
  fi
  while true; do
    now=$(state) || now=UNKNOWN
    [[ $now == "$before" ]] || say "$name is $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      ABSENT) ask || return ;;
      FAILED | SUSPENDED) delete || return ;; # these states are final
      *) sleep "$poll" ;;
    esac
  done
}

# On every host: the tree in ~/fsdfm_jax, its Python in ~/fsdfm_env, and in ~/fsdfm_run the
# program's output (log), process id (pid), exit code after its end (exit), and a marker if `stop`
# ended it (stopped).
install() {
  local archive node code=0
  [[ -z $setup ]] || on_all_hosts "$setup" || return
  archive=${TMPDIR:-/tmp}/fsdfm_jax-$$.tar.gz
  local pack=(tar -czf "$archive" --exclude=__pycache__ -C "$root"
    setup.py README.md LICENSE fsdfm_jax configs launch)
  if [[ $dry_run ]]; then quoted "${pack[@]}"; else "${pack[@]}" || return; fi
  for node in "${nodes[@]}"; do
    tpus tpu-vm scp "$archive" "$node:fsdfm_jax.tar.gz" "${where[@]}" --worker=all \
      ${ssh_flags[@]+"${ssh_flags[@]}"} --quiet || code=$?
  done
  rm -f "$archive"
  ((code == 0)) || return "$code"
  # uv installs Python: that of the TPU VMs may be too old.
  on_all_hosts "python=$(quoted "$python") package=$(quoted "./fsdfm_jax[$extras]")
$(
    cat <<'END'
set -e
cd "$HOME"
export PATH="$HOME/.local/bin:$PATH"
rm -rf fsdfm_jax && mkdir fsdfm_jax
tar -xzf fsdfm_jax.tar.gz -C fsdfm_jax
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
uv venv --quiet --allow-existing --python "$python" fsdfm_env
uv pip install --quiet --python fsdfm_env/bin/python -e "$package"
END
  )"
}

start() { # program arguments
  local words=''
  ((${#environment[@]} == 0)) || words="$(quoted "${environment[@]}") "
  # shellcheck disable=SC2016
  words+='"$HOME/fsdfm_env/bin/python" -m fsdfm_jax.main --distributed '$(quoted "$@")
  on_all_hosts "program=$(quoted "cd \"\$HOME/fsdfm_jax\" && exec env $words")
$(
    cat <<'END'
run=$HOME/fsdfm_run
mkdir -p "$run"
if [ ! -e "$run/exit" ] && kill -0 "$(cat "$run/pid" 2>/dev/null)" 2>/dev/null; then
  echo "already running on $(hostname); stop it first" >&2
  exit 1
fi
rm -f "$run/exit" "$run/stopped" "$run/pid"
export run program
# Files are written atomically: they are renamed into place.
nohup setsid bash -c 'bash -c "$program" &
  echo $! >"$run/new"; mv "$run/new" "$run/pid"
  wait $!; echo $? >"$run/new"; mv "$run/new" "$run/exit"' >>"$run/log" 2>&1 </dev/null &
until [ -e "$run/pid" ]; do sleep 0.1; done
END
  )"
}

# Prints a line per host: its exit code, or running, stopped, lost (started, but no longer there).
look=$(
  cat <<'END'
run=$HOME/fsdfm_run
status=lost
for look in first second; do
  if [ -e "$run/stopped" ] && [ -e "$run/exit" ]; then status=stopped; break; fi
  if [ -e "$run/exit" ]; then status=$(cat "$run/exit"); break; fi
  if kill -0 "$(cat "$run/pid" 2>/dev/null)" 2>/dev/null; then status=running; break; fi
  sleep 1 # the exit code appears shortly after the program ends
done
echo "fsdfm_host $(hostname) $status"
END
)

end_program() { # marker file to leave on hosts where the program was running, or ''
  on_all_hosts "mark=$1 grace=$grace
$(
    cat <<'END'
run=$HOME/fsdfm_run
pid=$(cat "$run/pid" 2>/dev/null) || exit 0
[ ! -e "$run/exit" ] || exit 0
[ -z "$mark" ] || touch "$run/$mark"
kill -TERM "$pid" 2>/dev/null
for second in $(seq "$grace"); do
  kill -0 "$pid" 2>/dev/null || exit 0
  sleep 1
done
kill -KILL "$pid" 2>/dev/null || true
END
  )"
}

statuses() { # prints the status of every host, one per line; fails if one can't be reached
  local answer
  if ! answer=$(on_all_hosts "$look" 2>&1); then
    say "can't reach every host: ${answer##*$'\n'}"
    return 1
  fi
  awk '{ for (i = 1; i + 2 <= NF; i++) if ($i == "fsdfm_host") { print $(i + 2); any = 1 } }
    END { exit !any }' <<<"$answer"
}

verdict() { # statuses of all hosts, one per line: prints the overall status
  local first
  # A host that exits with 2, or is stopped, makes the others fail: these statuses take precedence
  # over the exit codes of the others.
  for first in 2 stopped 143; do
    if grep -qx "$first" <<<"$1"; then
      echo "$first"
      return
    fi
  done
  first=$(grep -vxm 1 -e running -e 0 <<<"$1") || first=0
  [[ $first != lost ]] || first=1
  echo "$first"
}

watch() { # sets `outcome`: an exit code, stopped, or preempted
  local now answer pause=$poll settled=''
  if [[ $dry_run ]]; then
    quoted gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      '--format=value(state.state)'
    on_all_hosts "$look"
    outcome=0
    return
  fi
  while true; do
    sleep "$pause"
    if now=$(state) && [[ $now != ACTIVE ]]; then
      say "$name is $now"
      outcome=preempted
      return
    fi
    answer=$(statuses) || continue
    outcome=$(verdict "$answer")
    grep -qx running <<<"$answer" || return 0
    case $outcome in
      0) ;;
      2 | stopped) return ;;
      *)
        [[ -z $settled ]] || return 0
        settled=yes pause=$settle
        ;;
    esac
  done
}

# Sets `running` if the program already runs on any host. Nothing is started or stopped before all
# hosts have answered: a host that is briefly unreachable may be running it.
find_running() {
  local now answer try
  [[ -z $dry_run ]] || return 0
  for try in {1..10}; do
    ((try == 1)) || sleep "$((poll < 10 ? poll : 10))"
    now=$(state) || continue
    [[ $now == ACTIVE ]] || return 0
    answer=$(statuses) || continue
    if grep -qx running <<<"$answer"; then running=yes; fi
    return
  done
  say "not every host answered in $try attempts; nothing was stopped or started. If the message" \
    "above doesn't help, 'delete' deletes the slices, and 'run' creates new ones."
  exit 1
}

give_up() { # exit code; ends hosts that still wait for the others and so occupy their TPUs
  end_program '' || say "can't end the program on some hosts; it may still run there"
  exit "$1"
}

run() { # program arguments
  local failures=0 created='' running=''
  find_running
  while true; do
    outcome=failed
    if [[ $running ]]; then
      say "already running on ${nodes[*]}: watching it"
      watch
    elif create; then
      created=yes
      if end_program '' && install && start "$@"; then
        [[ $dry_run ]] || say "running on ${nodes[*]}; output: $0 logs --name=$name --zone=$zone"
        watch
      fi
    elif [[ -z $created ]]; then
      fail "can't create $name; the message above says why."
    fi
    running=''
    case $outcome in
      0) return ;;
      2)
        say "exit code 2: you must fix something, see $0 logs --name=$name --zone=$zone"
        give_up 2
        ;;
      stopped)
        say "stopped"
        exit 143
        ;;
      preempted) continue ;;
      143) say "the program received SIGTERM, as at the start of a preemption" ;;
      *)
        failures=$((failures + 1))
        say "failed with '$outcome', failure $failures of at most $((restarts + 1))"
        if ((failures > restarts)); then
          [[ $outcome != failed ]] || outcome=1
          give_up "$outcome"
        fi
        ;;
    esac
    sleep "$poll"
  done
}

outcome=''
case $action in
  run) run "$@" ;;
  create) create ;;
  install) install ;;
  start) start "$@" ;;
  watch)
    watch
    say "ended: $outcome"
    case $outcome in
      stopped) exit 143 ;;
      preempted) exit 1 ;;
      *) exit "$outcome" ;;
    esac
    ;;
  status)
    if [[ $dry_run ]]; then
      watch
    else
      now=$(state) || exit 1
      echo "$name $now"
      [[ $now != ACTIVE ]] || on_all_hosts "$look"
    fi
    ;;
  logs)
    ((slice < slices)) || fail "--slice=$slice is not one of the $slices slices; give --slices."
    # shellcheck disable=SC2016
    on_hosts "${nodes[slice]}" "$worker" 'tail -n 100 -F "$HOME/fsdfm_run/log"'
    ;;
  stop) end_program stopped ;;
  delete) delete ;;
esac
