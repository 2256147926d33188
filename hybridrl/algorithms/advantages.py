"""Advantage estimators on packed responses, found by verl's names (`algorithm.adv_estimator`).

Statistics (whitening, group means) run in float64 over what they are given, so they must see the whole batch at once;
only samples with at least one token that counts take part in them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hybridrl.algorithms.aggregation import sequence_of_token, tokens_per_sequence
from hybridrl.ops.gae import gae as packed_gae

WHITEN_EPSILON = 1e-8
GRPO_EPSILON = 1e-6


@dataclass(frozen=True)
class AdvantageInputs:
    """A whole batch. Float tensors are float32, contiguous, on one device with the others.

    token_rewards [R]; response_mask [R]; cu_resp [N + 1]; group_ids int64 [N], equal for samples of one prompt (any
    numbers); values [R], where the estimator needs a critic; gamma, lam: discount and GAE's lambda;
    norm_adv_by_std_in_grpo: divide by the group's standard deviation.
    """

    token_rewards: torch.Tensor
    response_mask: torch.Tensor
    cu_resp: torch.Tensor
    group_ids: torch.Tensor
    values: torch.Tensor | None = None
    gamma: float = 1.0
    lam: float = 1.0
    norm_adv_by_std_in_grpo: bool = True


Estimator = Callable[[AdvantageInputs], tuple[torch.Tensor, torch.Tensor]]
_ESTIMATORS: dict[str, tuple[Estimator, bool]] = {}


def _register(name: str, needs_critic: bool = False) -> Callable[[Estimator], Estimator]:
    def add(fn: Estimator) -> Estimator:
        _ESTIMATORS[name] = (fn, needs_critic)
        return fn

    return add


def _find(name: str) -> tuple[Estimator, bool]:
    if name not in _ESTIMATORS:
        raise ValueError(f"unknown algorithm.adv_estimator {name!r}: it must be one of {', '.join(names())}")
    return _ESTIMATORS[name]


def names() -> list[str]:
    """The estimators' names, sorted."""
    return sorted(_ESTIMATORS)


def needs_critic(name: str) -> bool:
    """Whether the estimator reads values. ValueError: unknown name."""
    return _find(name)[1]


