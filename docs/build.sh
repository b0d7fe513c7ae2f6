#!/usr/bin/env bash
# Installs what the documentation needs and builds it into site/, with every warning an error.
# Arguments go to mkdocs: docs/build.sh --site-dir elsewhere
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/install.sh
NLSCALE_EXTRAS=docs source launch/install.sh

# The theme prints news of its makers otherwise.
NO_MKDOCS_2_WARNING=1 exec .venv/bin/python -m mkdocs build --strict "$@"
