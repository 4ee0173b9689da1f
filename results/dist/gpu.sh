#!/usr/bin/env bash
# FSDP2 on one accelerator: the measured peak memory against the prediction. A model of SHAPE
# (Qwen3-4B) with random weights takes three GRPO steps in a mesh of one, bfloat16 with float32
# masters.
#   bash results/dist/gpu.sh [OUT] [DEVICE]
#   SHAPE=tiny DTYPE=float32 bash results/dist/gpu.sh /tmp/dist cpu         tries it anywhere
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-results/dist} device=${2:-cuda} shape=${SHAPE:-qwen3-4b} dtype=${DTYPE:-bfloat16}
mkdir -p "$out"
torchrun --standalone --nproc-per-node 1 bench.py memory --shape "$shape" --no-files --steps 3 \
    --dtype "$dtype" --device "$device" --prompts 8 --group-size 8 --prompt-tokens 256 \
    --new-tokens 512 --micro-batch-tokens 8192 --json "$out/memory-$shape-$device.json"
