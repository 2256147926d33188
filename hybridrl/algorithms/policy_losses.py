"""Policy losses on packed responses, found by verl's names (`actor_rollout_ref.actor.policy_loss.loss_mode`)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hybridrl.algorithms.aggregation import Denominators, aggregate, masked_sum


@dataclass(frozen=True)
class PolicyLossInputs:
    """One piece (micro-batch) of a mini-batch.

    logprobs [R], with gradient; old_logprobs, advantages, response_mask [R] float32; cu_resp [N + 1]; denom: the whole
    mini-batch's denominators; mode: how token losses become one number (aggregation.MODES). The ratio pi / pi_old is
    clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]; clip_ratio_c bounds the loss where the advantage is negative.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor
    cu_resp: torch.Tensor
    denom: Denominators
    mode: str = "token-mean"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0


PolicyLoss = Callable[[PolicyLossInputs], tuple[torch.Tensor, dict[str, torch.Tensor]]]
_LOSSES: dict[str, PolicyLoss] = {}


def _register(name: str) -> Callable[[PolicyLoss], PolicyLoss]:
    def add(fn: PolicyLoss) -> PolicyLoss:
        _LOSSES[name] = fn
        return fn

    return add


def names() -> list[str]:
    """The losses' names, sorted."""
    return sorted(_LOSSES)


def policy_loss(name: str, inputs: PolicyLossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This piece's part of the mini-batch's loss (float32 scalar with gradient) and of its metrics (scalars without).

    Loss and metrics are already divided by the global denominators: summed over micro-batches and data-parallel ranks
    they are the whole mini-batch's. ValueError: unknown name.
    """
    if name not in _LOSSES:
        raise ValueError(
            f"unknown actor_rollout_ref.actor.policy_loss.loss_mode {name!r}: it must be one of {', '.join(names())}"
        )
    return _LOSSES[name](inputs)


@_register("vanilla")
def vanilla(inputs: PolicyLossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped objective (arXiv:1707.06347) with dual clip (arXiv:1912.09729).

    With rho = exp(clamp(log pi - log pi_old, -20, 20)): L = max(-A rho, -A clip(rho)), and where A < 0 at most -A c.
    Metrics, means over tokens: actor/pg_clipfrac (clip(rho) decides), actor/pg_clipfrac_lower (c decides),
    actor/ppo_kl (-log rho, nats). ValueError: clip_ratio_c not above 1.
    """
    if inputs.clip_ratio_c <= 1.0:
        raise ValueError(f"actor_rollout_ref.actor.clip_ratio_c={inputs.clip_ratio_c}: it must be above 1 (usually 3)")
    advantages = inputs.advantages
    log_ratio = (inputs.logprobs - inputs.old_logprobs).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - inputs.clip_ratio_low, 1.0 + inputs.clip_ratio_high)
    pessimistic = torch.maximum(unclipped, clipped)
    ceiling = -advantages * inputs.clip_ratio_c
    negative = advantages < 0
    per_token = torch.where(negative, torch.minimum(pessimistic, ceiling), pessimistic)
    loss = aggregate(per_token, inputs.response_mask, inputs.cu_resp, inputs.mode, inputs.denom)

    def token_mean(x: torch.Tensor) -> torch.Tensor:
        return masked_sum(x.detach().float(), inputs.response_mask) / max(inputs.denom.tokens, 1.0)

    return loss, {
        "actor/pg_clipfrac": token_mean(clipped > unclipped),
        "actor/pg_clipfrac_lower": token_mean((pessimistic > ceiling) & negative),
        "actor/ppo_kl": token_mean(-log_ratio),
    }
