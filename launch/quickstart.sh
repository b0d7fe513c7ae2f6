#!/usr/bin/env bash
# From a fresh clone to a trained small Hope and a figure: installs into .venv, builds token shards
# from the Python standard library's own text, trains recipes/quickstart.yaml on two ranks.
# Running it again skips what is done. KEY=VALUE arguments override the recipe.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/install.sh
source launch/install.sh

export PATH="$PWD/.venv/bin:$PATH"
nlscale data build --source stdlib --tokenizer bytes --held-out 0.03 --out data/stdlib

# Two ranks: on two GPUs where there are that many, on one GPU alone, else on the CPU with gloo.
ranks=$(python -c 'import torch; print(min(2, torch.cuda.device_count()) or 2)')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}
torchrun --standalone --nproc-per-node "$ranks" -m nlscale train recipes/quickstart.yaml "$@"
