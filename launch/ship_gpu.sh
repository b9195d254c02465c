#!/usr/bin/env bash
# The model that comes with the package, trained on one large GPU that is lent for minutes.
#
#   launch/ship_gpu.sh [options] WORKDIR OUT
#
# Trains configs/shipped.py:gpu until the time is up, then puts all that the next lease needs into
# OUT/state.tar.NN, in pieces of 15 MB; the next one is given the same OUT, takes them and goes on.
# Once the training has ended, OUT/shipped gets the model and its card, and the pieces go.
#
# --limit=SECONDS  of training (default 1500); the step at hand is saved then
# --size=SIZE      of configs/shipped.py (default gpu); smoke takes minutes on a CPU
# --dry_run        print the commands and run none
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

limit=1500 size=gpu dry_run=''
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    --limit=*) limit=${1#*=} ;;
    --size=*) size=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --*) echo "ship_gpu.sh: unknown option '$1'; see --help" >&2; exit 2 ;;
    *) break ;;
  esac
  shift
done
if (($# != 2)); then
  echo "ship_gpu.sh: expected WORKDIR and OUT, got $# argument(s); see --help" >&2
  exit 2
fi
if [[ ! $limit =~ ^[1-9][0-9]*$ ]]; then
  echo "ship_gpu.sh: --limit must be a number of seconds from 1 on, got '$limit'" >&2
  exit 2
fi
work=$1 out=$2 python=${PYTHON:-python}
# SIGTERM saves the step at hand; what hasn't ended two minutes later is killed.
train=(timeout --kill-after=120 "$limit" "$python" -m fsdfm_jax.main
  --config="$here/configs/shipped.py:$size" --workdir="$work")
ship=("$python" -m launch.ship "$work" --target="$out/shipped")
if [[ $dry_run ]]; then
  printf '%q ' "${train[@]}" && echo
  printf '%q ' "${ship[@]}" && echo
  exit
fi

export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$work" "$out"
if compgen -G "$out/state.tar.*" >/dev/null && [[ ! -e $work/config.json ]]; then
  cat "$out"/state.tar.* | tar -x -C "$work"
fi
code=0
"${train[@]}" || code=$?
if ((code == 0)); then
  "${ship[@]}"
  rm -f "$out"/state.tar.*
  exit
fi
# The old pieces go when the new ones are whole.
rm -f "$out"/new.tar.*
tar -c -C "$work" . | split -b 15M -d - "$out/new.tar."
rm -f "$out"/state.tar.*
for piece in "$out"/new.tar.*; do
  mv "$piece" "$out/state.tar.${piece##*.}"
done
echo "ship_gpu.sh: the training ended with $code; its state is in $out." >&2
exit "$code"
