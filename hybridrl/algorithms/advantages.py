"""Advantage estimators on packed responses, found by verl's names (`algorithm.adv_estimator`) or by import path.

Statistics (whitening, group means) run in float64 over what they are given, so they must see the whole batch at once;
only samples with at least one token that counts take part in them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hybridrl.algorithms import by_path
from hybridrl.algorithms.aggregation import sequence_of_token, tokens_per_sequence
from hybridrl.ops.gae import gae as packed_gae

WHITEN_EPSILON = 1e-8
GRPO_EPSILON = 1e-6
OTB_EPSILON = 1e-8


@dataclass(frozen=True)
class AdvantageInputs:
    """A whole batch. Float tensors are float32, contiguous, on one device with the others.

    token_rewards [R]; response_mask [R]; cu_resp [N + 1]; group_ids int64 [N], equal for samples of one prompt (any
    numbers); gamma, lam: discount and GAE's lambda; norm_adv_by_std_in_grpo: divide by the group's standard deviation.
    Present where the estimator `needs` them: values [R] (a critic's), reward_baselines [N] (score of the prompt's
    greedy answer), reward_components [K, N] with reward_weights [K] (the parts of the score), old_logprobs [R] and
    sum_pi_squared [R] (the trainer's log-prob of the token, and sum over the vocabulary of squared probabilities).
    rollout_is_weights [R]: rollout correction's weights, None without it.
    """

    token_rewards: torch.Tensor
    response_mask: torch.Tensor
    cu_resp: torch.Tensor
    group_ids: torch.Tensor
    values: torch.Tensor | None = None
    gamma: float = 1.0
    lam: float = 1.0
    norm_adv_by_std_in_grpo: bool = True
    reward_baselines: torch.Tensor | None = None
    reward_components: torch.Tensor | None = None
    reward_weights: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    sum_pi_squared: torch.Tensor | None = None
    rollout_is_weights: torch.Tensor | None = None


Formula = Callable[[AdvantageInputs], tuple[torch.Tensor, torch.Tensor]]

# What each optional input takes to be there, for the message where it is not.
_SOURCES = {
    "values": "the critic's values: enable the critic (critic.enable)",
    "reward_baselines": "the scores of greedy rollouts",
    "reward_components": "algorithm.gdpo_reward_keys",
    "reward_weights": "algorithm.gdpo_reward_weights, one a key",
    "old_logprobs": "the trainer's log-probs",
    "sum_pi_squared": "sums of squared probabilities from the trainer's log-prob pass",
}


@dataclass(frozen=True)
class Estimator:
    """A formula and what it takes. needs: optional inputs of AdvantageInputs; options: keys below `algorithm` that it
    reads (None: not declared); compares: compares the samples of a prompt, so that it needs at least two; per_token:
    reads token_rewards, to which a KL term or a penalty may have been added."""

    formula: Formula
    needs: frozenset[str] = frozenset()
    options: frozenset[str] | None = None
    compares: bool = False
    per_token: bool = True


_ESTIMATORS: dict[str, Estimator] = {}
KEY = "algorithm.adv_estimator"


def estimator(
    *names: str, needs: tuple = (), options: tuple = (), compares: bool = False, per_token: bool = True
) -> Callable[[Formula], Formula]:
    """Declares what a formula takes (see Estimator) and registers it under `names`.

    On a function that is found by import path, without names, it says which optional inputs must be there.
    """

    def add(formula: Formula) -> Formula:
        formula.declared = Estimator(formula, frozenset(needs), frozenset(options), compares, per_token)
        _ESTIMATORS.update((name, formula.declared) for name in names)
        return formula

    return add


def find(name: str) -> Estimator:
    """The estimator of that name or import path. ValueError: there is none."""
    if by_path.is_path(name):
        formula = by_path.load(name, KEY)
        return getattr(formula, "declared", None) or Estimator(formula)
    if name not in _ESTIMATORS:
        raise ValueError(
            f"unknown {KEY} {name!r}: it must be one of {', '.join(names())}, or package.module:function"
        )
    return _ESTIMATORS[name]


def names() -> list[str]:
    """The estimators' names, sorted."""
    return sorted(_ESTIMATORS)


def needs_critic(name: str) -> bool:
    """Whether the estimator reads values. ValueError: unknown name."""
    return "values" in find(name).needs


def compute(name: str, inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, float32 [R] each, without gradients. ValueError: unknown name, an input that the
    estimator needs is missing, or a function of the user's returned something else."""
    found = find(name)
    for need in sorted(found.needs):
        if getattr(inputs, need) is None:
            raise ValueError(f"{KEY}={name} needs {_SOURCES[need]}")
    with torch.no_grad():
        advantages, returns = found.formula(inputs)
    shape = inputs.response_mask.shape
    if advantages.shape != shape or returns.shape != shape:
        raise ValueError(
            f"{KEY}={name} returned shapes {tuple(advantages.shape)} and {tuple(returns.shape)}: both must be"
            f" {tuple(shape)}, one number a response token"
        )
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


def _centred(scores: torch.Tensor, group_ids: torch.Tensor, by_std: bool) -> torch.Tensor:
    """GRPO's advantage of each sample: scores float64 [N], group_ids [N] -> [N]; a group of one keeps its score."""
    sizes, mean, std = _group_statistics(scores, group_ids)
    centred = scores - mean
    return torch.where(sizes > 1, centred / (std + GRPO_EPSILON) if by_std else centred, scores)


def _spread(inputs: AdvantageInputs, of_sample: torch.Tensor) -> torch.Tensor:
    """A number a sample [N] at each of its counting tokens, 0 at the others: float32 [R]."""
    per_token = of_sample[sequence_of_token(inputs.cu_resp, inputs.response_mask.shape[0])]
    return torch.where(inputs.response_mask != 0, per_token, 0).float()


def _outcome_advantages(
    inputs: AdvantageInputs, per_sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One advantage a sample, per_sample(scores, group_ids) over the samples that count, spread over its tokens."""
    scores, counted = _sample_scores(inputs)
    of_sample = torch.zeros_like(scores)
    of_sample[counted] = per_sample(scores[counted], inputs.group_ids[counted])
    advantages = _spread(inputs, of_sample)
    return advantages, advantages


def _reward_to_go(inputs: AdvantageInputs) -> torch.Tensor:
    """Undiscounted sum of the counting tokens' rewards from each token to its sequence's end: float64 [R]."""
    zeros = torch.zeros_like(inputs.token_rewards)
    return packed_gae(inputs.token_rewards, zeros, inputs.response_mask, inputs.cu_resp, 1.0, 1.0)[1].double()


@estimator("gae", needs=("values",), options=("gamma", "lam"))
def gae(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438), whitened over the batch; returns = unwhitened A + V.

    Tokens that do not count are carried over, as in verl: see hybridrl.ops.gae.
    """
    advantages, returns = packed_gae(
        inputs.token_rewards, inputs.values, inputs.response_mask, inputs.cu_resp, inputs.gamma, inputs.lam
    )
    return masked_whiten(advantages, inputs.response_mask), returns


@estimator("grpo", "grpo_vectorized", options=("norm_adv_by_std_in_grpo",), compares=True)
def grpo(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO (arXiv:2402.03300): A = (R - mean) / (std + 1e-6) in the group, std unbiased; a group of one: A = R.

    With norm_adv_by_std_in_grpo False, A = R - mean (Dr. GRPO, arXiv:2503.20783). R is the sum of the token rewards.
    """

    def per_sample(scores: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        return _centred(scores, group_ids, inputs.norm_adv_by_std_in_grpo)

    return _outcome_advantages(inputs, per_sample)


@estimator("rloo", "rloo_vectorized", compares=True)
def rloo(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE leave-one-out (arXiv:2402.14740): R minus the mean of the group's others; a group of one: A = R."""

    def per_sample(scores: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        sizes, mean, _ = _group_statistics(scores, group_ids)
        # n / (n - 1) * (R - mean of all) is R - mean of the others
        return torch.where(sizes > 1, sizes / (sizes - 1).clamp(min=1) * (scores - mean), scores)

    return _outcome_advantages(inputs, per_sample)


@estimator("reinforce_plus_plus", options=("gamma",))
def reinforce_plus_plus(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE++ (arXiv:2501.03262): the discounted return G_t = r_t + gamma G_{t+1}, whitened over the batch.

    GAE with V = 0 and lambda = 1. A tool's tokens are carried over: the reward at the end reaches what stands before
    them, undiscounted by them. (verl resets G there, so that only the last turn learns; without tools both agree.)
    """
    zeros = torch.zeros_like(inputs.token_rewards)
    _, returns = packed_gae(inputs.token_rewards, zeros, inputs.response_mask, inputs.cu_resp, inputs.gamma, 1.0)
    whitened = masked_whiten(returns, inputs.response_mask)
    return torch.where(inputs.response_mask != 0, whitened, 0), returns


@estimator("reinforce_plus_plus_baseline", compares=True)
def reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE++ with the group's mean as baseline (arXiv:2501.03262): R - mean, whitened over the batch's tokens."""
    centred, _ = _outcome_advantages(inputs, lambda scores, ids: _centred(scores, ids, by_std=False))
    whitened = torch.where(inputs.response_mask != 0, masked_whiten(centred, inputs.response_mask), 0)
    return whitened, whitened


@estimator("grpo_passk", options=("norm_adv_by_std_in_grpo",), compares=True)
def grpo_passk(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO on the best of a group (arXiv:2503.19595): A = R_max - R_second for the best sample, 0 for the others.

    Divided by std + 1e-6 of the group with norm_adv_by_std_in_grpo. Where two are best nobody is, as in verl; a group
    of one has no second and gets 0.
    """

    def per_sample(scores: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        _, group = torch.unique(group_ids, return_inverse=True)
        sizes, _, std = _group_statistics(scores, group_ids)
        order = torch.argsort(scores, stable=True)
        order = order[torch.argsort(group[order], stable=True)]  # by group, ascending scores within
        previous = torch.roll(order, 1)
        last = group[order] != torch.roll(group[order], -1)
        if order.numel():
            last[-1] = True
        best = torch.zeros_like(scores)
        best[order] = torch.where(last & (sizes[order] > 1), scores[order] - scores[previous], 0)
        return best / (std + GRPO_EPSILON) if inputs.norm_adv_by_std_in_grpo else best

    return _outcome_advantages(inputs, per_sample)


@estimator(
    "gdpo",
    needs=("reward_components", "reward_weights"),
    options=("norm_adv_by_std_in_grpo", "gdpo_reward_keys", "gdpo_reward_weights"),
    compares=True,
    per_token=False,
)
def gdpo(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """GDPO (arXiv:2601.05242): GRPO's advantage of each part of the reward, their weighted sum, whitened over tokens.

    Reads reward_components, not token_rewards.
    """
    _, counted = _sample_scores(inputs)
    of_sample = torch.zeros(counted.shape[0], dtype=torch.float64, device=counted.device)
    ids = inputs.group_ids[counted]
    for weight, scores in zip(inputs.reward_weights.tolist(), inputs.reward_components.double(), strict=True):
        of_sample[counted] += weight * _centred(scores[counted], ids, inputs.norm_adv_by_std_in_grpo)
    spread = _spread(inputs, of_sample)
    whitened = torch.where(inputs.response_mask != 0, masked_whiten(spread, inputs.response_mask), 0)
    return whitened, whitened


@estimator("remax", needs=("reward_baselines",))
def remax(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """ReMax (arXiv:2310.10505): A_t = reward-to-go minus the score of the prompt's greedy answer."""
    returns = _reward_to_go(inputs)
    baselines = inputs.reward_baselines.double()[sequence_of_token(inputs.cu_resp, returns.shape[0])]
    return torch.where(inputs.response_mask != 0, returns - baselines, 0), returns


@estimator("opo", compares=True)
def opo(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """OPO (arXiv:2505.23585): R minus the group's mean weighted by length, sum(len R) / sum(len); a group of one: R.

    len counts the tokens that count.
    """
    lengths = tokens_per_sequence(inputs.response_mask, inputs.cu_resp).double()
    lengths = lengths[lengths > 0]

    def per_sample(scores: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        sizes, mean_length, _ = _group_statistics(lengths, group_ids)
        _, mean_product, _ = _group_statistics(lengths * scores, group_ids)
        return torch.where(sizes > 1, scores - mean_product / mean_length, scores)

    return _outcome_advantages(inputs, per_sample)


@estimator("gpg", compares=True)
def gpg(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """GPG (arXiv:2504.02546): A = alpha (R - mean), alpha = samples / samples whose score is not 0; a group of one: R.

    The paper divides by F_norm besides, which is 1 here and in verl.
    """

    def per_sample(scores: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        alpha = scores.numel() / (scores != 0).sum().clamp(min=1)
        return alpha * _centred(scores, group_ids, by_std=False)

    return _outcome_advantages(inputs, per_sample)


def _token_baseline(inputs: AdvantageInputs, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The optimal token baseline over tokens of a group that share a slot: slots int64 [R]."""
    mask, rows = inputs.response_mask != 0, sequence_of_token(inputs.cu_resp, slots.shape[0])
    returns = _reward_to_go(inputs)
    steps = 1 - 2 * inputs.old_logprobs.double().exp() + inputs.sum_pi_squared.double()
    if inputs.rollout_is_weights is not None:
        steps = steps * inputs.rollout_is_weights.double().square()
    ends = torch.nn.functional.pad(torch.where(mask, steps, 0).cumsum(0), (1, 0))
    weights = (ends[1:] - ends[inputs.cu_resp[:-1].long()][rows])[mask]
    keys = torch.stack([inputs.group_ids[rows], slots], dim=1)[mask]
    _, place, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    order = torch.argsort(place, stable=True)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    above = _segment_sum((weights * returns[mask])[order], offsets)
    below = _segment_sum(weights[order], offsets) + OTB_EPSILON
    baselines = torch.zeros_like(returns)
    baselines[mask] = torch.where(counts > 1, above / below, 0)[place]
    return torch.where(mask, returns - baselines, 0), returns


@estimator("optimal_token_baseline", needs=("old_logprobs", "sum_pi_squared"), compares=True)
def optimal_token_baseline(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimal token baseline (arXiv:2602.07078): A_t = G_t - B_t, with G_t the reward-to-go and, over the samples i of
    the group that have a counting token at place t of the response,

        B_t = sum_i G_t W_t / sum_i W_t      W_t = sum_{j <= t} (1 - 2 pi_j + sum_v pi_j(v)^2) rho_j^2

    rho: rollout correction's weights, 1 without it. Where one sample alone reaches place t, B_t = 0, else nothing would
    be learnt there (verl's handling of the longest sample's tail).
    """
    starts = inputs.cu_resp[:-1].long()[sequence_of_token(inputs.cu_resp, inputs.response_mask.shape[0])]
    return _token_baseline(inputs, torch.arange(starts.shape[0], device=starts.device) - starts)


@estimator("tir_optimal_token_baseline", needs=("old_logprobs", "sum_pi_squared"), compares=True)
def tir_optimal_token_baseline(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The optimal token baseline for responses with tools' tokens: t counts the tokens that count, not places."""
    counted = torch.nn.functional.pad((inputs.response_mask != 0).long().cumsum(0), (1, 0))
    starts = counted[inputs.cu_resp[:-1].long()][sequence_of_token(inputs.cu_resp, inputs.response_mask.shape[0])]
    return _token_baseline(inputs, counted[:-1] - starts)
