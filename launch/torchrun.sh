#!/usr/bin/env bash
# Supervised fine-tuning on N ranks of this machine, or on this node's share of several machines:
#   launch/torchrun.sh 2 data.train_files=sft.parquet model.path=MODEL megatron.tensor_model_parallel_size=2
# Several machines: run it on each, with the same command, and
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host-of-node-0 MASTER_PORT=29500 launch/torchrun.sh 8 ...
# MODULE=hybridrl.trainer.main_ppo runs PPO instead, with rank 0 driving (trainer.executor=torchrun).
# PYTHON names the interpreter (default: python).
set -euo pipefail

usage="usage: launch/torchrun.sh RANKS_ON_THIS_NODE key=value ...   (keys: python -m hybridrl.trainer.main_sft --help)"
ranks=${1:?$usage}
shift
case $ranks in *[!0-9]* | 0) echo "$usage" >&2; exit 2 ;; esac
nnodes=${NNODES:-1}
if [ "$nnodes" -gt 1 ]; then
    : "${NODE_RANK:?NNODES=$nnodes needs NODE_RANK=0..$((nnodes - 1)), a different one on each node}"
    : "${MASTER_ADDR:?NNODES=$nnodes needs MASTER_ADDR, a name or address of the node with NODE_RANK=0}"
    rendezvous=(--nnodes "$nnodes" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
                --master_port "${MASTER_PORT:-29500}")
else
    rendezvous=(--standalone)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
exec "${PYTHON:-python}" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$ranks" \
    -m "${MODULE:-hybridrl.trainer.main_sft}" "$@"
