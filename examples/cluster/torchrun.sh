#!/bin/bash
# A recipe on several machines of 8 GPUs with torchrun. Start it on every machine; RANK_OF_MACHINE counts from 0, and
# FIRST_MACHINE is the name or address of machine 0 by which the others reach it.
#
#   align plan examples/cluster/two_hosts.yaml --model medium --gpus 16 --gpu h100
#   MACHINES=2 RANK_OF_MACHINE=0 FIRST_MACHINE=gpu-01 examples/cluster/torchrun.sh examples/cluster/two_hosts.yaml
set -euo pipefail
recipe=${1:?pass a recipe}
processes=$((8 * ${MACHINES:?number of machines}))

align check "$recipe" parallel.processes="$processes"

# torchrun sets one thread per rank, too few for an optimizer that is offloaded to the CPU.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / 8))}

# --shutdown-timeout: torchrun passes SIGTERM on to the ranks and kills them after this many seconds; the default, 30, is
# too short for a checkpoint.
exec torchrun --nnodes "$MACHINES" --nproc-per-node 8 --node-rank "${RANK_OF_MACHINE:?0 on the first machine}" \
    --master-addr "${FIRST_MACHINE:?address of machine 0}" --master-port 29500 --shutdown-timeout 600 \
    -m align.cli run "$recipe" --resume parallel.processes="$processes"
