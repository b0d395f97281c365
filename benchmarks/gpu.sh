#!/usr/bin/env bash
# The whole GPU programme in under 20 minutes, correctness first: bash benchmarks/gpu.sh [DATASET]
# Needs the extras of the GPU and of the benchmarks: pip install -e ".[cuda12,bench]". Writes benchmarks/results/gpu/all.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python -c 'import jax; assert jax.default_backend() == "gpu", f"no GPU: jax runs on {jax.default_backend()}"'
exec python -m benchmarks.all --device gpu --minutes 6 ${1:+--dataset "$1"}
