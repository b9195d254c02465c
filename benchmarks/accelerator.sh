#!/usr/bin/env bash
# Measure the speed of one accelerator; each measurement writes a separate JSON file.
#
#   benchmarks/accelerator.sh OUTPUT_FOLDER [PART..]
#
# Parts: small (0.17B) and large (1.3B), at most ten minutes each: pre-training, distillation, sampling.
# levers: the distillation step of 0.17B with one optimisation off at a time, at most five minutes.
# steps: 8 against 1,024 steps, at most two minutes. Default: all parts, half an hour.
# A measurement that fails or exceeds its time limit is skipped.
# Variables: PYTHON, DTYPE, LENGTH, ROUNDS, and QUICK=1 (tiny network, to test the script).
set -uo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: $0 OUTPUT_FOLDER [small] [large] [levers] [steps]" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
output=$(cd "$1" && pwd)
shift
parts=("$@")
[[ $# -gt 0 ]] || parts=(small large levers steps)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python}
common=(--dtype="${DTYPE:-bfloat16}" --length="${LENGTH:-1024}" --rounds="${ROUNDS:-5}")
# The default leaves a quarter of the device memory unused.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.93}
failed=0

measure() { # name, seconds, module, arguments
  local name=$1 limit=$2 module=$3
  shift 3
  echo "== $name"
  if ! timeout "$limit" "$python" -m "benchmarks.$module" "${common[@]}" "$@" \
    --output="$output/$name.json" 2>"$output/$name.log"; then
    echo "   failed or out of time: $output/$name.log" >&2
    failed=$((failed + 1))
  fi
}

sizes() { # size, rows in pre-training, in distillation, in sampling
  local size=$1
  if [[ ${QUICK:-} ]]; then set -- tiny 2 2 2; fi
  measure "pretrain-$size" 200 train --size="$1" --batch="$2" --stage=pretrain --cases=ours
  measure "distill-$size" 200 train --size="$1" --batch="$3" --cases=ours
  measure "sample-$size" 200 sample --size="$1" --batch="$4" --cases=ours
}

for part in "${parts[@]}"; do
  small=0.17B few=(--steps=8,1024)
  if [[ ${QUICK:-} ]]; then small=tiny few=(--steps=2,4); fi
  case $part in
    small) sizes 0.17B 64 32 32 ;;
    large) sizes 1.3B 16 8 32 ;;
    levers)
      # One process per case: running out of memory doesn't affect the others.
      for case in "ours" "logits written down" "attention in one piece" "nothing computed again"; do
        measure "levers-${case// /-}" 68 train --size="$small" --batch=8 --cases="$case"
      done
      ;;
    steps) measure steps 120 sample --size="$small" --batch=1 "${few[@]}" --cases=ours --rounds=1 ;;
    *)
      echo "unknown part '$part'; expected small, large, levers or steps" >&2
      exit 2
      ;;
  esac
done
exit "$((failed > 0))"
