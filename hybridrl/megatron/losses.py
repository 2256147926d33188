"""The actor's, the critic's and supervised losses as the engine takes them: head outputs and a pack in, scalar out.

Denominators are the whole mini-batch's; see hybridrl.algorithms. Metrics are summed over micro-batches and ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridrl.algorithms.aggregation import Denominators, aggregate
from hybridrl.algorithms.correction import Correction, correct_live
from hybridrl.algorithms.kl import kl_penalty
from hybridrl.algorithms.policy_losses import LossOptions, PolicyLossInputs, policy_loss
from hybridrl.algorithms.value_loss import value_loss
from hybridrl.data.packed import PackedBatch


@dataclass(frozen=True)
class ActorLoss:
    """The policy objective: loss_mode, its clip ranges, aggregation, entropy bonus and KL term.

    columns: what the policy loss reads beside advantages and old log-probs. bypass: rollout correction by the current
    policy, where old_logprobs are the rollout engine's.
    """

    loss_mode: str
    loss_agg_mode: str
    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_c: float
    entropy_coeff: float
    use_kl_loss: bool
    kl_loss_coef: float
    kl_loss_type: str
    loss_scale_factor: float | None
    options: LossOptions = LossOptions()
    columns: tuple[str, ...] = ()
    bypass: Correction | None = None

    def __call__(self, out: dict[str, Tensor], pack: PackedBatch, denom: Denominators):
        """Loss and metrics of one micro-batch. Without an old_logprobs column the batch is exactly on-policy: the ratio
        is 1 and old log-probs are this forward's own."""
        logprobs, mask, cu = out["logprobs"], pack.response_mask, pack.cu_resp
        old = pack.columns.get("old_logprobs", logprobs.detach())
        weights, kept, corrected = pack.columns.get("rollout_is_weights"), mask, {}
        if self.bypass:
            weights, kept, corrected = correct_live(self.bypass, logprobs, old, mask, cu, denom)
        loss, metrics = policy_loss(
            self.loss_mode,
            PolicyLossInputs(
                logprobs=logprobs,
                old_logprobs=old,
                advantages=pack.columns["advantages"],
                response_mask=kept,
                cu_resp=cu,
                denom=denom,
                mode=self.loss_agg_mode,
                clip_ratio_low=self.clip_ratio_low,
                clip_ratio_high=self.clip_ratio_high,
                clip_ratio_c=self.clip_ratio_c,
                rollout_is_weights=weights,
                selected=pack.columns.get("selected"),
                options=self.options,
            ),
        )
        metrics |= corrected
        metrics["actor/pg_loss"] = loss.detach()
        metrics["actor/entropy"] = _token_mean(out["entropy"], pack, denom)
        if self.entropy_coeff != 0.0:
            loss = loss - self.entropy_coeff * aggregate(out["entropy"], mask, cu, self.loss_agg_mode, denom)
        if self.use_kl_loss:
            kl = kl_penalty(logprobs, pack.columns["ref_logprobs"], self.kl_loss_type)
            kl_loss = aggregate(kl, mask, cu, self.loss_agg_mode, denom)
            metrics["actor/kl_loss"] = kl_loss.detach()
            loss = loss + self.kl_loss_coef * kl_loss
        metrics["actor/loss"] = loss.detach()
        return loss, metrics


@dataclass(frozen=True)
class CriticLoss:
    cliprange_value: float
    loss_agg_mode: str
    loss_scale_factor: float | None

    def __call__(self, out: dict[str, Tensor], pack: PackedBatch, denom: Denominators):
        """Clipped value loss and metrics of one micro-batch."""
        loss, metrics = value_loss(
            out["values"],
            pack.columns["values"],
            pack.columns["returns"],
            pack.response_mask,
            pack.cu_resp,
            denom,
            self.cliprange_value,
            self.loss_agg_mode,
        )
        metrics["critic/vf_loss"] = metrics["critic/loss"] = loss.detach()
        return loss, metrics


@dataclass(frozen=True)
class SupervisedLoss:
    """Mean negative log-likelihood of the response tokens."""

    loss_scale_factor: None = None

    def __call__(self, out: dict[str, Tensor], pack: PackedBatch, denom: Denominators):
        loss = aggregate(-out["logprobs"], pack.response_mask, pack.cu_resp, "token-mean", denom)
        return loss, {"loss": loss.detach(), "entropy": _token_mean(out["entropy"], pack, denom)}


def _token_mean(x: Tensor, pack: PackedBatch, denom: Denominators) -> Tensor:
    return aggregate(x.detach(), pack.response_mask, pack.cu_resp, "token-mean", denom)


def collect(out: dict[str, Tensor], pack: PackedBatch) -> tuple[None, dict[str, Tensor]]:
    """For forward-only passes: no loss, the per-token outputs themselves."""
    return None, {name: value.detach() for name, value in out.items()}


def to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """One device read for all of a mini-batch's metrics."""
    if not metrics:
        return {}
    stacked = torch.stack([value.float().reshape(()) for value in metrics.values()]).tolist()
    return dict(zip(metrics, stacked, strict=True))
