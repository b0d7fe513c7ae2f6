#!/usr/bin/env bash
# Trains a recipe on several machines that share a file system. On every one of them:
#
#     HEAD=node-a:29500 NODES=2 NODE_RANK=0 bash launch/torchrun/many-nodes.sh RECIPE [KEY=VALUE ...]
#
# HEAD is the first node, reachable from the others at that port; NODE_RANK is 0 there and counts up.
# Without NODE_RANK the nodes find their ranks themselves (torchrun's c10d rendezvous), and with
# RESTARTS=n a run that lost a rank starts again on all nodes, from its last checkpoint. INTERFACE is
# the network interface to use, such as ib0, where the automatic choice is wrong.
set -euo pipefail
if [ "$#" -eq 0 ] || [ -z "${HEAD:-}" ] || [ -z "${NODES:-}" ]; then
    echo "usage: HEAD=host:port NODES=n [NODE_RANK=i] bash launch/torchrun/many-nodes.sh RECIPE ..." >&2
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
if [ -n "${INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi
if [ -n "${NODE_RANK:-}" ]; then
    meet=(--node-rank "$NODE_RANK" --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}")
else
    meet=(--rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-nlscale}"
        --max-restarts "${RESTARTS:-0}")
fi
# --shutdown-timeout: seconds for the checkpoint of a run that is told to stop.
exec torchrun --nnodes "$NODES" --nproc-per-node "$ranks" "${meet[@]}" \
    --shutdown-timeout "${STOP_SECONDS:-900}" -m nlscale train "$@"
