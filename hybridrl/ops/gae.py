"""Generalised advantage estimation (Schulman et al., arXiv:1506.02438) over packed responses, one launch a batch.

Shape suffixes: R response tokens of all sequences, flat; N sequences, with boundaries cu_resp [N + 1].
"""

import numpy as np
import torch

from hybridrl.ops import native


def _check(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, cu_resp: torch.Tensor) -> None:
    for name, tensor in (("rewards", rewards), ("values", values), ("mask", mask)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"gae: {name} must be float32, not {tensor.dtype}")
        if tensor.dim() != 1 or tensor.shape != rewards.shape:
            raise ValueError(f"gae: {name} has shape {tuple(tensor.shape)}; rewards, values and mask must all be [R]")
    if cu_resp.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"gae: cu_resp must be int32 or int64, not {cu_resp.dtype}")
    if cu_resp.dim() != 1 or cu_resp.shape[0] < 1:
        raise ValueError(f"gae: cu_resp has shape {tuple(cu_resp.shape)}; it must be [N + 1]")
    for name, tensor in (("rewards", rewards), ("values", values), ("mask", mask), ("cu_resp", cu_resp)):
        if not tensor.is_contiguous():
            raise ValueError(f"gae: {name} must be contiguous; pass {name}.contiguous()")
        if tensor.device != rewards.device:
            raise ValueError(f"gae: {name} is on {tensor.device}, but rewards on {rewards.device}")


def _check_boundaries(cu_resp: torch.Tensor, tokens: int) -> None:
    ascending = bool((cu_resp[1:] >= cu_resp[:-1]).all())
    if cu_resp[0] != 0 or cu_resp[-1] != tokens or not ascending:
        raise ValueError(f"gae: cu_resp must ascend from 0 to the number of response tokens, {tokens}")


@torch.library.custom_op("hybridrl::gae", mutates_args=())
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, cu_resp: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns of packed responses, not whitened.

    rewards, values, mask: float32 [R], contiguous, on one device; cu_resp: int32 or int64 [N + 1], ascending from 0 to
    R (checked on the CPU; on CUDA it is trusted, since reading it would stall the stream). From the last token of a
    sequence to its first, A = V' = 0 after the end:

        mask != 0:  A = (r + gamma V' - V) + gamma lam A;   V' = V
        mask == 0:  A and V' are carried through unchanged (a tool's tokens take no part, nor does their reward)

    Returns (advantages, returns), float32 [R] each, with returns = A + V at every token. No gradients flow.
    Deterministic; a sequence's numbers do not depend on the rest of the batch. ValueError names a tensor that is of the
    wrong dtype, shape, device or not contiguous.
    """
    _check(rewards, values, mask, cu_resp)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    tokens, rows = rewards.shape[0], cu_resp.shape[0] - 1
    addresses = [t.data_ptr() for t in (rewards, values, mask, cu_resp)]
    arguments = (*addresses, cu_resp.dtype == torch.int64, advantages.data_ptr(), returns.data_ptr(), rows, tokens)
    if rewards.device.type == "cpu":
        _check_boundaries(cu_resp, tokens)
        native().gae_cpu(*arguments, gamma, lam, torch.get_num_threads())
    elif rewards.device.type == "cuda":
        if not native().cuda_built:
            raise ValueError(
                "gae: the tensors are on a GPU, but hybridrl was built without CUDA. Build it where nvcc is found: "
                "HYBRIDRL_CUDA=1 pip install --no-build-isolation -e ."
            )
        with torch.cuda.device(rewards.device):
            native().gae_cuda(*arguments, gamma, lam, torch.cuda.current_stream().cuda_stream)
    else:
        raise ValueError(f"gae: no kernel for tensors on {rewards.device}")
    return advantages, returns


@gae.register_fake
def _(rewards, values, mask, cu_resp, gamma, lam):
    _check(rewards, values, mask, cu_resp)
    return torch.empty_like(rewards), torch.empty_like(rewards)


def gae_reference(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, cu_resp: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in `gae` as a float64 loop on the CPU, the oracle of the kernels. Returns float64 [R] each."""
    r, v, m = (np.asarray(t.detach().cpu(), dtype=np.float64) for t in (rewards, values, mask))
    advantages = np.zeros_like(r)
    for begin, end in zip(cu_resp.tolist()[:-1], cu_resp.tolist()[1:], strict=True):
        next_value = advantage = 0.0
        for t in range(end - 1, begin - 1, -1):
            if m[t] != 0:
                advantage = r[t] + gamma * next_value - v[t] + gamma * lam * advantage
                next_value = v[t]
            advantages[t] = advantage
    return torch.from_numpy(advantages), torch.from_numpy(advantages + v)
