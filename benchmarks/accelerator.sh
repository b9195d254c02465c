#!/usr/bin/env bash
# All speed measurements of one accelerator in half an hour, each into a JSON file of its own.
#
#   benchmarks/accelerator.sh OUTPUT_FOLDER
#
# A measurement that fails or takes longer than its share is skipped, and the others go on.
# SIZES, DTYPE, LENGTH, ROUNDS and QUICK=1 (small batches, to try the script out) change what is run.
set -uo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $0 OUTPUT_FOLDER" >&2
  exit 2
fi
output=$1
mkdir -p "$output"
read -r -a sizes <<<"${SIZES:-0.17B 1.3B}"
dtype=${DTYPE:-bfloat16}
length=${LENGTH:-1024}
rounds=${ROUNDS:-5}
failed=0
# A second run of a program is not compiled again.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$output/compiled}

measure() { # name, seconds, module, arguments
  local name=$1 limit=$2 module=$3
  shift 3
  echo "== $name"
  if ! timeout "$limit" python -m "benchmarks.$module" "$@" --output="$output/$name.json" \
    2>"$output/$name.log"; then
    echo "   failed or out of time; see $output/$name.log" >&2
    failed=$((failed + 1))
  fi
}

for size in "${sizes[@]}"; do
  common=(--size="$size" --length="$length" --dtype="$dtype" --rounds="$rounds")
  # The largest batches that 80 GB hold with parameters, average and moments in float32.
  if [[ $size == 1.3B ]]; then train=8 pretrain=16; else train=32 pretrain=64; fi
  sample=32 steps=8,1024
  if [[ ${QUICK:-} ]]; then train=2 pretrain=2 sample=2 steps=2,4; fi
  measure "pretrain-$size" 240 train --stage=pretrain --batch="$pretrain" "${common[@]}" \
    --cases=ours --logits_mib=1024
  measure "distill-$size" 240 train --batch="$train" "${common[@]}" --cases=ours --logits_mib=1024
  measure "sample-$size" 240 sample --batch="$sample" --steps=8 "${common[@]}" --cases=ours \
    --logits_mib=1024
  measure "levers-$size" 360 train --batch="$((train / 4 > 2 ? train / 4 : 2))" "${common[@]}" \
    --logits_mib=1024
done
common=(--length="$length" --dtype="$dtype")
measure "steps-${sizes[0]}" 240 sample --size="${sizes[0]}" --batch=1 --steps="${steps:-8,1024}" \
  "${common[@]}" --rounds=2 --cases=ours
exit "$((failed > 0))"
