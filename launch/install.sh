# shellcheck shell=bash
# Sourced by the scripts that a person starts from a fresh clone: makes .venv and installs nlscale
# into it, once for each state of pyproject.toml and constraints.txt. NLSCALE_EXTRAS adds extras.

python_for_venv() {
    local name
    for name in "${PYTHON:-python3}" python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "nlscale needs Python 3.10, 3.11 or 3.12; install one, or set PYTHON=/path/to/python" >&2
    return 1
}

install_nlscale() {
    local extras=${NLSCALE_EXTRAS:-} stamp marks extra mark missing='' python
    stamp=.venv/.installed-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
    # a mark for nlscale itself, and one for each extra, whenever it was installed
    marks=("$stamp")
    for extra in ${extras//,/ }; do marks+=("$stamp-$extra"); done
    for mark in "${marks[@]}"; do [ -e "$mark" ] || missing=yes; done
    if [ -z "$missing" ]; then return; fi
    python=$(python_for_venv)
    if [ ! -x .venv/bin/python ]; then
        "$python" -m venv .venv || {
            echo "could not make .venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
            return 1
        }
    fi
    echo "installing nlscale${extras:+ with $extras} into .venv (a minute or two, once)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".${extras:+[$extras]}"
    if [ ! -e "$stamp" ]; then rm -f .venv/.installed-*; fi  # those of another state
    touch "${marks[@]}"
}

install_nlscale
