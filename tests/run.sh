#!/usr/bin/env bash
# Installs what the tests need and runs all of them. Arguments go to pytest: tests/run.sh tests/ops
set -euo pipefail
cd "$(dirname "$0")/.."
NLSCALE_EXTRAS=dev source launch/install.sh

# The tests of several nodes make network namespaces; they need root, ip and tc.
if ! command -v ip >/dev/null || ! command -v tc >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        apt-get install -y -qq iproute2 >/dev/null
    fi
fi
exec .venv/bin/python -m pytest "$@"
