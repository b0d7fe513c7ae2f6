#!/usr/bin/env bash
# Installs what the tests need and runs them:
#
#     bash tests/run.sh             all of them, several at a time
#     bash tests/run.sh --quick     those that take less than half a second each, for the edit loop
#     bash tests/run.sh --record    all, and write down how long they take (tests/seconds.json)
#     bash tests/run.sh tests/ops   some of them; arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/install.sh
NLSCALE_EXTRAS=dev,docs source launch/install.sh

# The tests of several nodes make network namespaces and start a Slurm of their own, those of full
# drives mount an ext4 through a loop device; they need root.
# What is compiled for GPUs is compiled for the CPU there, with g++.
# Where a tool is missing and cannot be installed here, its tests fail and say so.
missing=()
for tool in ip:iproute2 tc:iproute2 shellcheck:shellcheck sbatch:slurm-wlm munged:munge \
        g++:g++ mkfs.ext4:e2fsprogs; do
    command -v "${tool%:*}" >/dev/null || missing+=("${tool#*:}")
done
if [ "${#missing[@]}" -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
fi

# More workers than cores: what waits (for Slurm, killed ranks, links) runs beside what computes. A
# thread each: more would wait for each other's cores. (nproc heeds OMP_NUM_THREADS: it comes first.)
workers=$(($(nproc) * 3 / 2))
export OMP_NUM_THREADS=1
# Hundreds of processes import what lies here; none but the first is to compile it.
unset PYTHONDONTWRITEBYTECODE
# torch.compile would start processes that import torch, for a handful of small functions.
export TORCHINDUCTOR_COMPILE_THREADS=1
# A worker that dies (of a test that hangs, see pyproject.toml) ends the run: pytest-xdist 3.8, which
# would start another, waits for ever then (its issues 1323 and 1327).
together=(-n "$((workers < 8 ? workers : 8))" --dist loadgroup --no-loadscope-reorder
    --max-worker-restart 0)
case "${1:-}" in
    "" | --record) exec .venv/bin/python -m pytest "${together[@]}" --durations 10 "$@" ;;
    --quick) shift; exec .venv/bin/python -m pytest "${together[@]}" -m "not slow" "$@" ;;
    *) exec .venv/bin/python -m pytest "$@" ;;
esac