def compute(name: str, inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, float32 [R] each, without gradients. ValueError: unknown name, no values for a critic's
    estimator."""
    fn, critic = _find(name)
    if critic and inputs.values is None:
        raise ValueError(f"algorithm.adv_estimator={name} needs the critic's values: enable the critic (critic.enable)")
    with torch.no_grad():
        advantages, returns = fn(inputs)
    return advantages.float(), returns.float()


def place_scores(scores: torch.Tensor, response_mask: torch.Tensor, cu_resp: torch.Tensor) -> torch.Tensor:
    """Scores of whole samples as token rewards: scores [N] -> float32 [R], each at its sample's last token that counts.

    Not at the last token: where that is a tool's, GAE and REINFORCE++ would never see the reward. A sample in which no
    token counts keeps none.
    """
    counts = tokens_per_sequence(response_mask, cu_resp)
    places = torch.nonzero(response_mask != 0).squeeze(1)  # the counting tokens, in order
    last = counts.cumsum(0)[counts > 0] - 1
    rewards = torch.zeros(response_mask.shape[0], dtype=torch.float32, device=response_mask.device)
    rewards[places[last]] = scores[counts > 0].float()
    return rewards


def masked_whiten(x: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(x - mean) / sqrt(variance + 1e-8) at every token: x, mask [R] -> float32 [R].

    Mean and unbiased variance (as verl's masked_whiten) are those of the tokens that count; with fewer than two of them
    the variance is 0.
    """
    kept = x[response_mask != 0].double()
    mean = kept.sum() / max(kept.numel(), 1)
    variance = (kept - mean).square().sum() / max(kept.numel() - 1, 1)
    return ((x.double() - mean) * torch.rsqrt(variance + WHITEN_EPSILON)).float()


def _segment_sum(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive pieces: x [M], offsets int64 [K + 1] -> [K]. Without atomics: the same bits on every run."""
    return torch.segment_reduce(x, "sum", offsets=offsets, initial=0)


def _sample_scores(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of each sample's token rewards [N] float64, and which samples have a token that counts [N] bool."""
    rewards = inputs.token_rewards.double()
    scores = _segment_sum(rewards, inputs.cu_resp.long())
    return scores, tokens_per_sequence(inputs.response_mask, inputs.cu_resp) > 0


def _group_statistics(scores: torch.Tensor, group_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Per sample, its group's size, mean and unbiased standard deviation (0 for a group of one): [N] each, float64."""
    _, group, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    order = torch.argsort(group, stable=True)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    mean = (_segment_sum(scores[order], offsets) / sizes)[group]
    variance = _segment_sum((scores - mean).square()[order], offsets) / (sizes - 1).clamp(min=1)
    return sizes[group], mean, variance.sqrt()[group]


def _outcome_advantages(
    inputs: AdvantageInputs, per_sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One advantage a sample, per_sample(scores, group_ids) over the samples that count, spread over its tokens."""
    scores, counted = _sample_scores(inputs)
    of_sample = torch.zeros_like(scores)
    of_sample[counted] = per_sample(scores[counted], inputs.group_ids[counted])
    per_token = of_sample[sequence_of_token(inputs.cu_resp, inputs.response_mask.shape[0])]
    advantages = torch.where(inputs.response_mask != 0, per_token, 0).float()
    return advantages, advantages


@_register("gae", needs_critic=True)
def gae(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438), whitened over the batch; returns = unwhitened A + V.

    Tokens that do not count are carried over, as in verl: see hybridrl.ops.gae.
    """
    advantages, returns = packed_gae(
        inputs.token_rewards, inputs.values, inputs.response_mask, inputs.cu_resp, inputs.gamma, inputs.lam
    )
    return masked_whiten(advantages, inputs.response_mask), returns


@_register("grpo")
def grpo(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO (arXiv:2402.03300): A = (R - mean) / (std + 1e-6) in the group, std unbiased; a group of one: A = R.

    With norm_adv_by_std_in_grpo False, A = R - mean (Dr. GRPO, arXiv:2503.20783). R is the sum of the token rewards.
    """

    def per_sample(scores: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        sizes, mean, std = _group_statistics(scores, group_ids)
        centred = scores - mean
        if inputs.norm_adv_by_std_in_grpo:
            centred = centred / (std + GRPO_EPSILON)
        return torch.where(sizes > 1, centred, scores)

    return _outcome_advantages(inputs, per_sample)


@_register("rloo")
def rloo(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE leave-one-out (arXiv:2402.14740): R minus the mean of the group's others; a group of one: A = R."""

    def per_sample(scores: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        sizes, mean, _ = _group_statistics(scores, group_ids)
        # n / (n - 1) * (R - mean of all) is R - mean of the others
        return torch.where(sizes > 1, sizes / (sizes - 1).clamp(min=1) * (scores - mean), scores)

    return _outcome_advantages(inputs, per_sample)


@_register("reinforce_plus_plus")
def reinforce_plus_plus(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE++ (arXiv:2501.03262): the discounted return G_t = r_t + gamma G_{t+1}, whitened over the batch.

    GAE with V = 0 and lambda = 1. A tool's tokens are carried over: the reward at the end reaches what stands before
    them, undiscounted by them. (verl resets G there, so that only the last turn learns; without tools both agree.)
    """
    zeros = torch.zeros_like(inputs.token_rewards)
    _, returns = packed_gae(inputs.token_rewards, zeros, inputs.response_mask, inputs.cu_resp, inputs.gamma, 1.0)
    whitened = masked_whiten(returns, inputs.response_mask)
    return torch.where(inputs.response_mask != 0, whitened, 0), returns
