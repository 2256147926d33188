"""Process groups of a role: torch.distributed and Megatron's parallel state, TP x PP x DP.

Rank order is Megatron's default, tp-cp-ep-dp-pp: neighbours share a tensor-parallel group, stages are furthest apart.
"""

import datetime
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from hybridrl.megatron import platform


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands: its place in each group and the groups' sizes."""

    rank: int
    world: int
    tp_rank: int
    tp: int
    pp_rank: int
    pp: int
    dp_rank: int
    dp: int

    @property
    def is_collector(self) -> bool:
        """Whether this rank's results stand for its data-parallel share: last stage, first tensor-parallel rank."""
        return self.tp_rank == 0 and self.pp_rank == self.pp - 1


def initialize(
    rank: int, world: int, device: torch.device, tp: int, pp: int, seed: int, init_method: str
) -> Coordinates:
    """Joins the process group and builds Megatron's groups. Collective over all ranks of the role's pool.

    init_method: "tcp://host:port", "file:///path" or "env://" (torchrun). A second call in a process is an error,
    since Megatron's parallel state is one a process.
    """
    if not dist.is_initialized():
        dist.init_process_group(
            platform.backend(device),
            init_method=init_method,
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(minutes=30),
        )
    mpu.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Coordinates(
        rank=rank,
        world=world,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp=tp,
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        pp=pp,
        dp_rank=mpu.get_data_parallel_rank(),
        dp=mpu.get_data_parallel_world_size(),
    )


def shutdown() -> None:
    """Leaves the groups."""
    if dist.is_initialized():
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
