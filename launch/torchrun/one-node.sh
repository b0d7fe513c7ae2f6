#!/usr/bin/env bash
# Trains a recipe on this machine, one rank a GPU (or RANKS of them on the CPU):
#
#     bash launch/torchrun/one-node.sh recipes/hope-340m.yaml [key=value ...]
#
# A run whose rank is lost is started again from its last checkpoint, RESTARTS times. Ctrl-C, SIGTERM
# or the loss of the terminal stops it after the step under way, with a checkpoint; the same command
# goes on. Under nohup the terminal may go.
set -euo pipefail
if [ "$#" -eq 0 ]; then
    echo "usage: bash launch/torchrun/one-node.sh RECIPE [KEY=VALUE ...]" >&2
    exit 2
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun would leave a folder of each start in /tmp; the ranks' output is not redirected there.
export PET_LOG_DIR=${PET_LOG_DIR:-/dev/null}
# torchrun would stop for a terminal that goes (SIGHUP) even under nohup, which asks it not to.
if [[ "$(trap -p HUP)" == "trap -- ''"* ]]; then
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
fi
# --shutdown-timeout: seconds for the checkpoint of a run that is told to stop; torchrun's own 30
# would kill the ranks while they write it.
exec torchrun --standalone --nproc-per-node "$ranks" \
    --max-restarts "${RESTARTS:-0}" --shutdown-timeout "${STOP_SECONDS:-900}" \
    -m nlscale train "$@"
