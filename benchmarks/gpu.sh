#!/usr/bin/env bash
# The whole GPU programme in about 20 minutes, correctness first: bash benchmarks/gpu.sh [DATASET]
# Needs the extras of the GPU and of the benchmarks: pip install -e ".[cuda13,bench]" (driver >= 580; PyTorch brings cuDNN for
# CUDA 13, and that for CUDA 12 would be written over it). Writes benchmarks/results/gpu/all.json.
set -euo pipefail
dataset=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."
python -c 'import jax; assert jax.default_backend() == "gpu", f"no GPU: jax runs on {jax.default_backend()}"'
exec python -m benchmarks.all --device gpu ${dataset:+--dataset "$dataset"}
