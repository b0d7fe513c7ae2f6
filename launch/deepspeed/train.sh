#!/usr/bin/env bash
# Trains a recipe on the machines of a hostfile, with DeepSpeed's launcher (over pdsh and ssh):
#
#     bash launch/deepspeed/train.sh hosts.txt RECIPE [KEY=VALUE ...]
#
# hosts.txt has a line for each node, such as `node-a slots=8`; the nodes share a file system, and
# this folder is at the same place on each. DRY_RUN=1 prints the command instead of running it.
# Variables in ~/.deepspeed_env or .deepspeed_env (NAME=value lines) are set on every node.
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "usage: bash launch/deepspeed/train.sh HOSTFILE RECIPE [KEY=VALUE ...]" >&2
    exit 2
fi
hostfile=$1
shift
if [ ! -r "$hostfile" ]; then
    echo "no hostfile at $hostfile; it has a line for each node, such as: node-a slots=8" >&2
    exit 2
fi
command=(deepspeed --hostfile "$hostfile" --master_port "${PORT:-29500}" --no_local_rank
    --module nlscale train "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
