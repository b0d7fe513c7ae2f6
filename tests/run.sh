#!/usr/bin/env bash
# Installs what the tests need and runs all of them. Arguments go to pytest: tests/run.sh tests/ops
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/install.sh
NLSCALE_EXTRAS=dev source launch/install.sh

# The tests of several nodes make network namespaces and start a Slurm of their own; they need root.
# What is compiled for GPUs is compiled for the CPU there, with g++.
# Where a tool is missing and cannot be installed here, its tests fail and say so.
missing=()
for tool in ip:iproute2 tc:iproute2 shellcheck:shellcheck sbatch:slurm-wlm munged:munge \
        g++:g++; do
    command -v "${tool%:*}" >/dev/null || missing+=("${tool#*:}")
done
if [ "${#missing[@]}" -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
fi
exec .venv/bin/python -m pytest "$@"
